"""What a tree begins with: the levels to branch at, what their edges cost, and the tree itself, new or given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

from steer.core.start import PreparedStart, Start
from steer.cost import rows_between
from steer.errors import NotStochasticError, SteerError
from steer.types import ReverseProcess

from .tree import Tree


def rows_per_edge(process: ReverseProcess, levels: Sequence[int]) -> list[int]:
    """Network rows that a simulation spends on each edge: a node's prediction belongs to the edge that made it."""
    ends = [-1, *levels[:-1], process.steps - 1]
    return [rows_between(process, here + 1, there + 1) for here, there in pairwise(ends)]


def expansion_costs(process: ReverseProcess, levels: Sequence[int]) -> tuple[int, ...]:
    """Network rows of expanding a node of each depth: of all edges from there to a new leaf."""
    rows = rows_per_edge(process, levels)
    return tuple(sum(rows[depth:]) for depth in range(len(rows)))


def branching_levels(process: ReverseProcess, levels: int | Sequence[int]) -> tuple[int, ...]:
    """Levels at which nodes are kept, the last one the data, from their number (equally spaced) or themselves.

    A node needs a noisy step behind it, or its children are copies, and a prediction behind it, or they are free.
    """
    if not any(process.stochastic(k) for k in range(process.steps)):
        raise NotStochasticError(
            "the children of a node differ by the noise of its transitions, and this process's add none; use a "
            "stochastic rule, for instance process.with_rule(steer.ddim(eta=1.0))"
        )
    asked = None if isinstance(levels, int) else [int(k) for k in levels]
    chosen = evenly_spaced_levels(process.steps, cast(int, levels)) if asked is None else asked
    rising = sorted({k for k in chosen if 0 <= k <= process.steps - 2})
    edges = zip(rising, [*rising, process.steps][1:], strict=True)
    useful = [k for k, end in edges if any(process.stochastic(j) for j in range(k, end))]
    if asked is not None and asked != useful:
        raise SteerError(
            f"branching levels must rise within [0, {process.steps - 2}], with a step that adds noise after each, got "
            f"{asked}"
        )
    return (*useful, process.steps)


def evenly_spaced_levels(steps: int, count: int) -> list[int]:
    """`count` equally spaced levels strictly between noise and data, without repeats."""
    return sorted({math.floor(steps * (i + 1) / (count + 1) + 0.5) for i in range(count)} - {0, steps})


def check_tree_start(start: Start) -> Start:
    """A start that trees can use; SteerError for one that spends network rows."""
    if isinstance(start, PreparedStart):
        raise SteerError(
            f"a tree draws its roots a few at a time, and {type(start).__name__} spends network rows on each draw; run "
            "the start once and pass a function that hands its particles out, or use steer.prior"
        )
    return start


def new_or_given_tree(tree: Any, problems: int, levels: tuple[int, ...]) -> Tree:
    """New trees, or the given ones, which then must fit."""
    if tree is None:
        return Tree(problems, levels)
    if not isinstance(tree, Tree) or tree.problems != problems or tree.levels[-1] != levels[-1]:
        raise SteerError(
            f"a tree to grow on must be {problems} trees over {levels[-1]} steps (result.tree), got {tree!r}"
        )
    return tree
