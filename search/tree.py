"""Search trees over denoising chains: B trees as flat tensors, one layer per branching level.

Nodes of one depth are columns (B, room) that double when they are full; a node is its slot in the layer, and its
parent is a slot in the layer above. Depth 0 is the root, which has no state: its transition is the prior. Depth d >= 1
holds states at level `levels[d - 1]`, the last of them clean leaves. Between branching levels a chain is one edge.
The bookkeeping lives on the host, where it is quicker than kernel launches; states live where they are asked to.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.errors import SteerError
from steer.trajectory import gather

if TYPE_CHECKING:
    import networkx


class Layer:
    """The nodes of one depth in every tree: named columns (B, room, ...), of which tree b has filled count[b].

    parent: slot in the layer above.    children, visits: how many, and selections that passed through plus one.
    value: soft value in units of the temperature (dts) or best reward below (dts_star).
    correction: log p / q of the edge from the parent, 0 where children are draws of the model.
    look: r(x0_hat) of the node, where a build asks for it. reward: scores of leaves. x, x0, gradient: states.
    edge, edge_log_prob, edge_log_behaviour: (B, room, steps, ...), steps from the parent here, where they are kept.
    """

    def __init__(self, problems: int):
        self.count = torch.zeros(problems, dtype=torch.int64)
        self.size = 0  # of the largest tree
        self.columns: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """The filled part of a column, (B, most nodes of a tree, ...): a view."""
        return self.columns[name][:, : self.size]

    @property
    def filled(self) -> Tensor:
        """Which slots hold nodes, (B, size)."""
        return torch.arange(self.size) < self.count[:, None]

    def append(self, live: Tensor, **values: Tensor) -> Tensor:
        """New nodes for the columns that are live (B, W), with values (B, W, ...): their slots, (B, W)."""
        first, width = self.size, live.shape[1]
        if bool(live.all()) and int(self.count.min()) == first:  # the common case is a block
            for name, value in values.items():
                self._roomy(name, value, first + width)[:, first : first + width] = value
            self.resize(self.count + width)
            return torch.arange(first, first + width).expand(live.shape)
        slots = self.count[:, None] + live.long().cumsum(1) - 1
        index = live.nonzero(as_tuple=True)
        place = (index[0], slots[index])
        for name, value in values.items():
            kept = self._roomy(name, value, int(slots.max()) + 1)
            kept[tuple(i.to(kept.device) for i in place)] = value[tuple(i.to(value.device) for i in index)]
        self.resize(self.count + live.sum(1))
        return slots

    def resize(self, count: Tensor) -> None:
        """Says how many slots are filled, (B,)."""
        self.count, self.size = count, int(count.max())

    def _roomy(self, name: str, like: Tensor, need: int) -> Tensor:
        column = self.columns.get(name)
        if column is None or column.shape[1] < need:
            room = max(16, 1 << (need - 1).bit_length())
            shape = (like.shape[0], room, *like.shape[2:])
            if column is None:
                self.columns[name] = torch.zeros(shape, dtype=like.dtype, device=like.device)
            else:
                self.columns[name] = column.new_zeros(shape)
                self.columns[name][:, : column.shape[1]] = column
        return self.columns[name]


class ChildLists:
    """Children of every node of one layer, each node's side by side in one pool; full blocks move and double."""

    def __init__(self, problems: int):
        self.start = torch.zeros(problems, 0, dtype=torch.int64)
        self.room = torch.zeros(problems, 0, dtype=torch.int64)
        self.length = torch.zeros(problems, 0, dtype=torch.int64)
        self.pool, self.used = torch.zeros(64, dtype=torch.int64), 0

    def add(self, problem: Tensor, parent: Tensor, child: Tensor, size: int) -> None:
        """Children, flat, appended to their parents' blocks in the order given; size: parents there are."""
        self._widen(size)
        owner, which, more = torch.unique(
            problem * self.start.shape[1] + parent, return_inverse=True, return_counts=True
        )
        start, room, length = self.start.view(-1), self.room.view(-1), self.length.view(-1)
        before = length[owner]
        full = before + more > room[owner]
        if bool(full.any()):
            moved, kept = owner[full], before[full]
            wide = torch.exp2(torch.log2((kept + more[full]).double()).ceil()).long()
            place = self.used + wide.cumsum(0) - wide
            self._reserve(self.used + int(wide.sum()))
            offset = _within(kept)
            self.pool[place.repeat_interleave(kept) + offset] = self.pool[start[moved].repeat_interleave(kept) + offset]
            start[moved], room[moved] = place, wide
        order = which.argsort(stable=True)
        self.pool[(start[owner] + before).repeat_interleave(more) + _within(more)] = child[order]
        length[owner] = before + more

    def add_first(self, problem: Tensor, parent: Tensor, child: Tensor, size: int) -> None:
        """The one child of each of some new parents: what a rollout makes nearly everywhere, without sorting."""
        self._widen(size)
        place = torch.arange(self.used, self.used + len(child))
        self._reserve(self.used + len(child))
        self.pool[place] = child
        for column, value in ((self.start, place), (self.room, 1), (self.length, 1)):
            column[problem, parent] = value

    def of(self, problem: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
        """All children of some nodes (M,): their slots, and which of the nodes each belongs to."""
        length = self.length[problem, node]
        owner = torch.arange(len(node)).repeat_interleave(length)
        return self.pool[self.start[problem, node][owner] + _within(length)], owner

    def _widen(self, size: int) -> None:
        if self.start.shape[1] < size:
            wide = max(16, 1 << (size - 1).bit_length())
            for name in ("start", "room", "length"):
                old = getattr(self, name)
                new = old.new_zeros(old.shape[0], wide)
                new[:, : old.shape[1]] = old
                setattr(self, name, new)

    def _reserve(self, need: int) -> None:
        if need > len(self.pool):
            self.pool = torch.cat([self.pool, self.pool.new_zeros(max(need, 2 * len(self.pool)) - len(self.pool))])
        self.used = need


class Tree:
    """B trees that can be grown further; with a search's meter, one of the two mutable things of a run.

    levels:     levels of the process at which nodes are kept, rising, the last one the data.
    layers:     depth 0 (the roots) to depth D = len(levels) (the leaves).
    iterations: walks made so far in every tree; the next walk's noise has this slot.
    sweeps:     walks are made in sweeps of many; how many of those.
    expansions: walks that ended by expanding a node of depth d, of each tree, (B,) for each d < D.
    """

    def __init__(self, problems: int, levels: tuple[int, ...]):
        self.problems, self.levels = problems, levels
        self.layers = [Layer(problems) for _ in range(len(levels) + 1)]
        self.lists: list[ChildLists] | None = None
        self.iterations = self.sweeps = 0
        self.expansions = [torch.zeros(problems, dtype=torch.int64) for _ in levels]
        self.attach(0, torch.ones(problems, 1, dtype=torch.bool), torch.zeros(problems, 1, dtype=torch.int64))

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
        held = [column for layer in self.layers for column in layer.columns.values()]
        for lists in self.lists or ():
            held += [lists.start, lists.room, lists.length, lists.pool]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def attach(self, depth: int, live: Tensor, parent: Tensor, **columns: Tensor) -> Tensor:
        """New nodes at a depth, (B, W) where live: their slots. They count as children only from `commit` on."""
        zero = torch.zeros(live.shape, dtype=torch.float64)
        columns = {"correction": zero, "value": zero, **columns}
        whole = torch.zeros(live.shape, dtype=torch.int32)
        return self.layers[depth].append(live, parent=parent, children=whole, visits=whole + 1, **columns)

    def commit(self, entry: Tensor, path: list[Tensor]) -> None:
        """Ends a sweep: visits along every walk, and new nodes known to their parents.

        entry: (B, W) depth of the node each walk expanded; `depth` for a walk that came to an old leaf, more for none.
        path:  for each depth the slots (B, W) walked through.
        """
        used, walks = (entry <= self.depth).int(), entry.shape[1]
        for d in range(self.depth):
            above, fresh = self.layers[d], entry <= d
            above["visits"].scatter_add_(1, path[d], used)
            above["children"].scatter_add_(1, path[d], fresh.int())
            self.expansions[d] = self.expansions[d] + (entry == d).sum(1)
            if self.lists is not None:
                for add, which in ((self.lists[d].add, entry == d), (self.lists[d].add_first, entry < d)):
                    if bool(which.any()):
                        problem, column = which.nonzero(as_tuple=True)
                        add(problem, path[d][problem, column], path[d + 1][problem, column], above.size)
        self.iterations, self.sweeps = self.iterations + walks, self.sweeps + 1

    def counts(self) -> list[Tensor]:
        """What `rollback` needs to undo a sweep that did not end."""
        return [layer.count for layer in self.layers]

    def rollback(self, counts: list[Tensor]) -> None:
        """Forgets the nodes attached since `counts`."""
        for layer, count in zip(self.layers, counts, strict=True):
            layer.resize(count)

    def keep_lists(self) -> list[ChildLists]:
        """Child lists, built once from the parents and kept up by `commit` from then on."""
        if self.lists is None:
            self.lists = [ChildLists(self.problems) for _ in self.levels]
            for above, below, lists in zip(self.layers, self.layers[1:], self.lists, strict=False):
                if below.size:
                    problem, slot = below.filled.nonzero(as_tuple=True)
                    lists.add(problem, below["parent"][problem, slot], slot, above.size)
        return self.lists

    def log_share(self, depth: int) -> Tensor:
        """Log of a node's share of its tree, prod 1 / |C| over its ancestors times corrections: (B, size), or -inf.

        Shares of a layer sum to one where there are no corrections.
        """
        share = torch.zeros(self.problems, 1, dtype=torch.float64)
        for above, below in zip(self.layers[:depth], self.layers[1 : depth + 1], strict=True):
            share = (share - above["children"].double().log()).gather(1, below["parent"]) + below["correction"]
        return share.masked_fill(~self.layers[depth].filled, -torch.inf)

    def set_leaf_values(self, potential: Tensor) -> None:
        """Leaf values (B, size): log-potentials r / T for a soft tree, rewards for a greedy one."""
        self.leaves["value"].copy_(potential)

    def backup(self, *, greedy: bool = False) -> Tensor:
        """Recomputes every value from the leaves up by log-mean-exp, or by maximum: values of the roots, (B,)."""
        for above, below in zip(self.layers[-2::-1], self.layers[:0:-1], strict=True):
            value = (below["value"] + below["correction"]).masked_fill(~below.filled, -torch.inf)
            top = torch.full(above["value"].shape, -torch.inf, dtype=torch.float64)
            top.scatter_reduce_(1, below["parent"], value, "amax")
            if not greedy:
                shift = top.masked_fill(top == -torch.inf, 0.0)
                total = torch.zeros_like(top)
                total.scatter_add_(1, below["parent"], (value - shift.gather(1, below["parent"])).exp())
                top = total.log() + shift - above["children"].clamp(min=1).double().log()
            above["value"].copy_(top)
        return self.layers[0]["value"][:, 0].clone()

    def backup_paths(self, entry: Tensor, path: list[Tensor], *, greedy: bool = False) -> None:
        """`backup` of the nodes on walks (B, W) only, in time proportional to their children. Needs child lists."""
        assert self.lists is not None
        for d in range(self.depth - 1, -1, -1):
            above, below = self.layers[d], self.layers[d + 1]
            walks, column = (entry < d).nonzero(as_tuple=True)  # new nodes, of one child
            if len(walks):
                child = path[d + 1][walks, column]
                above["value"][walks, path[d][walks, column]] = (
                    below["value"][walks, child] + below["correction"][walks, child]
                )
            walks, column = ((entry >= d) & (entry <= self.depth)).nonzero(as_tuple=True)
            if len(walks):
                node = torch.unique(walks * above.size + path[d][walks, column])
                problem, node = node // above.size, node % above.size
                child, owner = self.lists[d].of(problem, node)
                value = below["value"][problem[owner], child] + below["correction"][problem[owner], child]
                above["value"][problem, node] = _pool(value, owner, len(node), greedy)

    def states(self, depth: int, slots: Tensor, device: torch.device | None = None) -> dict[str, Tensor]:
        """States, predictions and gradients of nodes (B, W), on a device."""
        columns = self.layers[depth].columns
        kept = {name: columns[name] for name in ("x", "x0", "gradient") if name in columns}
        return {name: gather(column, slots.to(column.device)).to(device) for name, column in kept.items()}

    def nodes_at(self, depth: int, problem: int = 0) -> dict[str, Tensor]:
        """What is known of one tree's nodes of a depth, (n,) each: parent, children, visits, value, and where they are
        scored look or reward. With `levels` and `states`, all that the report's figure reads."""
        layer = self.layers[depth]
        names = ("parent", "children", "visits", "value", "look", "reward")
        return {name: layer[name][problem, : layer.count[problem]] for name in names if name in layer.columns}

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
                    if name in layer.columns:
                        known[name] = layer[name][problem, slot].item()
                graph.add_node((depth, slot), **known)
                if depth:
                    graph.add_edge((depth - 1, int(layer["parent"][problem, slot])), (depth, slot))
        return graph


def _within(length: Tensor) -> Tensor:
    """0, 1, ..., n - 1 for every length n, end to end."""
    total = int(length.sum())
    return torch.arange(total) - (length.cumsum(0) - length).repeat_interleave(length, output_size=total)


def _pool(value: Tensor, owner: Tensor, owners: int, greedy: bool) -> Tensor:
    """Maximum, or log of the mean of exp, of the values of each owner."""
    top = torch.full((owners,), -torch.inf, dtype=torch.float64).scatter_reduce_(0, owner, value, "amax")
    if greedy:
        return top
    shift = top.masked_fill(top == -torch.inf, 0.0)
    total = torch.zeros(owners, dtype=torch.float64).index_add_(0, owner, (value - shift[owner]).exp())
    return total.log() + shift - torch.bincount(owner, minlength=owners).double().log()


def even_levels(steps: int, count: int) -> list[int]:
    """`count` equally spaced levels strictly between noise and data, without repeats."""
    return sorted({math.floor(steps * (i + 1) / (count + 1) + 0.5) for i in range(count)} - {0, steps})
