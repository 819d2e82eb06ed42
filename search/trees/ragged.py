"""Ragged arrays in numpy: groups of equal entries, and ranges end to end."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]
"""Places of nodes, or of trees, in their columns."""


def each_problem(problems: int) -> Slots:
    """0, 1, ..., B - 1 down axis 0, [B, 1], to go with slots [B, W]."""
    return np.arange(problems)[:, None]


class Groups(NamedTuple):
    """Entries [M] of which some are equal, group by group.

    ids: what each group's entries are. order: positions of the entries, one group after the other, in order within it.
    first, size: where a group begins in `order`, and how many it has.
    """

    ids: Slots
    order: Slots
    first: Slots
    size: Slots

    @property
    def which(self) -> Slots:
        """Each entry's group, [M]."""
        return self.scatter(np.arange(len(self.ids)).repeat(self.size))

    @property
    def rank(self) -> Slots:
        """How many entries of its group come before each entry, [M]."""
        return self.scatter(np.arange(len(self.order)) - self.first.repeat(self.size))

    def scatter(self, ordered: NDArray[Any]) -> NDArray[Any]:
        """Values that stand in `order`, back at their entries."""
        back = np.empty_like(ordered)
        back[self.order] = ordered
        return back


def grouped(ids: Slots) -> Groups:
    """Equal entries of ids [M] side by side."""
    order = ids.argsort(kind="stable")
    ordered = ids[order]
    begins = np.ones(len(ids), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    first = begins.nonzero()[0]
    return Groups(ordered[first], order, first, np.diff(first, append=len(ids)))


def ranges(start: Slots, length: Slots) -> Slots:
    """start, start + 1, ..., start + length - 1 of every range, end to end."""
    end = length.cumsum()
    return np.arange(end[-1] if len(end) else 0) + (start - (end - length)).repeat(length)
