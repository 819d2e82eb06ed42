"""Depth-first search: a chain whose prediction scores too low is noised back and tries again."""

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
from .batched_chains import BestSoFar, Chain, ChainId, EvaluationRequest, begin, draw, renoise, run_in_lockstep


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
    """The best samples of N chains, each noised back wherever its prediction scores at or below a threshold.

        for each chain, until its budget is spent:
            predict x0_hat at level k
            if k is a level to test at, and r(x0_hat) <= threshold(k):    noise back by `back` levels
            else:                                                         step to level k + 1
            at the data:    keep the sample if it is the best so far, and noise the best back by `back` levels

    Args:
        process: the model as a reverse process; its weights are not changed.
        reward: samples [M, ...] to scores [M], in any unit. Higher is better, -inf forbids a sample.
        batch: B, independent problems; a process conditioned on prompts or labels has its own number.
        particles: N independent chains per problem, 1 by default.
        budget: network rows (NFE x batch rows) per problem; by default what 16 samples per chain cost. All are used, up
            to less than one per chain: a chain that reaches the data is noised back too, and its best sample is kept.
        temperature: accepted as by every method, in units of the reward; changes nothing.
        key: names all noise of the run, an integer or a `Key`.
        seed: the same as `key`, by its usual name; give one of them.
        threshold: a reward, or a function of the level. None is the value that the chain's best sample so far had at
            that level, so that only paths are followed that do better (none is given up before the first sample).
        every: levels between tests against the threshold, K / 4 by default; level 0 is never tested.
        back: levels to go back by, K / 2 by default. The paper wants at least K / 4.
        keep: how many of the N chains' samples, the best, share the weight.
        chunk: states evaluated at once.
        on_step: called after every network call with an `Event` for each problem whose chains it moved: the states
            about to be valued next, at the noisiest level of them; as `x0` and `scores`, what their chains would return
            now. Raising `Stop`, or Ctrl-C, ends the search with every chain's best sample, or its prediction.

    Returns:
        Result with x [B, N, *event], reward [B, N], and log_weight [B, N]: equal weights on the `keep` best, zero on
        the rest. `law` is "none", log_evidence [B] is NaN.

    Raises:
        BudgetError: where the budget does not pay for one sample per chain.
        NonFiniteError: where a reward is NaN or +inf.
        RewardError: where the reward raises, or returns something that is not one number per sample.
        ShapeError: where the reward returns another shape, `batch` does not fit the process, or a denoiser conditioned
            on several problems cannot be asked about one (see `GaussianProcess.only`). Each error of a run under way
            has in `.partial` what its chains would return, a Result, or before that their starting states, a
            Trajectory.

    Cost: per problem `budget` network rows and as many rewards: every prediction is scored. It runs on deterministic
        processes too: going back draws noise.
    Source: Zhang et al. 2025 (2505.23614), depth-first search.
    Differs: the threshold's default; the budget is used up, where the paper stops at the first sample that passes; a
        chain goes back only where it can still reach the data.
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

    def chain(run: Run, chain_id: ChainId) -> Chain:
        return _depth_first_chain(run, chain_id, len(calls), calls[chain_id.slot], limit, every, back)

    return run_in_lockstep(run, len(calls), chain, keep)


def _depth_first_chain(
    run: Run, chain_id: ChainId, count: int, left: int, limit: Callable[[int], float] | None, every: int, back: int
) -> Chain:
    """One of `count` chains, with `left` predictions to spend. Its v-th visit to a level has noise slot v count + slot.

    limit: the threshold by level; None for the values of the chain's best sample. every, back: as `depth_first`.
    """
    process, steps, slot = run.process, run.process.steps, chain_id.slot
    visits, returns = [0] * steps, 0
    values: dict[int, float] = {}  # by level, of the path under way
    to_beat: dict[int, float] = {}  # by level, of the best sample's path
    best: BestSoFar | None = None
    predicted: BestSoFar | None = None
    x, k = begin(run, chain_id, range(slot, slot + 1)), 0
    while True:  # always left >= steps - k: the data can be reached
        x0, (score,) = yield EvaluationRequest(x, k, best or predicted)
        left -= 1
        values[k] = score
        predicted = BestSoFar(process.complete(x, x0), score, slot)
        threshold = limit(k) if limit is not None else to_beat.get(k, -math.inf)
        target = _no_cleaner(process, max(0, k - back), k)
        if k > 0 and k % every == 0 and score <= threshold and left >= steps - target:
            x, k = renoise(run, chain_id, returns * count + slot, x, k, target), target
            returns += 1
            continue
        visit = visits[k] * count + slot
        x = draw(run, chain_id, range(visit, visit + 1), x, x0, k)
        visits[k] += 1
        k += 1
        if k < steps:
            continue
        if process.stochastic(k - 1) or not torch.equal(x, predicted.clean):
            _, (score,) = yield EvaluationRequest(x, k, best or predicted)
        if best is None or score > best.score:
            best, to_beat = BestSoFar(x, score, slot), dict(values)
        if left == 0:
            return best
        target = _no_cleaner(process, steps - min(back, left), steps)
        x = renoise(run, chain_id, returns * count + slot, best.clean, steps, target)
        k, values = target, dict(to_beat)
        returns += 1


def _no_cleaner(process: ReverseProcess, target: int, k: int) -> int:
    """The last level up to `target` that is at least as noisy as level k: restarts make chains noisier on the way."""
    visits = process.visits
    while visits[target] > visits[k]:
        target -= 1
    return target
