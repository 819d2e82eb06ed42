"""Reports of a run and of a comparison: one HTML file each, with everything inside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import plots
from .images import enlarged, is_images, to_images
from .key import as_key
from .page import card, img, number, page, table, whole, with_error
from .resampling import systematic
from .saving import plain, write_atomically
from .weights import weighted_mean

if TYPE_CHECKING:
    from PIL.Image import Image

    from .cost import Cost
    from .result import Result
    from .sample import Comparison

Metrics = Mapping[str, Callable[[Tensor], Tensor]]
"""Name -> function of decoded samples (M, ...) to (M,): measures the run was not steered by."""


def shown(result: Result, count: int, key: Any = 0) -> Tensor:
    """Which particles to show, (B, count): drawn by weight, in order of falling reward."""
    index = systematic(result.log_weight, as_key(key).fold("draw"), count)
    order = result.reward.gather(1, index).argsort(dim=1, descending=True, stable=True)
    return index.gather(1, order)


def summary(result: Result, reference: Result | None = None, metrics: Metrics | None = None) -> dict[str, Any]:
    """The numbers of a run as plain JSON types: rewards and metrics, unsteered ones beside them, and the ledger.

    reward and metrics: weighted means over particles and problems. error: standard error of the unsteered mean.
    """
    variance = result.log_evidence_variance
    numbers: dict[str, Any] = {
        "problems": result.reward.shape[0],
        "particles": result.reward.shape[1],
        "interrupted": result.interrupted,
        "temperature": result.temperature,
        "reward": _measured(result, reference, None) | {"best": result.reward.max()},
        "metrics": {name: _measured(result, reference, f) for name, f in (metrics or {}).items()},
        "ess": result.ess.mean(),
        "log_evidence": result.log_evidence,
        "log_evidence_std": torch.where(variance >= 0, variance, torch.nan).sqrt(),
        "cost": result.cost.to_dict(),
        "reference_cost": reference.cost.to_dict() if reference else None,
    }
    return plain(numbers)


def write_report(
    result: Result,
    directory: Path,
    *,
    reference: Result | None = None,
    metrics: Metrics | None = None,
    index: Tensor | None = None,
    count: int = 16,
    title: str = "A steered run",
    about: Mapping[str, Any] | None = None,
) -> Path:
    """report.html in the directory: samples beside unsteered ones, reward, diagnostics over steps, the ledger.

    reference: unsteered samples of the same process and reward.
    metrics:   name -> function of decoded samples (M, ...) to (M,), such as a held-out judge.
    index:     which particles to show (B, M); by default `count` drawn by weight.
    about:     facts for the head of the page: model, reward, method, seed, command.
    """
    index = shown(result, min(count, result.reward.shape[1])) if index is None else index
    numbers = summary(result, reference, metrics)
    body = "".join(
        [
            _head(title, about or {}, result.interrupted),
            _headline(numbers),
            _samples(result, reference, index),
            _figures(result, reference),
            '<section><h2>Ledger</h2><div class="plots">',
            _ledger(result.cost, reference.cost if reference else None),
            _law(result, numbers),
            "</div></section>",
        ]
    )
    return write_atomically(directory / "report.html", page(title, body, {"about": about or {}, **numbers}))


def write_comparison(
    comparison: Comparison,
    directory: Path,
    *,
    pictures: Mapping[str, Image] | None = None,
    title: str = "A comparison at equal budget",
    about: Mapping[str, Any] | None = None,
) -> Path:
    """report.html of a comparison: the table with standard errors, a plot of each measure, a picture per method."""
    names = list(comparison.rows[0].metrics)
    picks: list[tuple[str, Any]] = [("mean reward", lambda row: row.reward), ("best reward", lambda row: row.best)]
    picks += [(name, lambda row, name=name: row.metrics[name]) for name in names]
    heads = ["method", *(name for name, _ in picks), "ESS", "network rows", "gradients", "rewards", "seconds"]
    rows = []
    for row in comparison.rows:
        measured = [with_error(*pick(row)) for _, pick in picks]
        counted = [number(row.ess), *(whole(n) for n in (row.nfe, row.grads, row.rewards)), f"{row.seconds:.2f}"]
        rows.append([row.method, *measured, *counted])
    best = max(comparison.rows, key=lambda row: row.reward[0])
    lead = (
        f"At {whole(comparison.budget)} network rows each, <b>{escape(best.method)}</b> reaches the highest mean "
        f"reward, <b>{number(best.reward[0])}</b>; unsteered samples have {number(comparison.rows[0].reward[0])}."
    )
    cards = "".join(card(name, svg) for name, svg in plots.by_method(comparison, picks))
    grids = "".join(card(name, img(image, name)) for name, image in (pictures or {}).items())
    body = "".join(
        [
            _head(title, about or {}, False),
            f'<p class="lead">{lead}</p>',
            f'<section><h2>Methods</h2><p class="note">Means over {comparison.keys} keys ± standard error of the mean.'
            f"</p>{table(heads, rows)}</section>",
            f'<section><h2>Measures</h2><div class="plots small">{cards}</div></section>',
            f'<section><h2>Samples of the first key</h2><div class="plots small">{grids}</div></section>' * bool(grids),
        ]
    )
    facts = {"about": about or {}, **comparison.to_dict()}
    return write_atomically(directory / "report.html", page(title, body, facts))


def _measured(result: Result, reference: Result | None, f: Callable[[Tensor], Tensor] | None) -> dict[str, Any]:
    def values(run: Result) -> Tensor:
        if f is None:
            return run.reward
        with torch.no_grad():
            return torch.as_tensor(f(run.decoded)).to(run.reward).view(run.reward.shape)

    steered = weighted_mean(result.log_weight, values(result)).mean()
    if reference is None:
        return {"steered": steered}
    plain_values = values(reference)
    error = plain_values.std() / math.sqrt(plain_values.numel()) if plain_values.numel() > 1 else math.nan
    return {"steered": steered, "unsteered": plain_values.mean(), "error": error}


def _head(title: str, about: Mapping[str, Any], interrupted: bool) -> str:
    facts = {**about, "date": datetime.now().strftime("%Y-%m-%d %H:%M")}
    chips = "".join(
        f"<li><span>{escape(str(name))}</span>{escape(str(fact))}</li>"
        for name, fact in facts.items()
        if fact is not None and name != "command"
    )
    stopped = '<p class="stopped">Stopped early: what was paid for until then is shown.</p>' if interrupted else ""
    command = f"<pre>{escape(str(about['command']))}</pre>" if "command" in about else ""
    return f"<header><h1>{escape(title)}</h1><ul class=chips>{chips}</ul>{command}{stopped}</header>"


def _headline(numbers: dict[str, Any]) -> str:
    reward, cost = numbers["reward"], numbers["cost"]
    tiles = [_tile("mean reward", reward)]
    tiles += [_tile(name, measured) for name, measured in numbers["metrics"].items()]
    tiles.append(_tile("effective sample size", {"steered": numbers["ess"]}, f"of {whole(numbers['particles'])}"))
    spent = f"{cost['seconds'].get('total', 0.0):.1f} s, {whole(cost['rewards'])} rewards"
    tiles.append(f'<div class="tile"><span>network rows</span><b>{whole(cost["nfe"])}</b><small>{spent}</small></div>')
    if reward.get("unsteered") is not None and reward["steered"] is not None:
        verb = "rose" if reward["steered"] >= reward["unsteered"] else "fell"
        lead = (
            f"Mean reward {verb} from {number(reward['unsteered'])} to <b>{number(reward['steered'])}</b>"
            f" for {whole(cost['nfe'])} network rows."
        )
        for name, measured in numbers["metrics"].items():
            before, after = number(measured["unsteered"]), number(measured["steered"])
            lead += f" {escape(name[:1].upper() + name[1:])} went from {before} to <b>{after}</b>."
    else:
        lead = f"Mean reward <b>{number(reward['steered'])}</b> for {whole(cost['nfe'])} network rows."
    return f'<p class="lead">{lead}</p><div class="tiles">{"".join(tiles)}</div>'


def _tile(name: str, measured: dict[str, Any], note: str = "") -> str:
    if "unsteered" in measured:
        note = f"unsteered {with_error(measured['unsteered'], measured['error'])}"
    value = number(measured["steered"])
    return f'<div class="tile"><span>{escape(name)}</span><b>{value}</b><small>{escape(note)}</small></div>'


def _samples(result: Result, reference: Result | None, index: Tensor) -> str:
    chosen = result.take(index)
    if getattr(result.process, "text", None) is not None:
        return _texts(chosen, reference)
    if not is_images(chosen.decoded):
        if math.prod(result.x.shape[2:]) == 2:
            figures = [("unsteered and steered", plots.samples_scatter(result, reference))]
        else:
            svgs = plots.coordinate_histograms(result, reference)
            figures = [(f"coordinate {i}", svg) for i, svg in enumerate(svgs)]
        cards = "".join(card(name, svg) for name, svg in figures)
        return f'<section><h2>Samples</h2><div class="plots">{cards}</div></section>'
    pairs = zip(index.flatten().tolist(), chosen.root.flatten().tolist(), strict=True)
    notes = [f"particle {particle}, from noise {root}" for particle, root in pairs]
    panels = [_panel("Steered", chosen, notes)]
    if reference is not None:
        # Those that began from the noise of the steered run's own first particles.
        first = torch.arange(min(index.shape[1], reference.reward.shape[1]), device=index.device)
        first = first.expand(index.shape[0], -1)
        order = reference.reward.gather(1, first).argsort(dim=1, descending=True, stable=True)
        panels.insert(0, _panel("Unsteered", reference.take(order), None))
    return (
        '<section><h2>Samples</h2><p class="note">Steered samples are drawn by weight, so a picture may come twice. '
        "Both groups: best reward first; the number is the reward.</p>"
        f'<div class="pair">{"".join(panels)}</div></section>'
    )


def _texts(chosen: Result, reference: Result | None) -> str:
    """Samples of a process over tokens as text, best first."""
    runs = [("steered", chosen)]
    if reference is not None:
        count = min(chosen.reward.shape[1], reference.reward.shape[1])
        first = torch.arange(count, device=reference.root.device).expand(len(reference.root), -1)
        runs.insert(0, ("unsteered", reference.take(first)))
    cards = []
    for name, run in runs:
        best = run.take(run.ranked())
        pairs = zip(best.texts, best.reward.flatten().tolist(), strict=True)
        cards.append(card(name, table(["sample", "reward"], [[text, number(score)] for text, score in pairs])))
    return f'<section><h2>Samples</h2><div class="plots">{"".join(cards)}</div></section>'


def _panel(name: str, run: Result, notes: list[str] | None) -> str:
    scores = run.reward.flatten().tolist()
    cells = [
        f'<figure title="{escape(note)}">{img(_thumbnail(image), f"{name} sample, reward {score:.3g}")}'
        f"<figcaption>{number(score)}</figcaption></figure>"
        for image, score, note in zip(to_images(run.decoded), scores, notes or [""] * len(scores), strict=True)
    ]
    columns = min(8, math.ceil(math.sqrt(len(cells))))
    return (
        f'<div class="panel {name.lower()}"><h3>{name}</h3>'
        f'<div class="grid" style="--columns:{columns}">{"".join(cells)}</div></div>'
    )


def _thumbnail(image: Image, most: int = 256) -> Image:
    image = image.copy()
    image.thumbnail((most, most))  # shrinks only
    return enlarged(image, 64)


def _figures(result: Result, reference: Result | None) -> str:
    cards = [
        ("Reward against cost", plots.reward_by_rows(result, reference)),
        ("Rewards of the samples", plots.reward_histogram(result, reference)),
    ]
    if len(result.seen) > 1:
        cards.append(("Effective sample size", plots.effective_size(result)))
        if result.trajectory is not None:
            cards.append(("Unique ancestors", plots.unique_ancestors(result)))
    figures = "".join(card(name, svg) for name, svg in cards)
    return f'<section><h2>Diagnostics</h2><div class="plots">{figures}</div></section>'


def _ledger(cost: Cost, reference: Cost | None) -> str:
    runs = [cost] if reference is None else [cost, reference, cost + reference]
    counts = [("network rows", "nfe"), ("rows differentiated", "grads"), ("rewards", "rewards"), ("decoded", "decodes")]
    rows = [[label, *(whole(getattr(run, name)) for run in runs)] for label, name in counts]
    rows += [[f"seconds, {kind}", *(f"{run.seconds.get(kind, 0.0):.2f}" for run in runs)] for kind in cost.seconds]
    rows.append(["peak memory", *(f"{run.peak_bytes / 2**20:,.0f} MiB" for run in runs)])
    heads = ["", "this run", "unsteered", "together"][: len(runs) + 1]
    return card("what was spent", table(heads, rows))


def _law(result: Result, numbers: dict[str, Any]) -> str:
    """The estimate of the normaliser, where the method makes one."""
    pairs = zip(numbers["log_evidence"], numbers["log_evidence_std"], strict=True)
    found = [with_error(z, s) for z, s in pairs if z is not None]
    if not found:
        return ""
    rows = [["temperature T", number(result.temperature)]]
    rows += [["Pareto k̂ of the weights", number(k)] for k in plain(result.pareto_k[:1]) if k is not None]
    rows += [[name.replace("_", " "), number(value.mean().item())] for name, value in result.diagnostics.items()]
    rows += [[f"problem {i}" if len(found) > 1 else "log evidence", text] for i, text in enumerate(found[:8])]
    note = (
        '<p class="note">log E<sub>p</sub>[exp(r(x) / T)] in nats. For a log-probability at T = 1: the log of how '
        "common such samples are under the model alone.</p>"
    )
    return card("evidence", note + table(["", ""], rows))
