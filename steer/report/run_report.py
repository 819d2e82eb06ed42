"""The page of a run, and its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.diagnostics import surviving_seeds
from ..core.population import weighted_mean
from ..core.resampling import systematic
from ..cost import Cost
from ..errors import ShapeError
from ..files import plain
from ..key import Key, as_key
from ..processes.gaussian import decode_problem
from . import plots
from .best_chain import best_chain, scored
from .page import number, whole, with_error, write_page
from .pictures import Video, is_pictures, thumbnail, to_pictures
from .run_result import RunResult
from .run_samples import problem_names, samples
from .tree_figure import tree_figure
from .tree_layout import LEAVES, NODES, drawable
from .verdict import verdict

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
        By name. `verdict` says in a sentence what the run did. `reward` and each of `metrics` hold weighted means over
        particles and problems, `steered` and `unsteered`, with `error`, the standard error of the unsteered mean;
        `by_problem` has the numbers of each.

    Raises:
        ShapeError: Unsteered samples of another number of problems.
    """
    if reference is not None and len(reference.reward) not in (1, len(result.reward)):
        raise ShapeError(
            f"unsteered samples of {len(result.reward)} problems, or of one, go beside this run, got those of "
            f"{len(reference.reward)}; run steer.rollout on the same process, with the same batch"
        )
    variance = result.log_evidence_variance
    numbers: dict[str, Any] = {
        "verdict": verdict(result, reference),
        "problems": result.reward.shape[0],
        "particles": result.reward.shape[1],
        "interrupted": result.interrupted,
        "temperature": result.temperature,
        "temperature_choice": None if result.temperature_choice is None else asdict(result.temperature_choice),
        "method_choice": None if result.method_choice is None else str(result.method_choice),
        "reward": _measured(result, reference, None) | {"best": result.reward.max()},
        "metrics": {name: _measured(result, reference, f) for name, f in (metrics or {}).items()},
        "ess": result.ess.mean(),
        "log_evidence": result.log_evidence,
        "log_evidence_std": torch.where(variance >= 0, variance, torch.nan).sqrt(),
        "pareto_k": result.pareto_k,
        "unique_roots": surviving_seeds(result.root, result.log_weight).mean(),
        "forbidden": int((result.reward == -torch.inf).sum()),
        "diagnostics": dict(result.diagnostics),
        "by_problem": _numbers_by_problem(result, reference),
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

    Raises:
        ShapeError: As `summary`.

    Cost: ten network rows at most for each problem of a run that kept its states, not counted in the run's cost.
    """
    index = shown(result, min(count, result.reward.shape[1])) if index is None else index
    numbers = summary(result, reference, metrics)
    trees, names = _trees(result), problem_names(result)
    costs = [result.cost] if reference is None else [result.cost, reference.cost, result.cost + reference.cost]
    return write_page(
        "run.html.j2",
        directory,
        title=title,
        about=facts_of(result) | dict(about or {}),
        facts=numbers,
        interrupted=result.interrupted,
        verdict=numbers["verdict"],
        assets=["tree.css", "tree.js"] if trees else [],
        problems=numbers["problems"],
        reward=numbers["reward"],
        metrics=numbers["metrics"],
        cost=numbers["cost"],
        unsteered=numbers["reward"].get("unsteered") is not None and numbers["reward"]["steered"] is not None,
        tiles=_tiles(numbers, _selects(result)),
        samples=samples(result, reference, index),
        names=names,
        prompted=bool(result.process.prompts),
        by_problem=_by_problem(numbers["by_problem"], names),
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


def _numbers_by_problem(result: RunResult, reference: RunResult | None) -> list[dict[str, Any]]:
    """What the run has of each problem: its prompt, where it has one, mean and best reward, ESS and log_evidence."""
    columns: dict[str, Any] = {
        "reward": weighted_mean(result.log_weight, result.reward),
        "best": result.reward.amax(1),
        "ess": result.ess,
        "log_evidence": result.log_evidence,
    }
    if reference is not None:
        columns["unsteered"] = reference.reward.mean(1).expand(len(result.reward))
    prompts = result.process.prompts or [None] * len(result.reward)
    return [
        {"prompt": prompt, **{name: values[b].item() for name, values in columns.items()}}
        for b, prompt in enumerate(prompts)
    ]


def _by_problem(numbers: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any] | None:
    """Heads and rows of the table of several problems, without columns that no problem has; None for a single one."""
    if len(numbers) == 1:
        return None
    heads = {"unsteered": "unsteered", "reward": "mean reward", "best": "best reward", "ess": "ESS"}
    heads |= {"log_evidence": "log normalizing constant"}
    there = [name for name in heads if any(entry.get(name) is not None for entry in numbers)]
    rows = [[name, *(number(own[each]) for each in there)] for name, own in zip(names, numbers, strict=True)]
    return {"heads": ["", *(heads[name] for name in there)], "rows": rows}


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
    return [*rows, ["peak memory", *(_memory(cost.peak_bytes) for cost in costs)]]


def _memory(size: int) -> str:
    """Bytes in the unit that needs few digits: three columns of them stand side by side on a phone."""
    return f"{size / 2**20:.0f} MiB" if size < 1000 * 2**20 else f"{size / 2**30:.1f} GiB"


def _diagnostics(result: RunResult, numbers: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of what the run estimated, and of what tells how far its weights can be trusted."""
    (problems, particles), names = result.reward.shape, problem_names(result)
    yield "temperature T", number(result.temperature)
    if result.temperature_choice is not None:
        yield "how it was chosen", str(result.temperature_choice)
    if result.method_choice is not None:
        yield "method", str(result.method_choice)
    if not _selects(result):
        estimates = zip(numbers["log_evidence"], numbers["log_evidence_std"], strict=True)
        for i, (estimate, error) in enumerate(list(estimates)[:8]):
            name = f"log normalizing constant, {names[i]}" if problems > 1 else "log normalizing constant"
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
    pictures: Sequence[Image | Video | None] = [None] * len(stops)
    if read is not None:
        texts = read(clean)
    else:
        with torch.no_grad():
            decoded = decode_problem(result.process, clean[None], 0)
        if is_pictures(decoded):
            pictures = [thumbnail(picture, 128) for picture in to_pictures(decoded)]
        elif clean[0].numel() <= 4:
            texts = [f"({', '.join(map(number, x.flatten().tolist()))})" for x in clean]
        else:
            return None
    steps, node = result.process.steps, "the value of the tree's node, at the end the reward"
    return {
        "measure": "the reward of that prediction" if scored(result) else node,
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
