"""One call for every method, and several methods at equal budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch

from ..cost import check_counts
from ..errors import SteerError
from ..key import Key, as_key
from ..report.comparison import Comparison, Comparisons, Row
from ..results.result import Result
from ..types import ReverseProcess, Reward, Stop
from .methods import Method, resolve, sample


@overload
def compare(
    process: ReverseProcess,
    reward: Reward,
    *,
    methods: Sequence[str | Method] = ("smc",),
    budget: int = 2000,
    temperature: float = 1.0,
    batch: int = 1,
    key: Key | int = 0,
    keys: int = 5,
    metrics: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    options: dict[str, dict[str, Any]] | None = None,
) -> Comparison[Result]: ...


@overload
def compare(
    process: ReverseProcess,
    reward: Reward,
    *,
    methods: Sequence[str | Method] = ("smc",),
    budget: Sequence[int],
    temperature: float = 1.0,
    batch: int = 1,
    key: Key | int = 0,
    keys: int = 5,
    metrics: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    options: dict[str, dict[str, Any]] | None = None,
) -> Comparisons[Result]: ...


def compare(
    process: ReverseProcess,
    reward: Reward,
    *,
    methods: Sequence[str | Method] = ("smc",),
    budget: int | Sequence[int] = 2000,
    temperature: float = 1.0,
    batch: int = 1,
    key: Key | int = 0,
    keys: int = 5,
    metrics: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    options: dict[str, dict[str, Any]] | None = None,
) -> Comparison[Result] | Comparisons[Result]:
    """Runs methods at equal budget over several keys; unsteered samples and best-of-N are always among them.

    budget:  denoiser rows per problem for every method and key; several budgets give the reward against their cost.
             The same keys at each, so that the noise of a smaller run begins that of a larger one.
    keys:    independent repeats; their spread is the standard error.
    metrics: name -> function of decoded samples (M, ...) to (M,), reported as weighted means: a held-out reward, say.
    options: method name -> that method's own keyword arguments.

    A run stopped by its `on_step` or from the keyboard ends the comparison at the last key that every method has run.
    """
    common: dict[str, Any] = {
        "methods": methods, "temperature": temperature, "batch": batch, "key": key, "keys": keys, "metrics": metrics,
        "options": options,
    }  # fmt: skip
    check_counts(keys=keys)
    if not isinstance(budget, Sequence):
        return _compare(process, reward, budget=budget, **common)
    if not budget:
        raise SteerError("a comparison needs a budget, or several; got an empty sequence")
    done: list[Comparison[Result]] = []
    for rows in sorted(set(budget)):
        try:
            done.append(_compare(process, reward, budget=rows, **common))
        except Stop:
            if not done:
                raise
            return Comparisons(tuple(done), interrupted=True)
        if done[-1].interrupted:
            break
    return Comparisons(tuple(done), interrupted=done[-1].interrupted)


def _compare(
    process: ReverseProcess,
    reward: Reward,
    *,
    methods: Sequence[str | Method],
    budget: int,
    temperature: float,
    batch: int,
    key: Key | int,
    keys: int,
    metrics: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None,
    options: dict[str, dict[str, Any]] | None,
) -> Comparison[Result]:
    """The comparison at one budget."""
    chosen: dict[str, Method] = {}
    for method in ("rollout", "best_of_n", *methods):
        name, function = _named(method), resolve(method)
        if chosen.setdefault(name, function) is not function:
            raise SteerError(f"two of the methods are called {name}, and a table tells them by name; rename one")
    unknown = sorted(set(options or {}) - set(chosen))
    if unknown:
        raise SteerError(f"options are for the methods compared, {', '.join(chosen)}; got {', '.join(unknown)}")
    finished: list[dict[str, Result]] = []
    for i in range(keys):
        runs = _round(
            chosen, options or {}, process=process, reward=reward, budget=budget, temperature=temperature, batch=batch,
            key=as_key(key).fold("compare", i),
        )  # fmt: skip
        if runs is None:
            break
        finished.append(runs)
    if not finished:
        raise Stop("interrupted before every method had run once")
    results = {name: tuple(runs[name] for runs in finished) for name in chosen}
    rows = tuple(_row(name, runs, metrics or {}) for name, runs in results.items())
    return Comparison(budget, len(finished), rows, results, interrupted=len(finished) < keys)


def _named(method: str | Method) -> str:
    """What a method is called in a table: a partial, as the function in it."""
    if isinstance(method, str):
        return method
    return getattr(method, "__name__", None) or getattr(getattr(method, "func", None), "__name__", repr(method))


def _round(methods: dict[str, Method], options: dict[str, dict[str, Any]], **common: Any) -> dict[str, Result] | None:
    """One run of every method on one key; None where one was interrupted, which would not be at equal budget."""
    runs = {}
    for name, method in methods.items():
        runs[name] = sample(method=method, **common, **options.get(name, {}))
        if runs[name].interrupted:
            return None
    return runs


def _row(name: str, runs: Sequence[Result], metrics: dict[str, Callable]) -> Row:
    def over(values: list[float]) -> tuple[float, float]:
        mean = sum(values) / len(values)
        spread = sum((v - mean) ** 2 for v in values)
        return mean, math.sqrt(spread / len(values) / max(1, len(values) - 1)) if len(values) > 1 else math.nan

    def mean(pick: Callable[[Result], float]) -> float:
        return over([pick(run) for run in runs])[0]

    return Row(
        method=name,
        reward=over([run.mean_reward.mean().item() for run in runs]),
        best=over([run.reward.amax(1).mean().item() for run in runs]),
        ess=mean(lambda run: run.ess.mean().item()),
        metrics={label: over([_measured(run, f) for run in runs]) for label, f in metrics.items()},
        nfe=mean(lambda run: run.cost.nfe),
        grads=mean(lambda run: run.cost.grads),
        rewards=mean(lambda run: run.cost.rewards),
        decodes=mean(lambda run: run.cost.decodes),
        seconds=mean(lambda run: run.cost.seconds["total"]),
    )


def _measured(run: Result, f: Callable[[torch.Tensor], torch.Tensor]) -> float:
    return run.mean(lambda x: f(run.process.decode(x[None]))).mean().item()
