"""The report's figures, as SVG that takes its ink from the page around it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core.population import weighted_mean
from .page import trusted
from .run_result import RunResult

if TYPE_CHECKING:
    from markupsafe import Markup

    from .compared import Stage

STEERED, UNSTEERED, BEST = "#2b8cbe", "#9a9a9a", "#cf6a17"
# Stand-ins while drawing: the page's text and rule colours, which differ between light and dark.
_INK, _RULE = "#010203", "#040506"
_WIDTH = 4.4
_POINTS = 500  # of a line or a scatter plot, at most: more would only make the page larger


def effective_size(result: RunResult) -> str:
    """ESS of the accumulated weights at each weighted step, one line per problem, as a share of N."""
    levels = [seen.k for seen in result.seen]
    shares = torch.stack([seen.ess / seen.score.shape[1] for seen in result.seen]).cpu()
    figure, axes = _figure()
    axes.plot(levels, shares, color=STEERED, lw=1.6, alpha=_faint(shares.shape[1]))
    axes.set(ylim=(0, 1.05), xlabel="step (0 = noise)", ylabel="ESS / N")
    return _svg(figure, "Effective sample size, as a share of the particles, over steps")


def surviving_ancestors(result: RunResult) -> str:
    """How many starting particles still have descendants, step by step, one line per problem."""
    assert result.trajectory is not None
    particles = result.seen[0].score.shape[1]
    counts = result.trajectory.unique_roots()
    levels = [0, *(k for k, _ in counts), result.process.steps]
    lines = torch.stack([torch.full_like(result.trajectory.root[:, 0], particles), *(count for _, count in counts)])
    lines = torch.cat([lines, lines[-1:]]).cpu()
    figure, axes = _figure()
    axes.step(levels, lines, where="post", color=STEERED, lw=1.6, alpha=_faint(lines.shape[1]))
    axes.plot(levels[1:-1], lines[1:-1], "o", color=STEERED, ms=3, alpha=_faint(lines.shape[1]))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(ylim=(0, particles * 1.05), xlabel="step (0 = noise)", ylabel="surviving ancestors")
    return _svg(figure, "Number of starting particles that still have descendants, over steps")


class Course(NamedTuple):
    """Mean and best reward as a run goes on, and what each is of; the last mean is the one that the run reports."""

    rows: list[float]
    mean: list[float]
    best: list[float]
    mean_of: str
    best_of: str


def reward_course(result: RunResult) -> Course:
    """Mean and best reward against NFE.

    Args:
        result: The run. Where it scored predictions, their means; else means of the samples finished so far, as the run
            weights them, or of as many of the best as it selected in the end.
    """
    end = weighted_mean(result.log_weight, result.reward).mean().item()
    if len(result.seen) > 1:
        rows = [_rows_at(result, seen.k, seen.score.shape[1]) for seen in result.seen]
        mean = [_finite(seen.score).mean().item() for seen in result.seen]
        best = [_finite(seen.score).max().item() for seen in result.seen]
        if result.seen[-1].k < result.process.steps:
            rows, mean, best = [*rows, float(result.cost.nfe)], [*mean, end], [*best, result.reward.max().item()]
        rows[-1], mean[-1] = float(result.cost.nfe), end
        return Course(rows, mean, best, "mean, weighted at the end", "best prediction")
    particles = result.reward.shape[1]
    drawn = torch.linspace(0, particles - 1, min(particles, _POINTS)).round().long()
    rows = (result.cost.nfe * (drawn + 1) / particles).tolist()
    scores, weight = result.reward.cpu(), result.log_weight.exp().cpu()
    best = scores.cummax(1).values.mean(0)[drawn].tolist()
    if result.law == "none":
        kept = [max(1, int(row.count_nonzero())) for row in weight]
        mean = [_best_mean(scores[:, : i + 1], kept) for i in drawn.tolist()]
        mean_of = "mean of those selected" if max(kept) > 1 else "the one selected"
    else:
        sums = torch.where(weight > 0.0, weight * scores, 0.0).cumsum(1)
        mean, mean_of = (sums / weight.cumsum(1)).mean(0)[drawn].tolist(), "weighted mean so far"
    return Course(rows, [*mean[:-1], end], best, mean_of, "best so far")


def _best_mean(scores: Tensor, kept: Sequence[int]) -> float:
    """Mean of the highest scores of each problem [B, n], as many as it keeps; averaged over problems."""
    best = [row.topk(min(count, len(row))).values.mean() for row, count in zip(scores, kept, strict=True)]
    return torch.stack(best).mean().item()


def reward_by_rows(result: RunResult, reference: RunResult | None) -> str:
    """Mean and best reward against NFE, to the mean that the run reports."""
    figure, axes = _figure()
    course = reward_course(result)
    axes.plot(course.rows, course.mean, color=STEERED, lw=1.6, label=course.mean_of)
    axes.plot(course.rows[-1:], course.mean[-1:], "o", color=STEERED, ms=5, clip_on=False)
    axes.plot(course.rows, course.best, color=BEST, lw=1.6, label=course.best_of)
    if reference is not None:
        level = _finite(reference.reward).mean().item()
        axes.axhline(level, color=UNSTEERED, lw=1.2, ls=(0, (4, 3)), label="unsteered mean")
    axes.set(xlabel="NFE (network rows)", ylabel="reward", xlim=(0, None))
    _legend(figure, axes)
    return _svg(figure, "Reward against NFE")


def reward_histogram(result: RunResult, reference: RunResult | None) -> str:
    """Rewards of the weighted population, beside those of unsteered samples."""
    figure, axes = _figure()
    groups = [(result, STEERED, "steered")] + ([(reference, UNSTEERED, "unsteered")] if reference else [])
    scores = torch.cat([_finite(run.reward[run.log_weight > -torch.inf]) for run, _, _ in groups])
    low, high = scores.min().item(), scores.max().item()
    edges = torch.linspace(low, high if high > low else low + 1.0, 25)
    for run, colour, label in groups:
        share = run.log_weight.exp().flatten().cpu() / run.reward.shape[0]
        axes.hist(
            run.reward.flatten().cpu(),
            bins=edges,
            weights=share,
            histtype="stepfilled",
            color=colour,
            alpha=0.65,
            label=label,
        )
    axes.set(xlabel="reward", ylabel="share of samples")
    _legend(figure, axes)
    return _svg(figure, "Histogram of rewards, steered and unsteered")


def samples_scatter(result: RunResult, reference: RunResult | None) -> str:
    """Two-dimensional samples, area proportional to weight; of many, those of largest weight."""
    figure, axes = _figure(height=3.9)
    for run, colour, label in [(reference, UNSTEERED, "unsteered"), (result, STEERED, "steered")]:
        if run is not None:
            share = run.log_weight.exp().flatten().cpu()
            shown = share.argsort(descending=True, stable=True)[:_POINTS]
            points, share = run.x.flatten(0, 1).float().cpu()[shown], share[shown]
            area = 18.0 * share / share.max()
            axes.scatter(points[:, 0], points[:, 1], s=area, color=colour, alpha=0.7, lw=0, label=label)
    axes.set(xlabel="x[0]", ylabel="x[1]", aspect="equal")
    axes.set_adjustable("datalim")
    _legend(figure, axes)
    return _svg(figure, "Samples, steered and unsteered")


def coordinate_histograms(result: RunResult, reference: RunResult | None, most: int = 3) -> list[str]:
    """Histograms of the first coordinates of samples that are no pictures."""
    svgs = []
    for i in range(min(most, math.prod(result.x.shape[2:]))):
        figure, axes = _figure()
        for run, colour, label in [(reference, UNSTEERED, "unsteered"), (result, STEERED, "steered")]:
            if run is not None:
                share = run.log_weight.exp().flatten().cpu() / run.reward.shape[0]
                values = run.x.flatten(0, 1).flatten(1)[:, i].float().cpu()
                axes.hist(values, bins=30, weights=share, histtype="stepfilled", color=colour, alpha=0.65, label=label)
        axes.set(xlabel=f"coordinate {i}", ylabel="share of samples")
        _legend(figure, axes)
        svgs.append(_svg(figure, f"Histogram of coordinate {i}"))
    return svgs


def by_method(comparison: Stage, measures: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    """(name, SVG) for each measure (name, Row -> (mean, standard error)): means over seeds, with their errors."""
    names = [row.method for row in comparison.rows]
    places = list(range(len(names)))[::-1]
    svgs = []
    for name, measure in measures:
        figure, axes = _figure(height=0.7 + 0.36 * len(names))
        for place, row in zip(places, comparison.rows, strict=True):
            mean, error = measure(row)
            colour = UNSTEERED if row.method == "rollout" else BEST if row.method == "best_of_n" else STEERED
            bar = 0.0 if math.isnan(error) else error
            axes.errorbar(mean, place, xerr=bar, fmt="o", color=colour, ms=6, capsize=4, elinewidth=1.6)
        axes.set(yticks=places, yticklabels=names, ylim=(-0.6, len(names) - 0.4), xlabel=name)
        axes.grid(axis="x", color=_RULE, lw=0.6, alpha=0.6)
        axes.grid(visible=False, axis="y")
        svgs.append((name, _svg(figure, f"{name} by method, with standard errors")))
    return svgs


def by_budget(stages: Sequence[Stage], measures: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    """(name, SVG) for each measure (name, Row -> (mean, standard error)): a line per method against NFE."""
    svgs = []
    names = [row.method for row in stages[0].rows]
    steered = [name for name in names if name not in ("rollout", "best_of_n")]
    for name, measure in measures:
        figure, axes = _figure(height=2.7 + 0.17 * math.ceil(len(names) / 3))
        for i, method in enumerate(names):
            rows = [stage.rows[i] for stage in stages]
            mean, error = (torch.tensor(column) for column in zip(*map(measure, rows), strict=True))
            # Side by side, a little, so that error bars do not hide one another.
            spent = [row.nfe * (1.0 + 0.012 * (i - (len(names) - 1) / 2.0)) for row in rows]
            colour, style = UNSTEERED, "-"
            if method in steered:
                place = steered.index(method)
                colour, style = _COLOURS[place % len(_COLOURS)], ("-", "--", ":")[place // len(_COLOURS) % 3]
            elif method == "best_of_n":
                colour = BEST
            axes.errorbar(
                spent,
                mean,
                yerr=error.nan_to_num(0.0),
                fmt="o",
                ls=style,
                color=colour,
                ms=3.5,
                lw=1.5,
                capsize=2,
                elinewidth=1.0,
            )
            axes.plot([], [], "o", ls=style, color=colour, ms=3.5, lw=1.5, label=method)
        if stages[-1].budget >= 3 * stages[0].budget:
            axes.set_xscale("log")
        ticks = [max(stage.rows[0].nfe, 1.0) for stage in stages]
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel="NFE (network rows)", ylabel=name)
        figure.legend(loc="outside lower center", ncols=3, **_LEGEND)
        svgs.append((name, _svg(figure, f"{name} against NFE by method, with standard errors")))
    return svgs


_COLOURS = (STEERED, "#2ca25f", "#8856a7", "#c51b8a", "#8c6d31", "#1d4f91")


def _figure(height: float = 2.6) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, in the page's colours."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global list of figures

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_RULE)
    axes.tick_params(color=_RULE, labelcolor=_INK, labelsize=9)
    axes.xaxis.label.set(color=_INK, size=9.5, parse_math=False)  # a caller's name may hold a dollar sign
    axes.yaxis.label.set(color=_INK, size=9.5)
    axes.grid(axis="y", color=_RULE, lw=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    return figure, axes


_LEGEND = {"frameon": False, "fontsize": 9, "labelcolor": _INK}


def _legend(figure: Any, axes: Any) -> None:
    """What each colour is, below the axes, where it hides nothing; where one colour is all there is, nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, **_LEGEND)


def _svg(figure: Any, label: str) -> Markup:
    """The figure as an inline SVG element: text as text, no metadata, no ids that two figures could share."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    # A <style> inside inline SVG would apply to the whole page, and the page chooses the typeface.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="[a-zA-Z][\w.]*_\d+"|font-family: [^;"]*; ?', "", svg)
    svg = svg.replace(_INK, "currentColor").replace(_RULE, "var(--rule)")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    opening = trusted('<svg {} role="img" aria-label="{}">').format(trusted(box[0]), label)
    return opening + trusted(svg[svg.index(">") + 1 :])


def _rows_at(result: RunResult, k: int, particles: int) -> float:
    """NFE spent once the predictions of step k are made, in network rows."""
    per_level = result.reward.shape[0] * particles * result.process.rows
    return min(float((k + 1) * per_level), float(result.cost.nfe))


def _finite(scores: Tensor) -> Tensor:
    """The scores that are numbers (-inf forbids a sample)."""
    found = scores[scores.isfinite()]
    return found.cpu() if found.numel() else torch.zeros(1)


def _faint(lines: int) -> float:
    """Opacity of lines that lie over one another."""
    return 1.0 if lines == 1 else max(0.15, 1.0 / math.sqrt(lines))
