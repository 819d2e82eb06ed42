"""What `method="auto"` chose, for the record of its run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodChoice:
    """The method that ran in place of "auto", and why.

    goal:    what was asked for: "best", "population" or "rollouts".
    method:  a name of `steer.methods()`.
    options: of it, as written in a call: 'select="argmax"'; "" for its defaults.
    budget:  network rows per problem that it was given.
    samples: unsteered samples of each problem that were measured first, for rows network rows a problem.
    price:   of a score, in network rows, a power of ten or what the caller gave; 0 where it hardly counts.
    why:     the reason, a sentence without a full stop.
    """

    goal: str
    method: str
    options: str
    budget: int
    samples: int
    rows: int
    price: float
    why: str

    @property
    def call(self) -> str:
        """The method with its options, as one would write it."""
        return f"{self.method}({self.options})"

    def __str__(self) -> str:
        probe = f"after {self.samples} unsteered samples ({self.rows:,} rows)" if self.samples else "without a probe"
        return (
            f"auto chose {self.call} for goal={self.goal!r}, {probe}, with {self.budget:,} network rows a problem. "
            f"{self.why[:1].upper()}{self.why[1:]}."
        )
