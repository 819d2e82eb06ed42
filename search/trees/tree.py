"""Search trees over denoising chains: B trees as flat arrays, one table of nodes per branching level.

A node is its slot in its table, and its parent is a slot in the table above. Depth 0 is the root, which has no state:
its transition is the prior. Depth d >= 1 holds states at level `levels[d - 1]`, the last of them clean leaves. Between
branching levels a chain is one edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.core.leaf_paths import LeafPaths, PathStep
from steer.core.population import gather
from steer.errors import SteerError

from .backup import Backup, Siblings, soft_backup
from .expansion_plan import ExpansionPlan
from .node_table import EDGE_COLUMNS, ChildIndex, NodeTable
from .ragged import Slots, each_problem

if TYPE_CHECKING:
    import networkx

_ONE = np.int32(1)  # of the counts' own type: where numpy has to cast, counting is ten times as slow


class Tree:
    """B trees that can be grown further; with a search's meter, one of the two mutable things of a run.

    levels:      levels of the process at which nodes are kept, rising, the last one the data.
    rule:        backup rule that values are computed by: that of the search that grew the tree last.
    layers:      tables of nodes, depth 0 (the roots) to depth D = len(levels) (the leaves).
    simulations: made so far in every tree; the next one's noise has this slot.
    batches:     in which they were made.
    normalizer_known: whether the normalizing constant of the distribution that roots were drawn from is known, [B].
    biased_start: whether roots were chosen, by hand or greedily, so that no weight corrects for where they are.
    expansions:  simulations that expanded a node of depth d < D, of each tree, [D, B].
    reward:      whose scores leaves and nodes hold; None where that is not known, as in a copy made by pickle.
    """

    reward: Callable[..., Any] | None = None

    def __init__(self, problems: int, levels: tuple[int, ...], rule: Backup = soft_backup):
        self.problems, self.levels, self.rule = problems, levels, rule
        self.layers = [NodeTable(problems) for _ in range(len(levels) + 1)]
        self.child_index = [ChildIndex(problems) for _ in levels]
        self.simulations = self.batches = 0
        self.normalizer_known = np.ones(problems, dtype=np.bool_)
        self.biased_start = False
        self.expansions = np.zeros((len(levels), problems), dtype=np.int64)
        self.add_nodes(0, None, np.zeros((problems, 1), dtype=np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "reward": None}  # a function of the user's, which need not travel

    def __repr__(self) -> str:
        leaves = int(self.leaves.count.sum())
        return f"Tree({self.problems} trees, {self.nodes} nodes, {leaves} leaves, levels {self.levels})"

    @property
    def depth(self) -> int:
        """D, edges from the root to a leaf."""
        return len(self.levels)

    @property
    def leaves(self) -> NodeTable:
        """The last table."""
        return self.layers[-1]

    @property
    def nodes(self) -> int:
        """Nodes of all trees, roots and leaves included."""
        return int(sum(layer.count.sum() for layer in self.layers))

    @property
    def nbytes(self) -> int:
        """Bytes held: columns with their room to grow, the index of children, and states."""
        held = [c for layer in self.layers for c in (*layer.facts.values(), *layer.states.values())]
        for index in self.child_index:
            held += [index.start, index.room, index.length, index.pool]
        return sum(column.nbytes for column in held)

    # -- growth -------------------------------------------------------------------------------------------------------

    def add_nodes(
        self, depth: int, live: NDArray[np.bool_] | None, parent: Slots, **columns: float | NDArray[Any] | Tensor
    ) -> Slots:
        """New nodes below their parents. `count_visits` counts them at parents that were there before the batch.

        A node between root and leaf is born on a simulation that goes on to its first child: it begins with that child
        and with that visit.

        Args:
            depth: of the nodes.
            live: [B, W], where there is one; None for everywhere.
            parent: [B, W], slots in the table above.
            **columns: of `NodeTable`, [B, W, ...], or one number for all.

        Returns:
            Slots of the nodes, [B, W].
        """
        first = int(0 < depth < self.depth)
        columns = {"log_importance_ratio": 0, **columns}
        return self.layers[depth].append(live, parent, children=first, visits=first + 1, **columns)

    def count_visits(self, plan: ExpansionPlan) -> None:
        """Ends a batch: counts the visits to old nodes on every simulation's path, and their new children."""
        row, real = each_problem(self.problems), plan.real
        for d in range(min(plan.deepest + 1, self.depth)):
            above = self.layers[d]
            at = above.places(row, plan.path[d])
            np.add.at(above.flat("visits"), at[(plan.depth >= d) & real], _ONE)
            np.add.at(above.flat("children"), at[plan.depth == d], _ONE)
        self.expansions += (plan.depth == np.arange(self.depth)[:, None, None]).sum(2)
        self.simulations, self.batches = self.simulations + plan.depth.shape[1], self.batches + 1

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Forgets the nodes of a batch that does not end: a tree holds whole simulations only, and can be grown on."""
        counts = [layer.count for layer in self.layers]
        try:
            yield
        except BaseException:
            for layer, count in zip(self.layers, counts, strict=True):
                layer.resize(count)
            raise

    # -- values -------------------------------------------------------------------------------------------------------

    def backup(self, temperature: float) -> Tensor:
        """Computes every value anew from the rewards of the leaves, by the tree's rule.

        Args:
            temperature: that divides rewards, where the rule asks for it.

        Returns:
            Values of the roots, [B] float64.
        """
        leaves = self.leaves
        leaves.facts["value"][:, : leaves.size] = self.rule.leaf_value(
            leaves.facts["reward"][:, : leaves.size], temperature
        )
        for above, below in zip(self.layers[-2::-1], self.layers[:0:-1], strict=True):
            problem, slot = below.filled.numpy().nonzero()
            parent = above.places(problem, below.facts["parent"][problem, slot])
            siblings = Siblings(parent, above.flat("children").clip(min=1))
            above.flat("value")[:] = self.rule.pool(self.child_values(below, below.places(problem, slot)), siblings)
        return self.layers[0]["value"][:, 0].clone()

    def backup_paths(self, plan: ExpansionPlan) -> None:
        """Computes the values on the paths of a batch anew, in time proportional to the children of their nodes."""
        row, real, deepest = each_problem(self.problems), plan.real, plan.deepest
        for d in reversed(range(self.depth)):
            above, below = self.layers[d], self.layers[d + 1]
            at, value, new = above.places(row, plan.path[d]), above.flat("value"), plan.depth < d
            # A new node has one child, and its value is what that child counts for.
            value[at[new]] = self.child_values(below, below.places(row, plan.path[d + 1])[new])
            if d <= deepest:
                node = np.unique(at[(plan.depth >= d) & real])
                problem = node // above.room
                child, _, count = self.children(d, problem, node % above.room)
                child += (problem * below.room).repeat(count)
                siblings = Siblings(np.arange(len(node)).repeat(count), count)
                value[node] = self.rule.pool(self.child_values(below, child), siblings)

    def child_values(self, layer: NodeTable, places: Slots) -> NDArray[Any]:
        """What nodes of a table, at places on its merged axis, count for at their parents."""
        return self.rule.child_value(layer.flat("value")[places], layer.flat("log_importance_ratio")[places])

    # -- reading ------------------------------------------------------------------------------------------------------

    def children(self, depth: int, problem: Slots, node: Slots) -> tuple[Slots, Slots, Slots]:
        """All children of some nodes, node by node.

        Args:
            depth: of the nodes.
            problem: [M], which tree each is in.
            node: [M], slots.

        Returns:
            Slots of all children, end to end; where each node's begin, [M]; and how many, [M].
        """
        self.child_index[depth].read(self.layers[depth + 1], self.layers[depth].size)
        return self.child_index[depth].of(problem, node)

    def log_path_weights(self) -> Iterator[Tensor]:
        """Log path weights of the nodes, for every depth from the root down.

        The path weight of a node is prod 1 / |C| over its ancestors, times the importance ratios of the edges to it:
        its part of the tree. Those of a depth sum to one where there are no importance ratios.

        Returns:
            For every depth a tensor [B, size] float64, -inf in empty slots.
        """
        weight = torch.zeros(self.problems, 1, dtype=torch.float64)
        yield weight
        for above, below in pairwise(self.layers):
            weight = (weight - above["children"].double().log()).gather(1, below["parent"])
            weight = (weight + below["log_importance_ratio"]).masked_fill(~below.filled, -torch.inf)
            yield weight

    def log_path_weight(self, depth: int) -> Tensor:
        """`log_path_weights` of one depth, [B, size]."""
        return next(islice(self.log_path_weights(), depth, None))

    def leaf_slots(self) -> Tensor:
        """Slots [B, N] of the leaves that stand for a tree in a Result: a smaller tree repeats its first one."""
        return torch.where(self.leaves.filled, torch.arange(self.leaves.size), 0)

    def ancestors(self, leaves: Tensor) -> tuple[Tensor, ...]:
        """Slots of the nodes on the lines of leaves [B, N], [B, N] for every depth: the root first, the leaf last."""
        line = [leaves]
        for layer in self.layers[:0:-1]:
            line.append(layer["parent"].gather(1, line[-1]))
        return tuple(line[::-1])

    def leaf_paths(self, device: torch.device | str | None = None) -> LeafPaths:
        """How the leaves came about: the nodes on their lines, and the steps between, where they are kept.

        Args:
            device: to put all of it on; None leaves states where the tree keeps them.

        Returns:
            A `LeafPaths` of N leaves in every tree, in the order of the Result: a smaller tree repeats its first one.
        """
        ancestors, steps = self.ancestors(self.leaf_slots()), list[PathStep]()
        for level, layer, slots in zip(self.levels, self.layers[1:], ancestors[1:], strict=True):
            if "edge_x" in layer:
                steps += _edge_steps(layer, level, slots, device)
        return LeafPaths(tuple(slots.to(device) for slots in ancestors), tuple(steps))

    def states(self, depth: int, slots: Tensor, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """States of some nodes, with what is cached at them.

        Args:
            depth: of the nodes.
            slots: [B, W].
            device: to put them on; None leaves them where the tree keeps them.

        Returns:
            x [B, W, *event]; but for leaves the prediction x0, and what proposals need there.
        """
        held = {name: column for name, column in self.layers[depth].states.items() if name not in EDGE_COLUMNS}
        return {name: gather(column, slots.to(column.device)).to(device) for name, column in held.items()}

    def nodes_at(self, depth: int, problem: int = 0) -> dict[str, Tensor]:
        """What is known of one tree's nodes of a depth; with `levels` and `states`, all that a report's figure reads.

        Args:
            depth: of the nodes.
            problem: which tree.

        Returns:
            Columns [n]: parent, children, visits, value, and where they are scored predicted_reward or reward.
        """
        layer = self.layers[depth]
        names = ("parent", "children", "visits", "value", "predicted_reward", "reward")
        return {name: layer[name][problem, : layer.count[problem]] for name in names if name in layer}

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of the trees as tensors and facts of JSON's types, for a file; `tree_from` in snapshot.py reads them."""
        facts = {"problems": self.problems, "levels": list(self.levels), "rule": type(self.rule).__name__}
        facts |= {"simulations": self.simulations, "batches": self.batches, "biased_start": self.biased_start}
        tensors = {"normalizer_known": torch.from_numpy(self.normalizer_known)}
        tensors["expansions"] = torch.from_numpy(self.expansions)
        for depth, layer in enumerate(self.layers):
            tensors[f"{depth}.count"] = torch.from_numpy(layer.count)
            tensors |= {f"{depth}.{name}": layer[name] for name in (*layer.facts, *layer.states)}
        facts["bookkeeping"] = [list(layer.facts) for layer in self.layers]
        facts["on_device"] = [[n for n, t in layer.states.items() if t.device.type != "cpu"] for layer in self.layers]
        return tensors, facts

    def to_networkx(self, problem: int = 0) -> networkx.DiGraph:
        """One tree as a networkx graph.

        Args:
            problem: which tree.

        Returns:
            Nodes (depth, slot) with level, visits, value, predicted_reward and reward; edges to children.

        Raises:
            SteerError: networkx is not installed.
        """
        try:
            import networkx
        except ImportError as error:
            raise SteerError("Tree.to_networkx draws on networkx; pip install networkx") from error
        graph = networkx.DiGraph()
        for depth, layer in enumerate(self.layers):
            for slot in range(int(layer.count[problem])):
                known: dict[str, Any] = {"level": self.levels[depth - 1] if depth else -1}
                for name in ("visits", "value", "predicted_reward", "reward"):
                    if name in layer:
                        known[name] = layer[name][problem, slot].item()
                graph.add_node((depth, slot), **known)
                if depth:
                    graph.add_edge((depth - 1, int(layer["parent"][problem, slot])), (depth, slot))
        return graph


def _edge_steps(layer: NodeTable, level: int, slots: Tensor, device: torch.device | str | None) -> Iterator[PathStep]:
    """The steps on the edges that lead to nodes [B, N] of a level, oldest first."""
    x, log_prob, log_behaviour = (layer[name] for name in EDGE_COLUMNS)
    at = slots.to(x.device)
    left, end = gather(x, at).to(device), gather(layer["x"], at).to(device)
    states = [*left.unbind(2), end]  # apart: clean states have another shape than those whose steps remember
    densities = [gather(column, slots).to(device) for column in (log_prob, log_behaviour)]
    first = level - log_prob.shape[2]
    for j in range(log_prob.shape[2]):
        model, drawn_by = (density[:, :, j] for density in densities)
        yield PathStep(first + j, states[j], states[j + 1], model, drawn_by, slots.to(device))
