"""Rollover budget forcing (RBF): a chain steps on as soon as it has improved, and takes its unused calls along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from steer.core.event import OnStep
from steer.core.run import Run
from steer.cost import affordable, check_counts
from steer.errors import NotStochasticError, SteerError
from steer.key import Key
from steer.results.result import Result
from steer.types import ReverseProcess, Reward

from ..budget import prior_is_random, split_evenly
from .batched_chains import BestSoFar, Chain, ChainId, EvaluationRequest, begin, draw, run_in_lockstep


def rbf(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    seed: int | None = None,
    quota: int | None = None,
    initial: int | None = None,
    threshold: Literal["running_max", "current"] = "running_max",
    finish: Literal["prediction", "integration"] = "prediction",
    keep: int = 1,
    chunk: int = 256,
    on_step: OnStep | None = None,
) -> Result:
    """N chains that step on from the first candidate better than all before, and keep the calls they saved for later.

        for k = 0..K - 1, each chain:    left += quota_k
                                         repeat:    x ~ p(x_k | x_(k-1) = kept),  left -= 1       (the prior at k = 0)
                                         until r(x0_hat(x)) > the running maximum, or left = 0
                                         keep the best x of this level

    Args:
        process: the model as a reverse process; its weights are not changed.
        reward: samples [M, ...] to scores [M], in any unit. Higher is better, -inf forbids a sample.
        batch: B, independent problems; a process conditioned on prompts or labels has its own number.
        particles: N chains per problem; 2 with a budget that pays for them, else 1.
        budget: network rows (NFE x batch rows) per problem. All are used, up to less than one prediction per chain.
        temperature: accepted as by every method, in units of the reward; changes nothing.
        key: names all noise of the run, an integer or a `Key`.
        seed: the same as `key`, by its usual name; give one of them.
        quota: candidates per chain and level before any rollover, if no budget is given; 16 by default.
        initial: starting noises per chain, of which the best by r(x0_hat) is kept; None is a level's quota.
        threshold: what a candidate must exceed: "running_max", the chain's highest value so far, or "current", the
            value of the state it steps from.
        finish: "prediction" returns x0_hat of the last level, "integration" draws the last step from there. They are
            the same where the last step is deterministic and exact (DDIM, CPS).
        keep: how many of the N chains' samples, the best, share the weight.
        chunk: states evaluated at once.
        on_step: called after every network call with an `Event` for each problem whose chains it moved: the states
            about to be valued next, at the noisiest level of them; as `x0` and `scores`, what their chains would return
            now. Raising `Stop`, or Ctrl-C, ends the search with every chain's current prediction.

    Returns:
        Result with x [B, N, *event], reward [B, N], and log_weight [B, N]: equal weights on the `keep` best, zero on
        the rest. `law` is "none", log_evidence [B] is NaN.

    Raises:
        NotStochasticError: where the process is deterministic. For a flow, use
            process.with_rule(steer.euler_maruyama(g)), or steer.convert to a variance-preserving path.
        BudgetError: where the budget does not pay for one candidate per level.
        NonFiniteError: where a reward is NaN or +inf.
        RewardError: where the reward raises, or returns something that is not one number per sample.
        ShapeError: where the reward returns another shape, `batch` does not fit the process, or a denoiser conditioned
            on several problems cannot be asked about one (see `GaussianProcess.only`). Each error of a run under way
            has in `.partial` what its chains would return, a Result, or before that their starting states, a
            Trajectory.

    Cost: per problem `budget`, or N (initial + quota (K - 1)) network rows, K = process.steps; as many rewards.
    Source: Kim et al. 2025 (2503.19385), Alg. 2. The paper compares with "the current sample" in words, with the
        running maximum in pseudo-code and code. As in the code, `initial` candidates are tried at the first level (25,
        of 500 calls over 10 steps and 2 chains) and the last level spends all that is left. Its flow runs with
        g = 3 t^2 or a VP path, times sqrt(1 - (1 - t)^2).
    Differs: quotas that do not divide evenly are spread, none is lost.
    """
    for name, given, allowed in (
        ("threshold", threshold, ("running_max", "current")),
        ("finish", finish, ("prediction", "integration")),
    ):
        if given not in allowed:
            raise SteerError(f"{name} must be one of {', '.join(allowed)}, got {given!r}")
    check_counts(keep=keep, quota=quota, initial=initial)
    run = Run.open(
        "rbf",
        process,
        reward,
        batch=batch,
        temperature=temperature,
        key=key,
        seed=seed,
        on_step=on_step,
        chunk=chunk,
    )
    # Whether candidates of level k differ: they are drawn by the prior, or by the step from level k - 1.
    stochastic = [prior_is_random(process), *(process.stochastic(k) for k in range(process.steps - 1))]
    quotas = _quotas(run.process, stochastic, particles, budget, quota, initial)
    count, lower, integrate = len(quotas), threshold == "current", finish == "integration"

    def chain(run: Run, chain_id: ChainId) -> Chain:
        return _rbf_chain(run, chain_id, count, quotas[chain_id.slot], stochastic, lower, integrate)

    return run_in_lockstep(run, count, chain, keep)


def _rbf_chain(
    run: Run,
    chain_id: ChainId,
    count: int,
    quota: Sequence[int],
    stochastic: Sequence[bool],
    lower: bool,
    integrate: bool,
) -> Chain:
    """Algorithm 2 for one of `count` chains; candidate j of a level has noise slot j count + slot.

    quota: candidates per level before any rollover. stochastic: whether those of a level differ. lower: whether the
    value to exceed falls with the state kept. integrate: whether the last step is drawn.
    """
    process, slot = run.process, chain_id.slot
    last = max((k for k, random in enumerate(stochastic) if random), default=0)
    to_exceed, left, root = -math.inf, 0, slot
    kept: tuple[Tensor, Tensor] | None = None  # the state that candidates are drawn from, and its prediction
    held: BestSoFar | None = None
    for k in range(process.steps):
        left += quota[k]
        best: tuple[Tensor, Tensor, float] | None = None  # candidate of this level, its prediction and score
        tries, tried = left if stochastic[k] else 1, 0
        # At the first level and the last nothing rolls over, and candidates are evaluated together.
        stop_at_first_improvement = 0 < k < last
        while tried < tries:
            many = 1 if stop_at_first_improvement else min(tries - tried, run.chunk)
            slots = range(tried * count + slot, (tried + many) * count, count)
            x = begin(run, chain_id, slots) if kept is None else draw(run, chain_id, slots, *kept, k - 1)
            x0, scores = yield EvaluationRequest(x, k, held)
            i = max(range(many), key=scores.__getitem__)  # the first of equals
            if best is None or scores[i] > best[2]:
                best, root = (x[:, i : i + 1], x0[:, i : i + 1], scores[i]), slots[i] if k == 0 else root
                held = BestSoFar(process.complete(*best[:2]), scores[i], root)
            tried, left = tried + many, left - many
            if stop_at_first_improvement and scores[i] > to_exceed:
                break  # what is left rolls over
        assert best is not None
        kept, score = best[:2], best[2]
        to_exceed = score if lower else max(to_exceed, score)
    assert kept is not None
    assert held is not None
    if integrate:
        x = draw(run, chain_id, range(slot, slot + 1), *kept, process.steps - 1)
        if process.stochastic(process.steps - 1) or not torch.equal(x, held.clean):
            _, scores = yield EvaluationRequest(x, process.steps, held)
            held = BestSoFar(x, scores[0], root)
    return held


def _quotas(
    process: ReverseProcess,
    stochastic: Sequence[bool],
    particles: int | None,
    budget: int | None,
    quota: int | None,
    initial: int | None,
) -> list[list[int]]:
    """Candidates per level of every chain: one where they do not differ, elsewhere as many as the budget pays for."""
    if process.steps > 1 and not any(stochastic[1:]):
        raise NotStochasticError(
            "rbf draws several candidates for every step, and this process's transitions add no noise; use a "
            "stochastic rule, for instance process.with_rule(steer.ddim(eta=1.0)), or search.noise_search on starting "
            "noises"
        )

    def by_level(amounts: Sequence[int]) -> list[int]:
        amount = iter(amounts)
        return [next(amount) if random else 1 for random in stochastic]

    first = [initial] if initial is not None and stochastic[0] else []
    if budget is None or quota is not None:
        each = by_level([*first, *[quota or 16] * (sum(stochastic) - len(first))])
        count = affordable(sum(each) * process.rows, particles=particles, budget=budget, default=1)
        return [each] * count
    least = (process.steps - len(first) + sum(first)) * process.rows
    most = affordable(least, particles=particles, budget=budget)
    count = min(2, most) if particles is None else particles
    fixed = sum(first) + stochastic.count(False)
    return [
        by_level([*first, *split_evenly(calls - fixed, sum(stochastic) - len(first))])
        for calls in split_evenly(budget // process.rows, count)
    ]
