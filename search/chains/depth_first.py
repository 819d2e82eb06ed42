"""Depth-first search: a chain that falls behind is noised back and tries again."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from steer.core.event import OnStep
from steer.core.run import Run
from steer.cost import affordable, check_counts
from steer.key import Key
from steer.results.result import Result
from steer.types import ReverseProcess, Reward

from ..budget import split_evenly
from .batched_chains import BestSoFar, Chain, EvaluationRequest, Name, begin, draw, renoise, run_in_lockstep


def depth_first(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    seed: int | None = None,
    threshold: float | Callable[[int], float] | None = None,
    every: int | None = None,
    back: int | None = None,
    keep: int = 1,
    chunk: int = 256,
    on_step: OnStep | None = None,
) -> Result:
    """The best samples of N chains that go back `back` levels where r(x0_hat) is at or below a threshold.

    particles: N independent chains per problem; 1 by default.
    budget:    network rows per problem; default 16 chains' worth. All are used, but for less than one per chain: a
               chain that reaches the data is noised back too, and its best sample is kept.
    threshold: a reward, or a function of the level. None is the value that the chain's best sample so far had at that
               level, so that only those are followed that do better (nothing is given up before the first sample).
    every:     levels between looks at the threshold; K / 4 by default, and never at level 0.
    back:      levels to go back by; K / 2 by default. The paper wants at least K / 4.
    keep:      how many of the N chains' best share the weight. temperature changes nothing.
    chunk, on_step: as `search.rbf`. Stopped early, chains return their best samples, or their predictions.

    Returns x (B, N, *event), reward, log_weight (B, N); log_evidence NaN.
    Cost per problem: budget network rows and as many rewards: every prediction is scored.
    Runs on any process, also deterministic ones: going back is what draws.
    Raises BudgetError, NonFiniteError, RewardError; ShapeError as `search.rbf`.
    Source: Zhang et al. 2025 (2505.23614), depth-first search. Differs: the threshold's default; the budget is used up,
    where the paper stops at the first sample that passes; a chain goes back only where it can still reach the data.
    """
    check_counts(keep=keep, every=every, back=back)
    run = Run.open(
        "depth_first",
        process,
        reward,
        batch=batch,
        temperature=temperature,
        key=key,
        seed=seed,
        on_step=on_step,
        chunk=chunk,
    )
    levels = run.process.steps
    every, back = every or max(1, levels // 4), min(levels, back or max(1, levels // 2))
    rows = run.process.rows
    if budget is None:
        budget = 16 * levels * rows * (particles or 1)
    affordable(levels * rows, particles=particles, budget=budget)
    calls = split_evenly(budget // rows, particles or 1)
    limit = threshold if callable(threshold) or threshold is None else lambda k: float(threshold)

    def chain(run: Run, name: Name) -> Chain:
        return _chain(run, name, len(calls), calls[name[1]], limit, every, back)

    return run_in_lockstep(run, len(calls), chain, keep)


def _chain(
    run: Run, name: Name, count: int, left: int, limit: Callable[[int], float] | None, every: int, back: int
) -> Chain:
    """Chain `slot` of `count`, `left` predictions to spend. The v-th visit to a level has noise slot v count + slot."""
    process, steps, slot = run.process, run.process.steps, name[1]
    visits, returns = [0] * steps, 0
    values: dict[int, float] = {}  # of the path under way, by level
    to_beat: dict[int, float] = {}  # of the best sample's path
    best: BestSoFar | None = None
    x, k = begin(run, name, range(slot, slot + 1)), 0
    shown: BestSoFar | None = None
    while True:  # always left >= steps - k: the data can be reached
        x0, (score,) = yield EvaluationRequest(x, k, best or shown)
        left -= 1
        values[k] = score
        shown = BestSoFar(process.complete(x, x0), score, slot)
        bar = limit(k) if limit is not None else to_beat.get(k, -math.inf)
        target = _noisier(process, max(0, k - back), k)
        if k > 0 and k % every == 0 and score <= bar and left >= steps - target:
            x, k = renoise(run, name, returns * count + slot, x, k, target), target
            returns += 1
            continue
        at = visits[k] * count + slot
        x = draw(run, name, range(at, at + 1), x, x0, k)
        visits[k] += 1
        k += 1
        if k < steps:
            continue
        if process.stochastic(k - 1) or not torch.equal(x, shown.clean):
            _, (score,) = yield EvaluationRequest(x, k, best or shown)
        if best is None or score > best.score:
            best, to_beat = BestSoFar(x, score, slot), dict(values)
        if left == 0:
            return best
        target = _noisier(process, steps - min(back, left), steps)
        x, k, values = renoise(run, name, returns * count + slot, best.clean, steps, target), target, dict(to_beat)
        returns += 1


def _noisier(process: ReverseProcess, target: int, k: int) -> int:
    """The last level up to `target` that is no less noisy than level k: chains that restart do not only get cleaner."""
    visits = process.visits
    while visits[target] > visits[k]:
        target -= 1
    return target
