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

from ..core.population import weighted_mean
from ..core.resampling import systematic
from ..files import plain, write_atomically
from ..key import as_key
from ..processes.gaussian import decoded_alone
from . import plots
from .best_chain import best_path
from .images import enlarged, is_images, to_images
from .page import card, img, number, page, table, whole, with_error
from .tree_assets import SCRIPT, STYLE
from .tree_figure import tree_figure
from .tree_layout import LEAVES, NODES, drawable

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..cost import Cost
    from ..results.result import Result

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
        "pareto_k": result.pareto_k,
        "unique_roots": _unique_roots(result),
        "forbidden": int((result.reward == -torch.inf).sum()),
        "diagnostics": dict(result.diagnostics),
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
    """report.html in the directory: samples beside unsteered ones, the way to the best one, the search tree, reward,
    diagnostics over steps, the ledger.

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
            _headline(numbers, _searched(result)),
            _samples(result, reference, index),
            _way(result),
            _trees(result),
            _figures(result, reference),
            '<section><h2>Account</h2><div class="plots">',
            _ledger(result.cost, reference.cost if reference else None),
            _known(result, numbers),
            "</div></section>",
        ]
    )
    facts = {"about": about or {}, **numbers}
    style, script = (STYLE, SCRIPT) if '<div class="tree">' in body else ("", "")
    return write_atomically(directory / "report.html", page(title, body, facts, style=style, script=script))


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


def _headline(numbers: dict[str, Any], searched: bool) -> str:
    reward, cost = numbers["reward"], numbers["cost"]
    tiles = [_tile("mean reward", reward)]
    tiles += [_tile(name, measured) for name, measured in numbers["metrics"].items()]
    if searched:
        tiles.append(_tile("best reward", {"steered": reward["best"]}, f"of {whole(numbers['particles'])}"))
    else:
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
    if result.process.text is not None:
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


def _known(result: Result, numbers: dict[str, Any]) -> str:
    """What the run knows of itself: the estimate of the normaliser, and how far its weights can be trusted."""
    problems, particles = result.reward.shape
    rows = [["temperature T", number(result.temperature)]]
    note = "A search: it weighs what it chose equally and claims no law, so it has no evidence, ESS or Pareto k̂."
    if not _searched(result):
        note = (
            "log E<sub>p</sub>[exp(r(x) / T)] in nats. For a log-probability at T = 1: the log of how common such "
            "samples are under the model alone."
        )
        pairs = list(zip(numbers["log_evidence"], numbers["log_evidence_std"], strict=True))
        for i, (z, s) in enumerate(pairs[:8]):
            name = f"log evidence, problem {i}" if problems > 1 else "log evidence"
            rows.append([name, "unknown: the start's normaliser is" if z is None else with_error(z, s)])
        rows.append(["effective sample size", f"{number(numbers['ess'])} of {whole(particles)}"])
        tails = [k for k in numbers["pareto_k"] if k is not None]
        if tails:
            doubt = ": too heavy a tail to trust" if max(tails) > 0.7 else ""
            rows.append(["Pareto k̂ of the weights" + ", worst" * (len(tails) > 1), number(max(tails)) + doubt])
    rows.append(["starting noises they descend from", number(numbers["unique_roots"])])
    forbidden, total = numbers["forbidden"], result.reward.numel()
    rows.append(["forbidden samples", f"{whole(forbidden)} of {whole(total)}" if forbidden else "none"])
    refused = [int((seen.score == -torch.inf).sum()) for seen in result.seen[:-1]]
    if any(refused):
        scored = sum(seen.score.numel() for seen in result.seen[:-1])
        rows.append(["forbidden on the way", f"{whole(sum(refused))} of {whole(scored)} predictions"])
    for name, value in result.diagnostics.items():
        doubt = ": the chains have not mixed" if name == "split_rhat" and bool((value > 1.1).any()) else ""
        rows.append([_DIAGNOSTICS.get(name, name.replace("_", " ")), number(value.mean().item()) + doubt])
    return card("what the run knows of itself", f'<p class="note">{note}</p>{table(["", ""], rows)}')


_DIAGNOSTICS = {"split_rhat": "split R̂ of the start", "acceptance": "acceptance of the start"}


def _searched(result: Result) -> bool:
    """Whether the method chose samples and claims no law: it has no evidence, and no population carried weights."""
    return result.trajectory is None and bool(result.log_evidence.isnan().all())


def _unique_roots(result: Result) -> float:
    """Distinct starting noises among the samples of positive weight, a mean over problems."""
    counts = [len(root[w > -torch.inf].unique()) for root, w in zip(result.root, result.log_weight, strict=True)]
    return sum(counts) / len(counts)


def _way(result: Result) -> str:
    """The way to the best sample of the first problem: pictures or texts of its predictions."""
    stops = best_path(result)
    if len(stops) < 2:
        return ""
    read = result.process.text
    clean = torch.stack([stop.clean for stop in stops])
    if read is not None:
        shown_as = [f"<span>{escape(word)}</span>" for word in read(clean)]
    else:
        with torch.no_grad():
            decoded = decoded_alone(result.process, clean[None], 0)
        if is_images(decoded):
            shown_as = [img(_thumbnail(image, 128), "prediction") for image in to_images(decoded)]
        elif clean[0].numel() <= 4:
            shown_as = [f"<span>({', '.join(map(number, x.flatten().tolist()))})</span>" for x in clean]
        else:
            return ""
    steps = result.process.steps
    figures = "".join(
        f"<figure>{content}<figcaption>{'data' if stop.level == steps else f'level {stop.level}'}"
        f"<b>{number(stop.value)}</b></figcaption></figure>"
        for content, stop in zip(shown_as, stops, strict=True)
    )
    scored = result.tree is None or "look" in result.tree.nodes_at(1)
    worth = "the reward of that prediction" if scored else "the value of the tree's node, at the end the reward"
    whose = " of the first problem" if result.reward.shape[0] > 1 else ""
    return (
        f'<section><h2>How the best sample came about</h2><p class="note">What the model predicts on the way{whose}, '
        f'and {worth}.</p><div class="strip">{figures}</div></section>'
    )


def _trees(result: Result) -> str:
    """The search tree of every problem, four at most; all but the first are folded."""
    if result.tree is None or not drawable(result.tree):
        return ""
    count = min(4, result.reward.shape[0])
    parts = [tree_figure(result, b, leaves=LEAVES // count, nodes=NODES // count) for b in range(count)]
    folded = [
        f"<details{' open' * (b == 0)}><summary>problem {b}</summary>{part}</details>" for b, part in enumerate(parts)
    ]
    return f"<section><h2>Search tree</h2>{''.join(folded) if count > 1 else parts[0]}</section>"
