"""Walks down a tree by its children's scores, with progressive widening: the selection of Algorithm 1, many at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.key import Key

from .growth import Plan, resorted
from .tree import Tree

Score = Callable[[Tree, int, Tensor, Tensor, Tensor], Tensor]
"""(tree, depth of the children, problem, parent, child), flat, to the children's scores."""


@dataclass(frozen=True)
class Descent:
    """How walks choose where to grow.

    score:    ranks the children of a node.
    draw:     choose a child with probability softmax(score); otherwise the best, the second walk of a sweep that meets
              at a node the second best, and so on, so that walks which see the same numbers part.
    widening: (C, alpha): a node is expanded while it has fewer than C N^alpha children, N its visits.
    revisit:  whether a walk may end at an old leaf, at no cost; otherwise the last branching level always expands.
    rows:     network rows of expanding a node of each depth.
    """

    score: Score
    draw: bool
    widening: tuple[float, float]
    revisit: bool
    rows: tuple[int, ...]

    def __call__(self, tree: Tree, walks: int, left: Tensor, key: Key) -> Plan:
        """Walks of one sweep. Visits count as they are made: each walk sees those of the walks before it."""
        tree.keep_lists()
        active = (left >= self.rows[-1])[:, None].expand(-1, walks)
        at = torch.zeros(tree.problems, walks, dtype=torch.int64)
        path = [at.clone() for _ in range(tree.depth + 1)]
        entry = torch.full_like(at, tree.depth + 1)
        left, going = left.clone(), active.clone()
        for depth in range(tree.depth):
            rank, meets = _meetings(at, going)
            childless = tree.layers[depth]["children"].gather(1, at) == 0  # a new root, that all walks expand
            wanted = going & (childless | self._widens(tree, depth, at, rank, meets))
            expands = wanted & (wanted.long().cumsum(1) * self.rows[depth] <= left[:, None])
            left = left - expands.sum(1) * self.rows[depth]
            entry = torch.where(expands, depth, entry)
            going = going & ~expands & ~childless
            if not bool(going.any()):
                break
            rank, _ = _meetings(at, going)
            at = torch.where(going, self._child(tree, depth, at, going, rank, key), at)
            path[depth + 1] = torch.where(going, at, 0)
        return resorted(torch.where(going, tree.depth, entry), path)

    def _widens(self, tree: Tree, depth: int, at: Tensor, rank: Tensor, meets: Tensor) -> Tensor:
        """Which walks find room for a child: |C| + pending < C N^alpha, seen one after another."""
        layer = tree.layers[depth]
        if depth == tree.depth - 1 and not self.revisit:
            return torch.ones_like(at, dtype=torch.bool)
        scale, power = self.widening
        visits = layer["visits"].gather(1, at) + rank
        room = (scale * visits.double() ** power - layer["children"].gather(1, at)).ceil().clamp(min=0.0)
        # One walk adds at most one child, and the room never shrinks, so after walk j of a node its pending children
        # are E_j = min(E_{j-1} + 1, room_j). Unrolled, the number before walk j is a minimum over the walks before it.
        over = torch.where(meets, room[:, None, :] + (rank[:, :, None] - rank[:, None, :]) - 1, torch.inf)
        return torch.minimum(rank.double(), over.amin(2)) < room

    def _child(self, tree: Tree, depth: int, at: Tensor, going: Tensor, rank: Tensor, key: Key) -> Tensor:
        """The child each going walk moves to, (B, W)."""
        lists, size = tree.keep_lists()[depth], tree.layers[depth].size
        problem, column = going.nonzero(as_tuple=True)
        nodes, which = torch.unique(problem * size + at[problem, column], return_inverse=True)
        child, owner = lists.of(nodes // size, nodes % size)
        score = self.score(tree, depth + 1, (nodes // size)[owner], (nodes % size)[owner], child)
        if self.draw:
            uniform = key.fold("select", depth).shifted(slot=tree.iterations).uniform(at.shape)
            chosen = _categorical(score, owner, len(nodes), which, uniform[problem, column])
        else:
            chosen = _ranked(score, owner, len(nodes), which, rank[problem, column])
        return torch.zeros_like(at).index_put((problem, column), child[chosen])


def _meetings(at: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
    """How many earlier walks of the sweep are at the same node, (B, W), and which, (B, W, W): [later, earlier]."""
    walks = at.shape[1]
    earlier = torch.ones(walks, walks, dtype=torch.bool).tril(-1)
    meets = (at[:, :, None] == at[:, None, :]) & going[:, None, :] & earlier
    return meets.sum(2), meets


def _categorical(score: Tensor, owner: Tensor, owners: int, which: Tensor, uniform: Tensor) -> Tensor:
    """For each walk an entry of its owner's, with probability softmax(score) there, by inversion."""
    top = torch.full((owners,), -torch.inf, dtype=torch.float64).scatter_reduce_(0, owner, score, "amax")
    weight = torch.where(
        (top == -torch.inf)[owner], 1.0, (score - top.masked_fill(top == -torch.inf, 0.0)[owner]).exp()
    )
    total = torch.zeros(owners, dtype=torch.float64).index_add_(0, owner, weight)
    cumulative = (weight / total[owner]).cumsum(0)
    length = torch.bincount(owner, minlength=owners)
    first = length.cumsum(0) - length
    below = torch.where(first > 0, cumulative[first - 1], 0.0)
    found = torch.searchsorted(cumulative, below[which] + uniform, right=True)
    return torch.minimum(torch.maximum(found, first[which]), (first + length - 1)[which])


def _ranked(score: Tensor, owner: Tensor, owners: int, which: Tensor, rank: Tensor) -> Tensor:
    """For each walk its owner's entry of that rank, best first, ties in order of birth; ranks wrap around."""
    order = score.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]
    length = torch.bincount(owner, minlength=owners)
    return order[(length.cumsum(0) - length)[which] + rank % length[which]]
