"""Methods compared: a row per method, and its spread over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..files import plain
from .run_result import RunResult

Run = TypeVar("Run", bound=RunResult)
"""What a method returned: `steer.Result` in a comparison that `steer.compare` made."""


@dataclass(frozen=True)
class Row:
    """One method of a comparison: means over seeds, as (mean, standard error of that mean).

    Args:
        method: Its name.
        reward: Weighted mean reward.
        best: Highest reward found.
        ess: Effective sample size.
        metrics: Weighted means of the caller's own measures, by name.
        nfe, grads, rewards, decodes, seconds: The cost of one run, over all its problems. nfe in network rows.
    """

    method: str
    reward: tuple[float, float]
    best: tuple[float, float]
    ess: float
    metrics: dict[str, tuple[float, float]]
    nfe: float
    grads: float
    rewards: float
    decodes: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Comparison(Generic[Run]):
    """Methods at equal budget.

    Args:
        budget: NFE per problem that each run could spend, in network rows.
        keys: How many seeds every method has run; fewer than asked for where `interrupted`.
        rows: One for each method, in the order run.
        results: By method, the run of each seed.
        interrupted: Whether it was stopped early.
    """

    budget: int
    keys: int
    rows: tuple[Row, ...]
    results: dict[str, tuple[Run, ...]]
    interrupted: bool = False

    @property
    def at(self) -> tuple[Comparison[Run], ...]:
        """The comparison at each budget, as `Comparisons` has it: this one alone."""
        return (self,)

    def to_dict(self) -> dict[str, Any]:
        """Budget, number of seeds and rows as plain JSON types; NaN and infinities, which JSON lacks, are None."""
        from dataclasses import asdict

        return plain({"budget": self.budget, "keys": self.keys, "rows": [asdict(row) for row in self.rows]})

    def __str__(self) -> str:
        names = list(self.rows[0].metrics) if self.rows else []
        heads = ["method", "reward", "best", *names, "ess", "nfe", "grads", "rewards", "seconds"]
        table = [heads]
        for row in self.rows:
            measured = (row.reward, row.best, *(row.metrics[name] for name in names))
            counted = (
                f"{row.ess:.1f}",
                f"{row.nfe:.0f}",
                f"{row.grads:.0f}",
                f"{row.rewards:.0f}",
                f"{row.seconds:.2f}",
            )
            table.append([row.method, *(f"{mean:.3f} ± {error:.3f}" for mean, error in measured), *counted])
        widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True, eq=False)
class Comparisons(Generic[Run]):
    """Methods at several budgets.

    Args:
        at: The comparison at each budget, the smallest first.
        interrupted: Whether it was stopped early; the budgets finished until then are there.
    """

    at: tuple[Comparison[Run], ...]
    interrupted: bool = False

    @property
    def keys(self) -> int:
        """Seeds that every method has run at every budget."""
        return min(comparison.keys for comparison in self.at)

    def to_dict(self) -> dict[str, Any]:
        """The comparisons as plain JSON types."""
        return {"budgets": [comparison.to_dict() for comparison in self.at]}

    def __str__(self) -> str:
        return "\n\n".join(f"budget {comparison.budget}\n{comparison}" for comparison in self.at)
