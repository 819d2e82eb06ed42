"""The page of a run, and its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.diagnostics import surviving_seeds
from ..core.population import weighted_mean
from ..core.resampling import systematic
from ..cost import Cost
from ..files import plain
from ..key import Key, as_key
from ..processes.gaussian import decode_problem
from . import plots
from .best_chain import best_chain
from .images import enlarged, is_images, to_images
from .page import number, whole, with_error, write_page
from .run_result import RunResult
from .tree_figure import tree_figure
from .tree_layout import LEAVES, NODES, drawable

if TYPE_CHECKING:
    from PIL.Image import Image

Metrics = Mapping[str, Callable[[Tensor], Tensor]]
"""Name -> function of decoded samples [M, ...] to [M]: measures the run was not steered by."""

_DIAGNOSTICS = {"split_rhat": "split R̂ of the start", "acceptance": "acceptance of the start"}
_TREES = 4  # drawn of one run, at most


def shown(result: RunResult, count: int, key: Key | int = 0) -> Tensor:
    """Which particles to show: drawn by weight, in order of falling reward.

    Args:
        result: Of B problems.
        count: How many of each problem.
        key: Seed of the draw.

    Returns:
        Particle indices, [B, count].
    """
    index = systematic(result.log_weight, as_key(key).fold("draw"), count)
    order = result.reward.gather(1, index).argsort(dim=1, descending=True, stable=True)
    return index.gather(1, order)


def summary(result: RunResult, reference: RunResult | None = None, metrics: Metrics | None = None) -> dict[str, Any]:
    """The numbers of a run as plain JSON types: rewards and metrics, with unsteered ones beside them, and the cost.

    Args:
        result: The run.
        reference: Unsteered samples of the same process and reward.
        metrics: Name -> function of decoded samples [M, ...] to [M].

    Returns:
        By name. `reward` and each of `metrics` hold weighted means over particles and problems, `steered` and
        `unsteered`, with `error`, the standard error of the unsteered mean.
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
        "unique_roots": surviving_seeds(result.root, result.log_weight).mean(),
        "forbidden": int((result.reward == -torch.inf).sum()),
        "diagnostics": dict(result.diagnostics),
        "cost": result.cost.to_dict(),
        "reference_cost": reference.cost.to_dict() if reference else None,
    }
    return plain(numbers)


def facts_of(result: RunResult) -> dict[str, Any]:
    """What a run knows of itself, for the head of its page: method, reward and its unit, temperature, seed, prompt.

    Args:
        result: The run. Prompts of several problems stand above their samples, and not here.
    """
    prompts = result.process.prompts or ()
    return {
        "method": result.made_by.method or None,
        "reward": result.made_by.reward,
        "unit": result.made_by.unit,
        "temperature": result.temperature,
        "seed": result.key.seed,
        "prompt": prompts[0] if len(prompts) == 1 else None,
    }


def write_report(
    result: RunResult,
    directory: Path,
    *,
    reference: RunResult | None = None,
    metrics: Metrics | None = None,
    index: Tensor | None = None,
    count: int = 16,
    title: str = "A steered run",
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Writes report.html: samples beside unsteered ones, how the best came about, the search tree, plots, the cost.

    Args:
        result: The run, of B problems.
        directory: Where to write; it is made.
        reference: Unsteered samples of the same process and reward.
        metrics: Name -> function of decoded samples [M, ...] to [M], such as a held-out judge.
        index: Which particles to show, [B, M]; by default `count` drawn by weight.
        count: How many to show of each problem.
        title: Of the page.
        about: Facts for its head, by name, over those that the run knows (`facts_of`); `command` gets a line of its
            own.

    Returns:
        The file's path.

    Cost: ten network rows at most for each problem of a run that kept its states, not counted in the run's cost.
    """
    index = shown(result, min(count, result.reward.shape[1])) if index is None else index
    numbers = summary(result, reference, metrics)
    trees = _trees(result)
    costs = [result.cost] if reference is None else [result.cost, reference.cost, result.cost + reference.cost]
    return write_page(
        "run.html.j2",
        directory,
        title=title,
        about=facts_of(result) | dict(about or {}),
        facts=numbers,
        interrupted=result.interrupted,
        assets=["tree.css", "tree.js"] if trees else [],
        problems=numbers["problems"],
        reward=numbers["reward"],
        metrics=numbers["metrics"],
        cost=numbers["cost"],
        unsteered=numbers["reward"].get("unsteered") is not None and numbers["reward"]["steered"] is not None,
        tiles=_tiles(numbers, _selects(result)),
        samples=_samples(result, reference, index),
        chain=_chain(result),
        trees=trees,
        figures=_figures(result, reference),
        cost_heads=["", "this run", "unsteered", "together"][: len(costs) + 1],
        cost_rows=_cost_rows(costs),
        selects=_selects(result),
        diagnostics=list(_diagnostics(result, numbers)),
    )


def _measured(result: RunResult, reference: RunResult | None, f: Callable[[Tensor], Tensor] | None) -> dict[str, Any]:
    """A measure's weighted mean, beside that of unsteered samples; of the reward, where f is None."""

    def values(run: RunResult) -> Tensor:
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


def _selects(result: RunResult) -> bool:
    """Whether the method selects samples without importance weights: nothing was estimated, no population weighted."""
    return result.trajectory is None and bool(result.log_evidence.isnan().all())


def _tiles(numbers: dict[str, Any], selects: bool) -> list[tuple[str, str, str]]:
    """(name, value, note) of the numbers that come first."""
    reward, cost, particles = numbers["reward"], numbers["cost"], whole(numbers["particles"])
    tiles = []
    for name, measured in {"mean reward": reward, **numbers["metrics"]}.items():
        beside = f"unsteered {with_error(measured['unsteered'], measured['error'])}" if "unsteered" in measured else ""
        tiles.append((name, number(measured["steered"]), beside))
    name, value = ("best reward", reward["best"]) if selects else ("effective sample size", numbers["ess"])
    tiles.append((name, number(value), f"of {particles}"))
    spent = f"{cost['seconds'].get('total', 0.0):.1f} s, {whole(cost['rewards'])} rewards"
    return [*tiles, ("NFE", whole(cost["nfe"]), spent)]


def _samples(result: RunResult, reference: RunResult | None, index: Tensor) -> dict[str, Any]:
    """Samples as pictures in `panels`, as `texts`, or where they are neither as `plots`; the others are empty."""
    chosen = result.take(index)
    empty: dict[str, Any] = {"panels": [], "texts": [], "plots": []}
    if result.process.text is not None:
        return empty | {"texts": _texts(chosen, reference)}
    if is_images(chosen.decoded):
        return empty | {"panels": _panels(chosen, reference, index)}
    if math.prod(result.x.shape[2:]) == 2:
        return empty | {"plots": [("unsteered and steered", plots.samples_scatter(result, reference))]}
    svgs = plots.coordinate_histograms(result, reference)
    return empty | {"plots": [(f"coordinate {i}", svg) for i, svg in enumerate(svgs)]}


def _texts(chosen: RunResult, reference: RunResult | None) -> list[tuple[str, list[list[str]]]]:
    """Samples of a process over tokens as text, best first."""
    runs = [("steered", chosen)]
    if reference is not None:
        count = min(chosen.reward.shape[1], reference.reward.shape[1])
        first = torch.arange(count, device=reference.root.device).expand(len(reference.root), -1)
        runs.insert(0, ("unsteered", reference.take(first)))
    groups = []
    for name, run in runs:
        best = run.take(run.ranked())
        pairs = zip(best.texts, best.reward.flatten().tolist(), strict=True)
        groups.append((name, [[text, number(score)] for text, score in pairs]))
    return groups


def _panels(chosen: RunResult, reference: RunResult | None, index: Tensor) -> list[dict[str, Any]]:
    """Pictures of the samples; unsteered ones, those from the seeds of the run's own first particles, come first."""
    pairs = zip(index.flatten().tolist(), chosen.root.flatten().tolist(), strict=True)
    panels = [_panel("Steered", chosen, [f"particle {particle}, from seed {root}" for particle, root in pairs])]
    if reference is not None:
        first = torch.arange(min(index.shape[1], reference.reward.shape[1]), device=index.device)
        first = first.expand(index.shape[0], -1)
        order = reference.reward.gather(1, first).argsort(dim=1, descending=True, stable=True)
        beside = reference.take(order)
        panels.insert(0, _panel("Unsteered", beside, [""] * beside.reward.numel()))
    return panels


def _panel(name: str, run: RunResult, notes: Sequence[str]) -> dict[str, Any]:
    """A group of pictures, each with its reward and what a pointer over it says."""
    scores = run.reward.flatten().tolist()
    cells = [
        (_thumbnail(image), number(score), note)
        for image, score, note in zip(to_images(run.decoded), scores, notes, strict=True)
    ]
    return {"name": name, "columns": min(8, math.ceil(math.sqrt(len(cells)))), "cells": cells}


def _thumbnail(image: Image, most: int = 256) -> Image:
    """The image at a size for a page."""
    image = image.copy()
    image.thumbnail((most, most))  # shrinks only
    return enlarged(image, 64)


def _figures(result: RunResult, reference: RunResult | None) -> list[tuple[str, str]]:
    """(name, SVG) of every plot of the run."""
    figures = [
        ("Reward against NFE", plots.reward_by_rows(result, reference)),
        ("Rewards of the samples", plots.reward_histogram(result, reference)),
    ]
    if len(result.seen) > 1:
        figures.append(("Effective sample size", plots.effective_size(result)))
        if result.trajectory is not None:
            figures.append(("Surviving ancestors", plots.surviving_ancestors(result)))
    return figures


def _cost_rows(costs: Sequence[Cost]) -> list[list[str]]:
    """What was spent, a column for each of the costs."""
    counts = [
        ("NFE (network rows)", "nfe"),
        ("rows differentiated", "grads"),
        ("rewards", "rewards"),
        ("samples decoded", "decodes"),
    ]
    rows = [[label, *(whole(getattr(cost, name)) for cost in costs)] for label, name in counts]
    for kind in costs[0].seconds:
        rows.append([f"seconds, {kind}", *(f"{cost.seconds.get(kind, 0.0):.2f}" for cost in costs)])
    return [*rows, ["peak memory", *(f"{cost.peak_bytes / 2**20:,.0f} MiB" for cost in costs)]]


def _diagnostics(result: RunResult, numbers: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of what the run estimated, and of what tells how far its weights can be trusted."""
    problems, particles = result.reward.shape
    yield "temperature T", number(result.temperature)
    if not _selects(result):
        estimates = zip(numbers["log_evidence"], numbers["log_evidence_std"], strict=True)
        for i, (estimate, error) in enumerate(list(estimates)[:8]):
            name = f"log normalizing constant, problem {i}" if problems > 1 else "log normalizing constant"
            unknown = "unknown: the start has no known normalizing constant"
            alone = "" if error is not None else " (a single run does not tell its error: repeat it)"
            yield name, unknown if estimate is None else with_error(estimate, error) + alone
        yield "effective sample size", f"{number(numbers['ess'])} of {whole(particles)}"
        tails = [k for k in numbers["pareto_k"] if k is not None]
        if tails:
            name = "Pareto k̂ of the weights, worst" if len(tails) > 1 else "Pareto k̂ of the weights"
            doubt = ": too heavy a tail to trust" if max(tails) > 0.7 else ""
            yield name, number(max(tails)) + doubt
    yield "surviving ancestors", number(numbers["unique_roots"])
    forbidden, total = numbers["forbidden"], result.reward.numel()
    yield "forbidden samples", f"{whole(forbidden)} of {whole(total)}" if forbidden else "none"
    refused = sum(int((seen.score == -torch.inf).sum()) for seen in result.seen[:-1])
    if refused:
        scored = sum(seen.score.numel() for seen in result.seen[:-1])
        yield "forbidden predictions", f"{whole(refused)} of {whole(scored)}"
    for name, value in result.diagnostics.items():
        doubt = ": the chains have not mixed" if name == "split_rhat" and bool((value > 1.1).any()) else ""
        yield _DIAGNOSTICS.get(name, name.replace("_", " ")), number(value.mean().item()) + doubt


def _chain(result: RunResult) -> dict[str, Any] | None:
    """How the best sample of the first problem came about; None where that is not known, or cannot be shown."""
    stops = best_chain(result)
    if len(stops) < 2:
        return None
    read = result.process.text
    clean = torch.stack([stop.clean for stop in stops])
    texts: Sequence[str | None] = [None] * len(stops)
    pictures: Sequence[Image | None] = [None] * len(stops)
    if read is not None:
        texts = read(clean)
    else:
        with torch.no_grad():
            decoded = decode_problem(result.process, clean[None], 0)
        if is_images(decoded):
            pictures = [_thumbnail(image, 128) for image in to_images(decoded)]
        elif clean[0].numel() <= 4:
            texts = [f"({', '.join(map(number, x.flatten().tolist()))})" for x in clean]
        else:
            return None
    steps = result.process.steps
    scored = result.tree is None or "predicted_reward" in result.tree.nodes_at(1)
    return {
        "measure": "the reward of that prediction" if scored else "the value of the tree's node, at the end the reward",
        "stops": [
            {
                "name": "data" if stop.level == steps else f"step {stop.level}",
                "value": stop.value,
                "text": text,
                "picture": picture,
            }
            for stop, text, picture in zip(stops, texts, pictures, strict=True)
        ],
    }


def _trees(result: RunResult) -> list[str]:
    """The search trees of the first problems, as HTML."""
    if result.tree is None or not drawable(result.tree):
        return []
    count = min(_TREES, result.reward.shape[0])
    return [tree_figure(result, b, leaves=LEAVES // count, nodes=NODES // count) for b in range(count)]
