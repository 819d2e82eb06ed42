"""Selection by the scores of children, with progressive widening: that of Algorithm 1, for many simulations at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steer.errors import SteerError
from steer.key import Key

from .expansion_plan import ExpansionPlan
from .ragged import Groups, Slots, grouped
from .tree import Tree

Score = Callable[[Tree, int, Slots, Slots, Slots], NDArray[Any]]
"""(tree, depth of the children, problem, parent, child), flat, to the children's scores."""


@dataclass(frozen=True, kw_only=True)
class TreePolicy:
    """Every simulation goes down from the root, child by child, to a node that has room for another child.

    score:    ranks the children of a node.
    draw:     choose a child with probability softmax(score); otherwise the best, the second simulation of a batch that
              meets at a node the second best, and so on, so that simulations which see the same numbers part.
    widening: (C, alpha): a node is expanded while it has fewer than C N^alpha children, N its visits.
    revisit:  whether a simulation may end at an old leaf, at no cost; if not, the last branching level always expands.
    rows:     network rows of expanding a node of each depth.
    """

    score: Score
    draw: bool
    widening: tuple[float, float]
    revisit: bool
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.widening, (tuple, list)) or len(self.widening) != 2:
            raise SteerError(f"widening is two numbers (C, alpha), got {self.widening!r}")
        if not (self.widening[0] > 0.0 and 0.0 < self.widening[1] <= 1.0):
            raise SteerError(
                f"widening is (C, alpha) with C > 0 and 0 < alpha <= 1, got {self.widening}: nodes expand below "
                "C N^alpha children, and a number that does not grow with the visits N ends all growth"
            )

    def __call__(self, tree: Tree, simulations: int, left: Slots, key: Key) -> ExpansionPlan:
        """A plan of one batch. Visits count as they are made: each simulation sees those of the ones before it."""
        key, left = key.shifted(slot=tree.simulations), left.copy()
        expanded = np.full((tree.problems, simulations), tree.depth + 1)
        path = np.zeros((tree.depth + 1, tree.problems, simulations), dtype=np.int64)
        # Simulations under way, flat and in order: of which tree, which of its columns, and at which node.
        problem, column = (left >= self.rows[-1])[:, None].repeat(simulations, 1).nonzero()
        at = np.zeros_like(problem)
        for depth, layer in enumerate(tree.layers[:-1]):
            if not len(at):
                break
            here = layer.places(problem, at)
            childless = layer.flat("children")[here] == 0  # a new root, that all simulations expand
            expands = self._paid(childless | self._widens(tree, depth, here), problem, left, self.rows[depth])
            expanded[problem[expands], column[expands]] = depth
            going = ~(expands | childless)
            problem, column, at = problem[going], column[going], at[going]
            if len(at):
                uniform = None
                if self.draw:
                    uniform = key.fold("select", depth).uniform(expanded.shape).numpy()[problem, column]
                at = self._children(tree, depth, grouped(layer.places(problem, at)), uniform)
                path[depth + 1, problem, column] = at
        if self.revisit:
            expanded[problem, column] = tree.depth
        return ExpansionPlan(expanded, path).in_order()

    def _widens(self, tree: Tree, depth: int, here: Slots) -> NDArray[np.bool_]:
        """Which simulations find room for a child: |C| + pending < C N^alpha, seen one after another."""
        layer = tree.layers[depth]
        if depth == tree.depth - 1 and not self.revisit:
            return np.ones(len(here), dtype=np.bool_)
        scale, power = self.widening
        nodes = grouped(here)
        rank = nodes.rank
        visits = (layer.flat("visits")[here] + rank).astype(np.float64)
        room = np.ceil(scale * visits**power - layer.flat("children")[here]).clip(min=0.0)
        # A simulation adds at most one child, and the room never shrinks, so after simulation j of a node its pending
        # children are E_j = min(E_(j-1) + 1, room_j). Unrolled, E_(j-1) = j + min(0, min_(i<j) room_i - i - 1).
        return rank + _least_before(room - rank - 1.0, nodes) < room

    @staticmethod
    def _paid(wanted: NDArray[np.bool_], problem: Slots, left: Slots, price: int) -> NDArray[np.bool_]:
        """Which simulations find a child and the rows to pay for it, taken from what is left to their tree."""
        asked = np.bincount(problem[wanted], minlength=len(left)) * price
        if (asked > left).any():  # the first ones of each tree get it
            before = np.searchsorted(problem, problem)
            through = np.concatenate([[0], wanted.cumsum()]) * price
            wanted = wanted & (through[1:] - through[before] <= left[problem])
            asked = np.bincount(problem[wanted], minlength=len(left)) * price
        left -= asked
        return wanted

    def _children(self, tree: Tree, depth: int, nodes: Groups, uniform: NDArray[Any] | None) -> Slots:
        """The child that each simulation moves to from the node it is at: drawn by a uniform, or by rank."""
        layer = tree.layers[depth]
        problem, parent = nodes.ids // layer.room, nodes.ids % layer.room
        child, first, length = tree.children(depth, problem, parent)
        score = self.score(tree, depth + 1, problem.repeat(length), parent.repeat(length), child)
        if uniform is None:
            return child[_ranked(score, first, length, nodes.which, nodes.rank)]
        return child[_categorical(score, first, length, nodes.which, uniform)]


def _least_before(value: NDArray[Any], nodes: Groups) -> NDArray[Any]:
    """For each simulation the least value of those before it at its node, or 0 if that is less or there are none."""
    ordered = value[nodes.order]
    # Every node's values are lowered below those of the node before it, so that one running minimum serves all.
    lowered = np.arange(len(nodes.ids)).repeat(nodes.size) * (ordered.max() - ordered.min() + 1.0)
    least = np.empty_like(ordered)
    least[1:] = np.minimum((np.minimum.accumulate(ordered - lowered) + lowered)[:-1], 0.0)
    least[nodes.first] = 0.0
    return nodes.scatter(least)


def _categorical(score: NDArray[Any], first: Slots, length: Slots, which: Slots, uniform: NDArray[Any]) -> Slots:
    """For each simulation an entry of its node's, with probability softmax(score) there, by inversion.

    score: of the entries of all nodes, end to end; first, length: where each node's begin, and how many.
    """
    top = np.maximum.reduceat(score, first)
    all_forbidden = top == -np.inf  # as far as is known: then all alike
    shift = np.where(all_forbidden, 0.0, top).repeat(length)
    weight = np.exp(np.where(all_forbidden.repeat(length), 0.0, score - shift))
    cumulative = (weight / np.add.reduceat(weight, first).repeat(length)).cumsum()
    below = np.where(first > 0, cumulative[first - 1], 0.0)
    found = np.searchsorted(cumulative, below[which] + uniform, side="right")
    return np.minimum(np.maximum(found, first[which]), (first + length - 1)[which])


def _ranked(score: NDArray[Any], first: Slots, length: Slots, which: Slots, rank: Slots) -> Slots:
    """For each simulation its node's entry of that rank, best first, ties in order of birth; ranks wrap around."""
    order = np.lexsort((-score, np.arange(len(length)).repeat(length)))
    return order[first[which] + rank % length[which]]
