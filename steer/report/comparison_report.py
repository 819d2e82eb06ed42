"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_atomically
from . import plots
from .comparison import Comparison, Comparisons
from .page import card, img, number, page, table, whole, with_error
from .run_report import _head

if TYPE_CHECKING:
    from PIL.Image import Image


def write_comparison(
    comparison: Comparison | Comparisons,
    directory: Path,
    *,
    pictures: Mapping[str, Image] | None = None,
    texts: Mapping[str, Sequence[str]] | None = None,
    title: str = "A comparison at equal budget",
    about: Mapping[str, Any] | None = None,
) -> Path:
    """report.html of a comparison: tables with standard errors, a plot of each measure, samples per method.

    Of a comparison at several budgets, each measure against network rows, and every table at the largest budget.
    """
    stages, last = comparison.at, comparison.at[-1]
    picks: list[tuple[str, Any]] = [("mean reward", lambda row: row.reward), ("best reward", lambda row: row.best)]
    picks += [(name, lambda row, name=name: row.metrics[name]) for name in last.rows[0].metrics]
    heads = ["method", *(name for name, _ in picks), "ESS", "network rows", "gradients", "rewards", "seconds"]
    rows = []
    for row in last.rows:
        measured = [with_error(*pick(row)) for _, pick in picks]
        counted = [number(row.ess), *(whole(n) for n in (row.nfe, row.grads, row.rewards)), f"{row.seconds:.2f}"]
        rows.append([row.method, *measured, *counted])
    best = max(last.rows, key=lambda row: row.reward[0])
    lead = (
        f"At {whole(last.budget)} network rows each, <b>{escape(best.method)}</b> reaches the highest mean "
        f"reward, <b>{number(best.reward[0])}</b>; unsteered samples have {number(last.rows[0].reward[0])}."
    )
    note = f'<p class="note">Means over {last.keys} keys ± standard error of the mean.</p>'
    if len(stages) > 1:
        curves = "".join(card(f"{name} against network rows", svg) for name, svg in plots.by_budget(stages, picks))
        grid = "".join(card(name, _by_budget(stages, pick)) for name, pick in picks)
        measures = f'<section><h2>Reward against network rows</h2>{note}<div class="plots">{curves}</div></section>'
        measures += f'<section><h2>At every budget</h2><div class="plots wide">{grid}</div></section>'
        methods = f"<section><h2>At {whole(last.budget)} network rows</h2>{table(heads, rows)}</section>"
    else:
        cards = "".join(card(name, svg) for name, svg in plots.by_method(last, picks))
        measures = f'<section><h2>Measures</h2><div class="plots small">{cards}</div></section>'
        methods = f"<section><h2>Methods</h2>{note}{table(heads, rows)}</section>"
    parts = [measures, methods] if len(stages) > 1 else [methods, measures]
    grids = "".join(card(name, img(image, name)) for name, image in (pictures or {}).items())
    grids += "".join(card(name, f"<p>{escape(', '.join(words))}</p>") for name, words in (texts or {}).items())
    samples = f'<section><h2>Samples of the first key</h2><div class="plots small">{grids}</div></section>'
    body = "".join([_head(title, about or {}, False), f'<p class="lead">{lead}</p>', *parts, samples * bool(grids)])
    facts = {"about": about or {}, **comparison.to_dict()}
    return write_atomically(directory / "report.html", page(title, body, facts))


def _by_budget(stages: Sequence[Comparison], pick: Callable[[Any], tuple[float, float]]) -> str:
    """One measure: a row per method, a column per budget."""
    rows = [
        [method, *(with_error(*pick(stage.rows[i])) for stage in stages)]
        for i, method in enumerate(row.method for row in stages[0].rows)
    ]
    return table(["", *(whole(stage.budget) for stage in stages)], rows)
