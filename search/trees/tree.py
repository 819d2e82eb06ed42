"""Search trees over denoising chains: B trees as flat arrays, one layer per branching level.

A node is its slot in its layer, and its parent is a slot in the layer above. Depth 0 is the root, which has no state:
its transition is the prior. Depth d >= 1 holds states at level `levels[d - 1]`, the last of them clean leaves. Between
branching levels a chain is one edge.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.core.population import gather
from steer.errors import SteerError

from .node_table import ChildLists, Layer
from .ragged import Slots, each_problem

if TYPE_CHECKING:
    import networkx

_ONE = np.int32(1)  # of the counts' own type: where numpy has to cast, counting is ten times as slow


class Tree:
    """B trees that can be grown further; with a search's meter, one of the two mutable things of a run.

    levels:     levels of the process at which nodes are kept, rising, the last one the data.
    layers:     depth 0 (the roots) to depth D = len(levels) (the leaves).
    iterations: walks made so far in every tree; the next walk's noise has this slot.
    sweeps:     walks are made in sweeps of many; how many of those.
    normalised: whether the normaliser of the law that roots were drawn from is known, (B,).
    biased_start: whether roots were chosen, by hand or greedily, so that no weight corrects for where they are.
    expansions: walks that ended by expanding a node of depth d < D, of each tree, (D, B).
    """

    def __init__(self, problems: int, levels: tuple[int, ...]):
        self.problems, self.levels = problems, levels
        self.layers = [Layer(problems) for _ in range(len(levels) + 1)]
        self.lists = [ChildLists(problems) for _ in levels]
        self.iterations = self.sweeps = 0
        self.normalised = np.ones(problems, dtype=np.bool_)
        self.biased_start = False
        self.expansions = np.zeros((len(levels), problems), dtype=np.int64)
        self.attach(0, None, np.zeros((problems, 1), dtype=np.int64))

    def __repr__(self) -> str:
        leaves = int(self.leaves.count.sum())
        return f"Tree({self.problems} trees, {self.nodes} nodes, {leaves} leaves, levels {self.levels})"

    @property
    def depth(self) -> int:
        """Edges from the root to a leaf."""
        return len(self.levels)

    @property
    def leaves(self) -> Layer:
        """The last layer."""
        return self.layers[-1]

    @property
    def nodes(self) -> int:
        """Nodes of all trees, roots and leaves included."""
        return int(sum(layer.count.sum() for layer in self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes held: columns with their room to grow, child lists, and states."""
        held = [c for layer in self.layers for c in (*layer.facts.values(), *layer.states.values())]
        for lists in self.lists:
            held += [lists.start, lists.room, lists.length, lists.pool]
        return sum(column.nbytes for column in held)

    def attach(
        self, depth: int, live: NDArray[np.bool_] | None, parent: Slots, **columns: float | NDArray[Any] | Tensor
    ) -> Slots:
        """New nodes at a depth below parents (B, W), where live: their slots. `commit` counts them at old parents.

        A node between root and leaf is born on a walk that goes on to its first child: with it, and with that visit.
        """
        first = int(0 < depth < self.depth)
        return self.layers[depth].append(live, parent, children=first, visits=first + 1, **{"correction": 0, **columns})

    def commit(self, entry: Slots, path: Slots) -> None:
        """Ends a sweep: visits to the old nodes on every walk, and their new children, are counted.

        entry: (B, W) depth of the node each walk expanded; `depth` for a walk that came to an old leaf, more for none.
        path:  for each depth the slots walked through, (depth + 1, B, W).
        """
        for d in range(min(self._deepest(entry) + 1, self.depth)):
            above = self.layers[d]
            at = above.places(each_problem(self.problems), path[d])
            np.add.at(above.flat("visits"), at[(entry >= d) & (entry <= self.depth)], _ONE)
            np.add.at(above.flat("children"), at[entry == d], _ONE)
        self.expansions += (entry == np.arange(self.depth)[:, None, None]).sum(2)
        self.iterations, self.sweeps = self.iterations + entry.shape[1], self.sweeps + 1

    def _deepest(self, entry: Slots) -> int:
        """The deepest old node that a walk of a sweep came to: below, all nodes on walks are new."""
        return int(entry.max(where=entry <= self.depth, initial=0))

    def counts(self) -> list[Slots]:
        """What `rollback` needs to undo a sweep that did not end."""
        return [layer.count for layer in self.layers]

    def rollback(self, counts: list[Slots]) -> None:
        """Forgets the nodes attached since `counts`."""
        for layer, count in zip(self.layers, counts, strict=True):
            layer.resize(count)

    def children(self, depth: int, problem: Slots, node: Slots) -> tuple[Slots, Slots, Slots]:
        """All children of nodes (M,) of a depth, node by node: slots, where each node's begin, and how many."""
        self.lists[depth].read(self.layers[depth + 1], self.layers[depth].size)
        return self.lists[depth].of(problem, node)

    def log_shares(self) -> Iterator[Tensor]:
        """For every depth from the root down, the log of each node's share of its tree: prod 1 / |C| over its ancestors
        times corrections, (B, size), -inf in empty slots.

        Shares of a layer sum to one where there are no corrections.
        """
        share = torch.zeros(self.problems, 1, dtype=torch.float64)
        yield share
        for above, below in pairwise(self.layers):
            share = (share - above["children"].double().log()).gather(1, below["parent"]) + below["correction"]
            share = share.masked_fill(~below.filled, -torch.inf)
            yield share

    def log_share(self, depth: int) -> Tensor:
        """`log_shares` of one depth."""
        return next(islice(self.log_shares(), depth, None))

    def set_leaf_values(self, potential: Tensor) -> None:
        """Leaf values (B, size): log-potentials r / T for a soft tree, rewards for a greedy one."""
        self.leaves["value"].copy_(potential)

    def backup(self, *, greedy: bool = False) -> Tensor:
        """Recomputes every value from the leaves up: by log-mean-exp with corrections, or by maximum, in units of the
        reward and without. Values of the roots, (B,)."""
        for above, below in zip(self.layers[-2::-1], self.layers[:0:-1], strict=True):
            value = below["value"] if greedy else below["value"] + below["correction"]
            value = value.masked_fill(~below.filled, -torch.inf)
            top = torch.full(above["value"].shape, -torch.inf, dtype=torch.float64)
            top.scatter_reduce_(1, below["parent"], value, "amax")
            if not greedy:
                shift = top.masked_fill(top == -torch.inf, 0.0)
                total = torch.zeros_like(top)
                total.scatter_add_(1, below["parent"], (value - shift.gather(1, below["parent"])).exp())
                top = total.log() + shift - above["children"].clamp(min=1).double().log()
            above["value"].copy_(top)
        return self.layers[0]["value"][:, 0].clone()

    def backup_paths(self, entry: Slots, path: Slots, *, greedy: bool = False) -> None:
        """`backup` of the nodes on walks (B, W) only, in time proportional to their children."""
        row, deepest = each_problem(self.problems), self._deepest(entry)
        for d in range(self.depth - 1, -1, -1):
            above, below = self.layers[d], self.layers[d + 1]
            at, value, correction = above.places(row, path[d]), below.flat("value"), below.flat("correction")
            fresh = entry < d  # new nodes, of one child
            child = below.places(row, path[d + 1])[fresh]
            above.flat("value")[at[fresh]] = value[child] if greedy else value[child] + correction[child]
            if d <= deepest:
                node = np.unique(at[(entry >= d) & (entry <= self.depth)])
                problem = node // above.room
                child, first, length = self.children(d, problem, node % above.room)
                child += (problem * below.room).repeat(length)
                worth = value[child] if greedy else value[child] + correction[child]
                above.flat("value")[node] = _pool(worth, first, length, greedy)

    def states(self, depth: int, slots: Tensor, device: torch.device | None = None) -> dict[str, Tensor]:
        """States of nodes (B, W), predictions and what proposals need there, on a device."""
        held = {name: column for name, column in self.layers[depth].states.items() if not name.startswith("edge")}
        return {name: gather(column, slots.to(column.device)).to(device) for name, column in held.items()}

    def nodes_at(self, depth: int, problem: int = 0) -> dict[str, Tensor]:
        """What is known of one tree's nodes of a depth, (n,) each: parent, children, visits, value, and where they are
        scored look or reward. With `levels` and `states`, all that the report's figure reads."""
        layer = self.layers[depth]
        names = ("parent", "children", "visits", "value", "look", "reward")
        return {name: layer[name][problem, : layer.count[problem]] for name in names if name in layer}

    def to_networkx(self, problem: int = 0) -> networkx.DiGraph:
        """One tree as a networkx graph: nodes (depth, slot) with level, visits, value, reward; edges to children."""
        try:
            import networkx
        except ImportError as error:
            raise SteerError("Tree.to_networkx draws on networkx; pip install networkx") from error
        graph = networkx.DiGraph()
        for depth, layer in enumerate(self.layers):
            for slot in range(int(layer.count[problem])):
                known: dict[str, Any] = {"level": self.levels[depth - 1] if depth else -1}
                for name in ("visits", "value", "look", "reward"):
                    if name in layer:
                        known[name] = layer[name][problem, slot].item()
                graph.add_node((depth, slot), **known)
                if depth:
                    graph.add_edge((depth - 1, int(layer["parent"][problem, slot])), (depth, slot))
        return graph


def _pool(value: NDArray[Any], first: Slots, length: Slots, greedy: bool) -> NDArray[Any]:
    """Maximum, or log of the mean of exp, of groups of values side by side."""
    top = np.maximum.reduceat(value, first)
    if greedy:
        return top
    shift = np.where(top == -np.inf, 0.0, top)
    with np.errstate(divide="ignore"):  # log 0 = -inf, where all below is forbidden
        return np.log(np.add.reduceat(np.exp(value - shift.repeat(length)), first)) + shift - np.log(length)
