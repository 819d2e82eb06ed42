"""Methods compared: a row per method, and its spread over keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..results.result import Result


@dataclass(frozen=True)
class Row:
    """One method of a comparison: means over keys, with standard errors of those means.

    reward: weighted mean reward. best: highest reward found. metrics: weighted means of the caller's own measures.
    The ledger entries are per run, over all its problems.
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
class Comparison:
    """Methods at equal budget: `rows` in the order run, and every run's Result in `results[method][i]`.

    keys: how many keys every method has run; fewer than asked for where `interrupted`.
    """

    budget: int
    keys: int
    rows: tuple[Row, ...]
    results: dict[str, tuple[Result, ...]]
    interrupted: bool = False

    @property
    def at(self) -> tuple[Comparison, ...]:
        """The comparison at each budget, as of `Comparisons`: this one."""
        return (self,)

    def to_dict(self) -> dict[str, Any]:
        """Budget, number of keys and rows as plain JSON types."""
        from dataclasses import asdict

        return {"budget": self.budget, "keys": self.keys, "rows": [asdict(row) for row in self.rows]}

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
class Comparisons:
    """Methods at several budgets: `at` holds the comparison at each, the smallest budget first."""

    at: tuple[Comparison, ...]
    interrupted: bool = False

    @property
    def keys(self) -> int:
        """Keys that every method has run at every budget."""
        return min(comparison.keys for comparison in self.at)

    def to_dict(self) -> dict[str, Any]:
        """The comparisons as plain JSON types."""
        return {"budgets": [comparison.to_dict() for comparison in self.at]}

    def __str__(self) -> str:
        return "\n\n".join(f"budget {comparison.budget}\n{comparison}" for comparison in self.at)
