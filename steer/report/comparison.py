"""Methods compared: a row per method, and its spread over seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..files import plain
from .compared import Row
from .page import number, whole, with_error
from .remarks import remarks
from .run_result import RunResult

Run = TypeVar("Run", bound=RunResult)
"""What a method returned: `steer.Result` in a comparison that `steer.compare` made."""


@dataclass(frozen=True, eq=False)
class Comparison(Generic[Run]):
    """Methods at equal budget.

    Args:
        budget: NFE per problem that each run could spend, in network rows.
        keys: How many seeds every method was run on; fewer than asked for where `interrupted`.
        rows: One for each method, in the order run.
        results: By method, the runs that did not fail, in the order of their seeds.
        failures: By method and number of the seed, what was raised instead; its `.partial` is what was paid for.
        interrupted: Whether it was stopped early.
    """

    budget: int
    keys: int
    rows: tuple[Row, ...]
    results: dict[str, tuple[Run, ...]]
    failures: dict[str, dict[int, Exception]] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def remarks(self) -> list[str]:
        """Which methods are tied, what the rows are means of, who spent less or failed: sentences."""
        return remarks(self)

    @property
    def at(self) -> tuple[Comparison[Run], ...]:
        """The comparison at each budget, as `Comparisons` has it: this one alone."""
        return (self,)

    def to_dict(self) -> dict[str, Any]:
        """Budget, number of seeds and rows as plain JSON types; NaN and infinities, which JSON lacks, are None."""
        from dataclasses import asdict

        rows = [asdict(row) for row in self.rows]
        return plain({"budget": self.budget, "keys": self.keys, "rows": rows, "remarks": self.remarks})

    def report(self, directory: str | Path, *, count: int = 16, **extra: Any) -> Path:
        """Writes a self-contained report.html: tables with standard errors, a plot of each measure, samples per method.

        Args:
            directory: Where to write; it is made.
            count: Samples to show of each method, of the first seed, drawn by weight.
            **extra: `title`, and `about`, facts for the page's head by name, over those that the runs know.

        Returns:
            The file's path.
        """
        from .comparison_report import write_comparison

        return write_comparison(self, Path(directory), count=count, **extra)

    def __str__(self) -> str:
        names = list(self.rows[0].metrics) if self.rows else []
        heads = ["method", "reward", "best", "over best_of_n"]
        heads += [head for name in names for head in (name, f"{name} of best")]
        table = [[*heads, "ess", "nfe", "grads", "rewards", "seconds"]]
        for row in self.rows:
            own = [measure[name] for name in names for measure in (row.metrics, row.of_best)]
            measured = [with_error(*pair) for pair in (row.reward, row.best, row.gain, *own)]
            counted = [number(row.ess), *map(whole, (row.nfe, row.grads, row.rewards)), number(row.seconds)]
            table.append([row.method, *measured, *counted])
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        return "\n".join([*(line.rstrip() for line in lines), *(f"- {sentence}" for sentence in self.remarks)])


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

    def report(self, directory: str | Path, *, count: int = 16, **extra: Any) -> Path:
        """Writes a self-contained report.html: the measures against NFE, and what `Comparison.report` shows.

        Args, Returns: as `Comparison.report`. Samples are those at the largest budget.
        """
        from .comparison_report import write_comparison

        return write_comparison(self, Path(directory), count=count, **extra)

    def __str__(self) -> str:
        return "\n\n".join(f"budget {comparison.budget}\n{comparison}" for comparison in self.at)
