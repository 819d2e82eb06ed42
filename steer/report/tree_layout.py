"""Which nodes of a tree are drawn, and where."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .run_result import RunResult

LEAVES, NODES = 400, 1500
"""At most this many are drawn of one tree."""


class Drawable(Protocol):
    """What `Result.tree` must offer to be drawn. `search.Tree` does.

    Args:
        levels: The steps at which nodes are kept, for depths 1 to D; depth 0 is the root, depth D the leaves.
    """

    levels: Sequence[int]

    def nodes_at(self, depth: int, problem: int = 0) -> Mapping[str, Tensor]:
        """Columns (n,) of one tree's nodes of a depth: parent (a slot of the depth above), children, visits, value;
        where known `predicted_reward`, of the prediction, and for leaves `reward`."""
        ...

    def states(self, depth: int, slots: Tensor, device: Any = None) -> Mapping[str, Tensor]:
        """States of nodes [B, W]: x [B, W, *event], and but for leaves the prediction x0."""
        ...


@dataclass(frozen=True, eq=False)
class VisibleTree:
    """The part of a tree that is drawn, by depth from the root down, each depth from left to right.

    Args:
        levels: Steps of the depths 1 to D.
        slots: The nodes' places in the tree.
        columns: What is known of the nodes, by name.
        above: Index of each node's parent among those drawn of the depth above.
        place: Where a node is across the figure, 0 to 1.
        weight: Weights of the leaves, where the run has any.
        leaves: How many leaves the whole tree has.
        total: How many nodes the whole tree has.
        best: Index, by depth, of the path to the best leaf.
    """

    levels: tuple[int, ...]
    slots: list[Tensor]
    columns: list[dict[str, list[float]]]
    above: list[list[int]]
    place: list[list[float]]
    weight: list[float] | None
    leaves: int
    total: int
    best: list[int] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """Edges from the root to a leaf."""
        return len(self.levels)

    def nodes(self) -> Iterator[tuple[int, int]]:
        """(depth, index) of every node, from the root down."""
        return ((d, i) for d, slots in enumerate(self.slots) for i in range(len(slots)))

    @property
    def first(self) -> list[int]:
        """Position of each depth's first node in `nodes`."""
        counts = [len(slots) for slots in self.slots]
        return [sum(counts[:d]) for d in range(len(counts))]


def drawable(tree: Any) -> bool:
    """Whether a result's tree offers what a figure needs, and has leaves."""
    offers = all(hasattr(tree, name) for name in ("levels", "nodes_at", "states"))
    return offers and len(tree.nodes_at(len(tree.levels)).get("parent", ())) > 0


def leaf_weights(result: RunResult, problem: int) -> Tensor | None:
    """Weights of a tree's leaves, [n]; None where the result's particles are not its leaves one by one.

    They are not after `take`, or where the tree was grown further.
    """
    reward = result.tree.nodes_at(len(result.tree.levels), problem)["reward"]
    own = result.reward[problem, : len(reward)].cpu()
    return result.log_weight[problem, : len(reward)].exp().cpu() if torch.equal(own, reward.cpu()) else None


def best_slots(tree: Drawable, problem: int) -> list[int]:
    """Slots of the path to the leaf of highest reward, depth 0 first."""
    depth = len(tree.levels)
    path = [int(tree.nodes_at(depth, problem)["reward"].argmax())]
    for d in range(depth, 0, -1):
        path.append(int(tree.nodes_at(d, problem)["parent"][path[-1]]))
    return path[::-1]


def chosen(
    tree: Drawable, problem: int, weight: Tensor | None, leaves: int = LEAVES, nodes: int = NODES
) -> VisibleTree:
    """The part of a tree to draw: its best leaves, and the paths to them.

    Args:
        tree: The trees of all problems.
        problem: Which of them.
        weight: Weights of its leaves, [n], if known. Leaves of largest weight are drawn; of highest reward, where
            weights are unknown or all on one leaf.
        leaves: How many leaves at most.
        nodes: How many nodes at most.

    Returns:
        The nodes and their places. The leaf of highest reward is always among them.
    """
    depth = len(tree.levels)
    columns = [tree.nodes_at(d, problem) for d in range(depth + 1)]
    reward = columns[-1]["reward"].double().cpu()
    graded = weight is not None and int((weight > 0).sum()) > 1
    order = (weight if graded and weight is not None else reward).argsort(descending=True, stable=True)
    best = int(reward.argmax())
    order = torch.cat([torch.tensor([best]), order[order != best]])
    count = min(leaves, len(order))
    while True:
        kept = [order[:count]]
        for d in range(depth, 0, -1):
            kept.append(columns[d]["parent"].cpu()[kept[-1]].unique())
        if count == 1 or sum(map(len, kept)) <= nodes:
            break
        count = max(1, count * 3 // 4)
    return _laid_out(tree, problem, columns, kept[::-1], weight if graded else None)


def _laid_out(
    tree: Drawable, problem: int, columns: list[Mapping[str, Tensor]], kept: list[Tensor], weight: Tensor | None
) -> VisibleTree:
    """Siblings in order of the best reward below them, leaves equally spaced, parents centred over their children."""
    depth = len(tree.levels)
    below = [columns[-1]["reward"].double().cpu()[kept[-1]]]
    for d in range(depth, 0, -1):
        where = torch.searchsorted(kept[d - 1], columns[d]["parent"].cpu()[kept[d]])
        top = torch.full((len(kept[d - 1]),), -math.inf, dtype=torch.float64)
        below.append(top.scatter_reduce_(0, where, below[-1], "amax"))
    peaks = [row.tolist() for row in below[::-1]]
    slots, above = [kept[0]], [[-1]]
    for d in range(1, depth + 1):
        spot = {slot: i for i, slot in enumerate(slots[-1].tolist())}
        parent = [spot[slot] for slot in columns[d]["parent"].cpu()[kept[d]].tolist()]
        ranked = sorted(range(len(parent)), key=lambda i: (parent[i], -peaks[d][i]))
        slots.append(kept[d][ranked])
        above.append([parent[i] for i in ranked])
    place = [[(i + 0.5) / len(slots[-1]) for i in range(len(slots[-1]))]]
    for d in range(depth, 0, -1):
        ends: dict[int, list[float]] = {}
        for owner, x in zip(above[d], place[-1], strict=True):
            ends.setdefault(owner, []).append(x)
        place.append([(ends[i][0] + ends[i][-1]) / 2.0 for i in range(len(slots[d - 1]))])
    path = best_slots(tree, problem)
    return VisibleTree(
        levels=tuple(tree.levels),
        slots=slots,
        columns=[{name: c[name].cpu()[s].tolist() for name in c} for c, s in zip(columns, slots, strict=True)],
        above=above,
        place=place[::-1],
        weight=None if weight is None else weight[slots[-1]].tolist(),
        leaves=len(columns[-1]["parent"]),
        total=sum(len(c["parent"]) for c in columns),
        best=[s.tolist().index(node) for s, node in zip(slots, path, strict=True)],
    )


def clean_states(result: RunResult, depth: int, slots: Tensor, problem: int) -> Tensor:
    """Clean states of nodes: their predictions; of leaves, the samples.

    Args:
        result: A run with a tree.
        depth: Of the nodes.
        slots: Their places in that depth, [W].
        problem: Of which problem.

    Returns:
        [1, W, *event].
    """
    process = result.process
    index = slots.expand(result.reward.shape[0], -1)
    kept = result.tree.states(depth, index, process.device)
    clean = process.complete(kept["x"], kept["x0"]) if "x0" in kept else kept["x"]
    return clean[problem : problem + 1]


def ranked_nodes(tree: VisibleTree, room: int) -> list[tuple[int, int]]:
    """At most `room` nodes on the paths to the best leaves, the best leaf's path first."""
    reward, found = tree.columns[-1]["reward"], dict[tuple[int, int], None]()
    for leaf in sorted(range(len(reward)), key=lambda i: -reward[i]):
        i = leaf
        for d in range(tree.depth, 0, -1):
            if len(found) >= room:
                return list(found)
            found[d, i] = None
            i = tree.above[d][i]
    return list(found)
