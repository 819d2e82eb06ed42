"""The rows of a comparison: means over seeds, and differences of methods on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ..report.compared import MeanError, Row
from ..report.remarks import certain
from ..results.result import Result

Metrics = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
Runs = Mapping[int, Result]
"""A method's results by the number of their seed."""

BASELINE = "best_of_n"
_BEST = "best"


def rows_of(
    results: Mapping[str, Runs], failures: Mapping[str, Mapping[int, Exception]], metrics: Metrics, budget: int
) -> tuple[Row, ...]:
    """One row for each method.

    Args:
        results: by method and seed.
        failures: by method and seed, what was raised instead of a result.
        metrics: name -> function of decoded samples [M, ...] to [M].
        budget: NFE per problem that a run could spend.
    """
    measured = {name: {seed: _measured(run, metrics) for seed, run in runs.items()} for name, runs in results.items()}
    best = {name: _column(found, _BEST) for name, found in measured.items()}
    ran = [name for name in results if best[name]]
    first = max(ran, key=lambda name: _mean(list(best[name].values()))[0], default=None)
    return tuple(
        Row(
            method=name,
            mean_of=_mean_of(list(runs.values())),
            reward=_over(measured[name], "reward"),
            best=_over(measured[name], _BEST),
            gain=_paired(best[name], best.get(BASELINE, {})),
            tied=first is not None and bool(best[name]) and not _behind(best[name], best[first]),
            metrics={label: _over(measured[name], label) for label in metrics},
            of_best={label: _over(measured[name], _of_best(label)) for label in metrics},
            of_best_gain={label: _gain(measured, name, _of_best(label)) for label in metrics},
            ess=_average(runs, lambda run: run.ess.mean().item()),
            nfe=_average(runs, lambda run: run.cost.nfe),
            share=_average(runs, lambda run: run.cost.nfe / (budget * len(run))),
            grads=_average(runs, lambda run: run.cost.grads),
            rewards=_average(runs, lambda run: run.cost.rewards),
            decodes=_average(runs, lambda run: run.cost.decodes),
            seconds=_average(runs, lambda run: run.cost.seconds["total"]),
            failed=tuple(f"{type(error).__name__}: {error}" for error in failures.get(name, {}).values()),
        )
        for name, runs in results.items()
    )


def _measured(run: Result, metrics: Metrics) -> dict[str, float]:
    """What the table says of one run: means over its problems."""
    best = run.take(run.reward.argmax(1, keepdim=True))
    found = {"reward": run.mean_reward.mean().item(), _BEST: run.reward.amax(1).mean().item()}
    for label, f in metrics.items():
        found[label] = run.mean(lambda x, f=f: f(run.process.decode(x[None]))).mean().item()
        found[_of_best(label)] = f(best.decoded.clone()).double().mean().item()  # a copy: f may work in place
    return found


def _of_best(label: str) -> str:
    return f"{label} of the best"


def _mean_of(runs: Sequence[Result]) -> str:
    """What the mean reward of a method's runs is a mean of."""
    if not runs:
        return ""
    laws = {run.law for run in runs}
    if laws == {"target"}:
        return "p(x) exp(r(x) / T)"
    if laws == {"model"}:
        return "unsteered samples"
    kept = {int((run.log_weight > -torch.inf).sum(1).max()) for run in runs}
    return f"the best {max(kept)} found" if max(kept) > 1 else "the best one found"


def _column(found: Mapping[int, Mapping[str, float]], measure: str) -> dict[int, float]:
    return {seed: values[measure] for seed, values in found.items()}


def _over(found: Mapping[int, Mapping[str, float]], measure: str) -> MeanError:
    return _mean(list(_column(found, measure).values()))


def _gain(measured: Mapping[str, Mapping[int, Mapping[str, float]]], name: str, measure: str) -> MeanError:
    return _paired(_column(measured[name], measure), _column(measured.get(BASELINE, {}), measure))


def _paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> MeanError:
    """Mean difference on the seeds that both have run, and its standard error."""
    return _mean([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def _behind(ours: Mapping[int, float], first: Mapping[int, float]) -> bool:
    """Whether a method's best samples are known to be worse than the first's, on the seeds that both have run."""
    return certain(_paired(first, ours), len(ours.keys() & first.keys()))


def _mean(values: list[float]) -> MeanError:
    """Mean and its standard error; NaN where there are too few."""
    if not values:
        return math.nan, math.nan
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values)
    return mean, math.sqrt(spread / len(values) / (len(values) - 1)) if len(values) > 1 else math.nan


def _average(runs: Runs, pick: Callable[[Result], float]) -> float:
    return _mean([pick(run) for run in runs.values()])[0]
