"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plots
from .compared import Compared, Row, Stage, remarks
from .page import number, whole, with_error, write_page
from .pictures import Video, is_pictures, sheet
from .run_report import facts_of, shown

if TYPE_CHECKING:
    from PIL.Image import Image

Measure = Callable[[Row], tuple[float, float]]
"""What a table or plot shows of a method: (mean, standard error)."""


def write_comparison(
    comparison: Compared,
    directory: Path,
    *,
    pictures: Mapping[str, Image | Video] | None = None,
    texts: Mapping[str, Sequence[str]] | None = None,
    title: str = "A comparison at equal budget",
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Writes report.html of a comparison: tables with standard errors, a plot of each measure, samples per method.

    Of a comparison at several budgets, each measure against NFE, and every table at the largest budget.

    Args:
        comparison: What `steer.compare` returned.
        directory: Where to write; it is made.
        pictures: By method, one picture of its samples.
        texts: By method, its samples as text.
        title: Of the page.
        about: Facts for its head, by name, over those that the runs know; `command` gets a line of its own.

    Returns:
        The file's path.
    """
    stages, last = comparison.at, comparison.at[-1]
    measures: list[tuple[str, Measure]] = [
        ("mean reward", lambda row: row.reward),
        ("best reward", lambda row: row.best),
    ]
    for name in last.rows[0].metrics:
        measures.append((name, lambda row, name=name: row.metrics[name]))
        measures.append((f"{name} of best", lambda row, name=name: row.of_best[name]))
    columns = [*measures[:2], ("over best-of-N", lambda row: row.gain), *measures[2:]]
    several = len(stages) > 1
    known = {name: fact for name, fact in facts_of(last.results[last.rows[0].method][0]).items() if name != "method"}
    if several:
        figures = [(f"{name} against NFE", svg) for name, svg in plots.by_budget(stages, measures)]
    else:
        figures = plots.by_method(last, measures)
    return write_page(
        "comparison.html.j2",
        directory,
        title=title,
        about=known | dict(about or {}),
        facts=comparison.to_dict(),
        interrupted=comparison.interrupted,
        seeds=last.keys,
        budget=last.budget,
        remarks=[f"{sentence[:1].upper()}{sentence[1:]}." for sentence in remarks(last)],
        heads=["method", *(name for name, _ in columns)],
        rows=[[row.method, *(with_error(*measure(row)) for _, measure in columns)] for row in last.rows],
        cost_heads=["method", "ESS", "NFE", "gradients", "rewards", "decodes", "seconds"],
        costs=[_costs(row) for row in last.rows],
        figures=figures,
        by_budget=[(name, *_by_budget(stages, measure)) for name, measure in measures] if several else [],
        pictures=pictures or {},
        texts=texts or {},
    )


def samples_by_method(comparison: Compared, count: int) -> dict[str, dict[str, Any]]:
    """Samples of the first seed, at the largest budget, drawn by weight, as `write_comparison` takes them.

    Args:
        comparison: What `steer.compare` returned.
        count: How many of each method at most.

    Returns:
        `pictures`, one grid per method, and `texts`; a method whose samples are neither is in none of them.
    """
    found: dict[str, dict[str, Any]] = {"pictures": {}, "texts": {}}
    for name, runs in comparison.at[-1].results.items():
        if not runs:  # it failed on every seed
            continue
        first = runs[0]
        chosen = first.take(shown(first, min(count, first.reward.shape[1])))
        if first.process.text is not None:
            found["texts"][name] = chosen.texts
        elif is_pictures(chosen.decoded):
            found["pictures"][name] = sheet(chosen.decoded)
    return found


def _costs(row: Row) -> list[str]:
    """A method in the table of what a run costs and leaves."""
    counts = (row.nfe, row.grads, row.rewards, row.decodes)
    return [row.method, number(row.ess), *map(whole, counts), number(row.seconds)]


def _by_budget(stages: Sequence[Stage], measure: Measure) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of one measure: a row per method, a column per budget."""
    rows = [
        [row.method, *(with_error(*measure(stage.rows[i])) for stage in stages)] for i, row in enumerate(stages[0].rows)
    ]
    return ["", *(whole(stage.budget) for stage in stages)], rows
