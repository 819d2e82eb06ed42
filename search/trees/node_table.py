"""How trees are stored: the nodes of one depth as columns that double when they are full, and an index of children.

Bookkeeping is numpy on the host: a batch of simulations touches few nodes at a time, and on few rows a numpy call costs
a fifth of a tensor call, which costs less than a kernel launch. States are tensors on the device that is asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .ragged import Slots, each_problem, grouped, ranges

EDGE_COLUMNS = ("edge_x", "edge_log_prob", "edge_log_behaviour")
"""Columns [B, room, steps, ...] of the steps on the edge that leads to a node, where they are kept."""


class NodeTable:
    """The nodes of one depth in every tree: named columns [B, room, ...], of which tree b has filled count[b].

    facts are the bookkeeping, [B, room], on the host; states are tensors. Indexing by name gives a tensor of either.

    parent:               slot in the table above.
    children:             how many.
    visits:               simulations that passed through, plus one.
    value:                of the backup rule of the tree: log E[exp(r / T)] or the best reward below.
    log_importance_ratio: log p / q of the edge from the parent, 0 where children are draws of the model.
    predicted_reward:     r(x0_hat) of the node, where a build asks for it.
    reward:               of leaves.
    x, x0:                states and predictions; gradient, displacement: what proposals need there.
    edge_x, edge_log_prob, edge_log_behaviour: [B, room, steps, ...], the steps from the parent to the node, where they
                          are kept: the states they leave, and log-densities, NaN for steps without noise.
    """

    def __init__(self, problems: int):
        self.room = 0
        types = {"parent": np.int64, "children": np.int32, "visits": np.int32, "value": float}
        types["log_importance_ratio"] = float
        self.facts: dict[str, NDArray[Any]] = {name: np.zeros((problems, 0), dtype) for name, dtype in types.items()}
        self.states: dict[str, Tensor] = {}
        self.resize(np.zeros(problems, dtype=np.int64))

    def __contains__(self, name: str) -> bool:
        return name in self.facts or name in self.states

    def __getitem__(self, name: str) -> Tensor:
        """The filled part of a column, (B, most nodes of a tree, ...): a view."""
        fact = self.facts.get(name)
        return (self.states[name] if fact is None else torch.from_numpy(fact))[:, : self.size]

    @property
    def filled(self) -> Tensor:
        """Which slots hold nodes, [B, size]."""
        return torch.from_numpy(np.arange(self.size) < self.count[:, None])

    def places(self, problem: Slots, slots: Slots) -> Slots:
        """Where nodes stand on the merged axis (B * room), until the table grows."""
        return problem * self.room + slots

    def flat(self, name: str) -> NDArray[Any]:
        """A fact on the merged axis (B * room): a view."""
        return self.facts[name].reshape(-1)

    def append(self, live: NDArray[np.bool_] | None, parent: Slots, **values: float | NDArray[Any] | Tensor) -> Slots:
        """New nodes below parents [B, W], where live [B, W], None for everywhere: their slots, [B, W].

        values: of their columns, [B, W, ...] or one number for all.
        """
        values = {"parent": parent, **values}
        if live is None and self.even:  # the common case is a block
            first, end = self.size, self.size + parent.shape[1]
            self._reserve(end)
            for name, value in values.items():
                self._column(name, value)[:, first:end] = value
            self.count, self.size = self.count + (end - first), end
            return np.arange(first, end)[None].repeat(len(parent), 0)
        live = np.ones(parent.shape, dtype=np.bool_) if live is None else live
        slots = self.count[:, None] + live.cumsum(1) - 1
        self._reserve(int(slots.max()) + 1)
        taken, place = live.reshape(-1).nonzero()[0], self.places(each_problem(len(live)), slots)[live]
        rows = torch.from_numpy(taken), torch.from_numpy(place)
        for name, value in values.items():
            column = self._column(name, value)
            if isinstance(value, Tensor):
                chosen, at = rows[0].to(value.device), rows[1].to(column.device)
                taken_rows = value.flatten(0, 1).index_select(0, chosen)
                column.flatten(0, 1).index_copy_(0, at, taken_rows.to(column.device))
            else:
                column.reshape(-1)[place] = value.reshape(-1)[taken] if isinstance(value, np.ndarray) else value
        self.resize(self.count + live.sum(1))
        return slots

    def resize(self, count: Slots) -> None:
        """Says how many slots are filled, [B]."""
        self.count, self.size = count, int(count.max())
        self.even = int(count.min()) == self.size

    def _column(self, name: str, value: float | NDArray[Any] | Tensor) -> Any:
        column = self.facts.get(name, self.states.get(name))
        if column is not None:
            return column
        assert not isinstance(value, (int, float)), name
        shape = (value.shape[0], self.room, *value.shape[2:])
        if isinstance(value, Tensor):
            self.states[name] = value.new_zeros(shape)
            return self.states[name]
        self.facts[name] = np.zeros(shape, dtype=value.dtype)
        return self.facts[name]

    def _reserve(self, need: int) -> None:
        if need <= self.room:
            return
        old, self.room = self.room, _doubled(need)
        self.facts = {name: _widened(fact, self.room) for name, fact in self.facts.items()}
        for name, state in self.states.items():
            self.states[name] = state.new_zeros((len(state), self.room, *state.shape[2:]))
            self.states[name][:, :old] = state


class ChildIndex:
    """Children of every node of one table, each node's side by side in one pool; full blocks move and double.

    known: how many nodes of the table below are in the index, [B].
    """

    start: Slots
    room: Slots
    length: Slots

    def __init__(self, problems: int):
        self.start, self.room, self.length = np.zeros((3, problems, 0), dtype=np.int64)
        self.pool, self.used = np.zeros(64, dtype=np.int64), 0
        self.known = np.zeros(problems, dtype=np.int64)

    def read(self, below: NodeTable, size: int) -> None:
        """Adds what the table below has gained since it was last read; size: parents there are.

        An index is read when it is asked for, so that deep ones, which few simulations pass through, cost nothing.
        """
        if (self.known == below.count).all():
            return
        since = int(self.known.min())
        slots = np.arange(since, below.size)
        problem, slot = ((slots >= self.known[:, None]) & (slots < below.count[:, None])).nonzero()
        slot += since
        self.add(problem, below.facts["parent"][problem, slot], slot, size)
        self.known = below.count

    def add(self, problem: Slots, parent: Slots, child: Slots, size: int) -> None:
        """Children, flat, appended to their parents' blocks in the order given; size: parents there are."""
        if self.start.shape[1] < size:
            held = (self.start, self.room, self.length)
            self.start, self.room, self.length = (_widened(column, _doubled(size)) for column in held)
        start, room, length = (column.reshape(-1) for column in (self.start, self.room, self.length))
        owners = grouped(problem * self.start.shape[1] + parent)
        owner, more = owners.ids, owners.size
        before = length[owner]
        full = before + more > room[owner]
        if full.any():
            moved, kept = owner[full], before[full]
            wide = 1 << np.ceil(np.log2(kept + more[full])).astype(np.int64)
            place = self.used + wide.cumsum() - wide
            self._reserve(self.used + int(wide.sum()))
            self.pool[ranges(place, kept)] = self.pool[ranges(start[moved], kept)]
            start[moved], room[moved] = place, wide
        self.pool[ranges(start[owner] + before, more)] = child[owners.order]
        length[owner] = before + more

    def of(self, problem: Slots, node: Slots) -> tuple[Slots, Slots, Slots]:
        """All children of some nodes [M], node by node: their slots, where each node's begin, and how many."""
        length = self.length[problem, node]
        return self.pool[ranges(self.start[problem, node], length)], length.cumsum() - length, length

    def _reserve(self, need: int) -> None:
        if need > len(self.pool):
            self.pool = np.concatenate([self.pool, np.zeros(max(need, 2 * len(self.pool)) - len(self.pool), np.int64)])
        self.used = need


def _doubled(need: int) -> int:
    """Room for that many, so that columns seldom grow: a power of two, at least 16."""
    return max(16, 1 << (need - 1).bit_length())


def _widened(column: NDArray[Any], room: int) -> NDArray[Any]:
    """A column [B, n] with room for more."""
    wide = np.zeros((len(column), room), dtype=column.dtype)
    wide[:, : column.shape[1]] = column
    return wide
