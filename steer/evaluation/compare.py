"""One call for every method, and several methods at equal budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import Parameter, signature
from typing import Any, overload

import torch

from ..core.loop import keeping
from ..cost import check_counts
from ..errors import DistributedError, JournalError, SteerError, keep_partial
from ..key import Key, as_key
from ..report.comparison import Comparison, Comparisons
from ..results.result import Result
from ..types import ReverseProcess, Reward, Stop
from .comparison_rows import BASELINE, Metrics, rows_of
from .methods import Method, resolve, sample

Round = dict[str, Result | Exception]
"""What each method made of one seed, by its name."""

UNSTEERED = "rollout"


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
    seed: int | None = None,
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
    seed: int | None = None,
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
    seed: int | None = None,
    keys: int = 5,
    metrics: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    options: dict[str, dict[str, Any]] | None = None,
) -> Comparison[Result] | Comparisons[Result]:
    """Methods at equal budget over several seeds, with unsteered samples and best-of-N always among them.

    Args:
        process: The model.
        reward: Function of samples [M, ...] to [M]; higher is better.
        methods: Names (see `steer.methods()`) or samplers.
        budget: NFE per problem of every method and seed, in network rows, never exceeded. Several budgets give the
            reward against NFE; they use the same seeds, so that a smaller run's noise is the start of a larger one's.
        temperature: > 0; divides rewards.
        batch: Independent problems; a conditioned process fixes it.
        key: Random seed of the whole comparison. All methods share the noise of a repeat.
        seed: The same as `key`; give one of them.
        keys: How many seeds to run: independent repeats, whose spread gives the standard errors.
        metrics: Name -> function of decoded samples [M, ...] to [M], shown as weighted means: a held-out reward, say.
        options: Method name -> that method's own keyword arguments.

    Returns:
        Means and standard errors for each method, with every run's Result; for several budgets, a comparison at each.
        A run stopped by its `on_step` or from the keyboard ends it at the last seed that every method has run.

    Raises:
        SteerError: No budget, two methods of one name, or options for a method that is not compared.
        Stop: It was stopped before every method had run once.
        Whatever a measure or the unsteered run raises, and what ends a program; `.partial` is the comparison of the
            seeds that every method has run, without `metrics`, and of the budgets before; until the first seed is done,
            of the methods that have run it. A method that fails on a seed is a row that says so, and the rest goes on.

    Cost: `keys` times the sum of the budgets, for each method.
    """
    common: dict[str, Any] = {
        "methods": methods,
        "temperature": temperature,
        "batch": batch,
        "key": as_key(key, seed),
        "keys": keys,
        "metrics": metrics,
        "options": options,
    }
    check_counts(keys=keys)
    if not isinstance(budget, Sequence):
        return _compare(process, reward, budget=budget, **common)
    if not budget:
        raise SteerError("a comparison needs one budget or several; got an empty sequence")
    done: list[Comparison[Result]] = []
    for rows in sorted(set(budget)):
        try:
            done.append(_compare(process, reward, budget=rows, **common))
        except BaseException as error:
            last = getattr(error, "partial", None)
            known = (*done, last) if isinstance(last, Comparison) and (last.keys or not done) else tuple(done)
            if isinstance(error, Stop) and done:
                return Comparisons(tuple(done), interrupted=True)
            keep_partial(error, Comparisons(known, interrupted=True) if known else None, instead=True)
            raise
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
    key: Key,
    keys: int,
    metrics: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None,
    options: dict[str, dict[str, Any]] | None,
) -> Comparison[Result]:
    """The comparison at one budget."""
    chosen: dict[str, Method] = {}
    for method in (UNSTEERED, BASELINE, *methods):
        name, function = _named(method), resolve(method)
        if chosen.setdefault(name, function) is not function:
            raise SteerError(f"two of the methods are called {name}, and the table needs distinct names; rename one")
    unknown = sorted(set(options or {}) - set(chosen))
    if unknown:
        raise SteerError(f"options are for the methods compared, {', '.join(chosen)}; got {', '.join(unknown)}")
    for name, own in (options or {}).items():
        _check_options(name, chosen[name], own)
    common: dict[str, Any] = {
        "process": process, "reward": reward, "budget": budget, "temperature": temperature, "batch": batch,
    }  # fmt: skip
    rounds: list[Round] = []  # the last may be under way
    with keeping(lambda: _so_far(rounds, len(chosen), budget)):
        for i in range(keys):
            rounds.append({})
            if not _run_round(rounds[-1], chosen, options or {}, key=key.fold("compare", i), **common):
                break
        finished = [runs for runs in rounds if len(runs) == len(chosen)]
        if not finished:
            raise Stop("interrupted before every method had run once")
        return _compared(finished, budget, metrics or {}, interrupted=len(finished) < keys)


def _so_far(rounds: list[Round], methods: int, budget: int) -> Comparison[Result] | None:
    """The seeds that every method has run; before the first, the methods that have. Without the caller's measures."""
    finished = [runs for runs in rounds if len(runs) == methods]
    known = finished or [runs for runs in rounds[:1] if runs]
    return replace(_compared(known, budget, {}, interrupted=True), keys=len(finished)) if known else None


def _compared(rounds: Sequence[Round], budget: int, metrics: Metrics, interrupted: bool) -> Comparison[Result]:
    """The comparison of rounds in which the same methods ran."""
    results: dict[str, dict[int, Result]] = {name: {} for name in rounds[0]}
    failures: dict[str, dict[int, Exception]] = {}
    for seed, runs in enumerate(rounds):
        for name, run in runs.items():
            if isinstance(run, Result):
                results[name][seed] = run
            else:
                failures.setdefault(name, {})[seed] = run
    rows = rows_of(results, failures, metrics, budget)
    ran = {name: tuple(runs.values()) for name, runs in results.items()}
    return Comparison(budget, len(rounds), rows, ran, failures, interrupted)


def _named(method: str | Method) -> str:
    """Name of a method in the table; a partial has its function's."""
    if isinstance(method, str):
        return method
    return getattr(method, "__name__", None) or getattr(getattr(method, "func", None), "__name__", repr(method))


def _check_options(name: str, method: Method, options: dict[str, Any]) -> None:
    """SteerError where a method does not take an option, or all methods share it, before anything is run."""
    if shared := sorted({"process", "reward", "method", "budget", "temperature", "batch", "key"} & set(options)):
        raise SteerError(f"the {', '.join(shared)} of {name} is that of the whole comparison; give it there, for all")
    known = signature(method).parameters
    unknown = sorted(set(options) - set(known))
    if unknown and not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values()):
        raise SteerError(f"{name} takes no {', '.join(unknown)}; it takes {', '.join(known)}")


def _run_round(runs: Round, methods: dict[str, Method], options: dict[str, dict[str, Any]], **common: Any) -> bool:
    """Fills in a run of every method on one seed; False if one was interrupted, as it did not spend its budget."""
    for name, method in methods.items():
        try:
            run = sample(method=method, **common, **options.get(name, {}))
        except (Stop, DistributedError, JournalError):  # of the whole comparison
            raise
        except Exception as error:
            if name == UNSTEERED:  # then nothing can be compared
                raise
            runs[name] = _without_frames(error)
            continue
        if run.interrupted:
            return False
        runs[name] = run
    return True


def _without_frames(error: Exception) -> Exception:
    """The error without what it refers to on the stack, which would keep the states of its run in memory."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__, link = None, link.__cause__ or link.__context__
    return error
