"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import plots
from .compared import Compared, Row, Stage
from .page import number, whole, with_error, write_page
from .pictures import Video, is_pictures, sheet
from .remarks import remarks
from .run_report import facts_of, shown
from .run_result import RunResult
from .run_samples import sections

if TYPE_CHECKING:
    from PIL.Image import Image

Measure = Callable[[Row], tuple[float, float]]
"""What a table or plot shows of a method: (mean, standard error)."""


def write_comparison(
    comparison: Compared,
    directory: Path,
    *,
    count: int = 16,
    title: str = "A comparison at equal budget",
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Writes report.html of a comparison: tables with standard errors, a plot of each measure, samples per method.

    Of a comparison at several budgets, each measure against NFE, and every table at the largest budget.

    Args:
        comparison: What `steer.compare` returned.
        directory: Where to write; it is made.
        count: Samples to show of each method, of the first seed at the largest budget, drawn by weight.
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
        samples=_samples(last, count),
    )


def sheets(comparison: Compared, count: int) -> dict[str, Image | Video]:
    """By method, one picture of the samples that the page shows; empty where samples are no pictures.

    Args:
        comparison: What `steer.compare` returned.
        count: How many samples of each method at most.
    """
    decoded = {name: run.take(index).decoded for name, run, index in _shown(comparison.at[-1], count)}
    return {name: sheet(samples) for name, samples in decoded.items() if is_pictures(samples)}


def _shown(stage: Stage, count: int) -> Iterator[tuple[str, RunResult, Tensor]]:
    """Of each method that did not fail on every seed: its name, its first run, and which particles of it to show."""
    for name, runs in stage.results.items():
        if runs:
            yield name, runs[0], shown(runs[0], min(count, runs[0].reward.shape[1]))


def _samples(stage: Stage, count: int) -> list[dict[str, Any]]:
    """The samples of each method, in pictures of one size; empty where they are neither pictures nor texts."""
    found = [{"name": name, "sections": sections(run, None, index)} for name, run, index in _shown(stage, count)]
    panels = [panel for method in found for section in method["sections"] for panel in section["panels"]]
    columns = max((panel["columns"] for panel in panels), default=1)
    for panel in panels:
        panel["columns"] = columns
    return [method for method in found if method["sections"]]


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
