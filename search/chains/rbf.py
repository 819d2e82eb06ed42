"""Rollover budget forcing (RBF): a chain goes on as soon as it has improved, and takes its unused calls along."""

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
from .batched_chains import BestSoFar, Chain, EvaluationRequest, Name, begin, draw, run_in_lockstep


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
    """N chains that advance on the first candidate better than all before, and spend what they saved further down.

    particles: N chains per problem; 2 with a budget that affords it, else 1.
    budget:    network rows per problem: all are used, but for what is less than one prediction per chain.
    quota:     candidates per chain and level before any rollover, if no budget is given; 16 by default.
    initial:   starting noises per chain, of which the best by r(x0_hat) is taken; None is a level's quota.
    threshold: what a candidate must exceed: the chain's running maximum, or the value of its current sample.
    finish:    "prediction" returns x0_hat of the last level, "integration" draws the last step from there. The same
               where the last step is deterministic and exact (DDIM, CPS).
    keep:      how many of the N chains share the weight. temperature changes nothing.
    chunk:     states evaluated at once. on_step: called after every network call, with the states about to
               be valued next; `Stop` or an interrupt returns every chain's current prediction.

    Returns x (B, N, *event), reward, log_weight (B, N); log_evidence NaN.
    Cost per problem: budget, or N (initial + quota (K - 1)) network rows; as many rewards.
    Raises NotStochasticError on deterministic processes (a flow: process.with_rule(steer.euler_maruyama(g)), or
    steer.convert to a variance-preserving path), BudgetError, NonFiniteError, RewardError; ShapeError where a denoiser
    conditioned on several problems cannot be asked about one (see `GaussianProcess.only`).
    Source: Kim et al. 2025 (2503.19385), Alg. 2. The paper compares with "the current sample" in words, with the
    running maximum in pseudo-code and code. As in the code, `initial` candidates are tried at the first level (25, of
    500 calls over 10 steps and 2 chains) and the last level spends all that is left. Differs: quotas that do not
    divide evenly are spread, none is lost. Its flow runs with g = 3 t^2 or a VP path, times sqrt(1 - (1 - t)^2).
    """
    for name, given, allowed in (
        ("threshold", threshold, ("running_max", "current")),
        ("finish", finish, ("prediction", "integration")),
    ):
        if given not in allowed:
            raise SteerError(f"{name} is one of {', '.join(allowed)}, got {given!r}")
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
    branches = [
        prior_is_random(process),
        *(process.stochastic(k) for k in range(process.steps - 1)),
    ]  # candidates differ
    quotas = _quotas(run.process, branches, particles, budget, quota, initial)
    count, lower, integrate = len(quotas), threshold == "current", finish == "integration"

    def chain(run: Run, name: Name) -> Chain:
        return _chain(run, name, count, quotas[name[1]], branches, lower, integrate)

    return run_in_lockstep(run, count, chain, keep)


def _chain(
    run: Run, name: Name, count: int, quota: Sequence[int], branches: Sequence[bool], lower: bool, integrate: bool
) -> Chain:
    """Algorithm 2 for chain `slot` of `count`; quota[k] candidates at level k. Candidate j has slot j count + slot."""
    process, slot = run.process, name[1]
    last = max((k for k, branch in enumerate(branches) if branch), default=0)
    record, left, root = -math.inf, 0, slot
    here: tuple[Tensor, Tensor] | None = None  # the state that candidates are drawn from, and its prediction
    held: BestSoFar | None = None
    for k in range(process.steps):
        left += quota[k]
        best: tuple[Tensor, Tensor, float] | None = None
        tries, tried = left if branches[k] else 1, 0
        stop_at_first_improvement = (
            0 < k < last
        )  # elsewhere nothing rolls over, and candidates can be asked about together
        while tried < tries:
            many = 1 if stop_at_first_improvement else min(tries - tried, run.chunk)
            slots = range(tried * count + slot, (tried + many) * count, count)
            y = begin(run, name, slots) if here is None else draw(run, name, slots, *here, k - 1)
            y0, scores = yield EvaluationRequest(y, k, held)
            i = max(range(many), key=scores.__getitem__)  # the first of equals
            if best is None or scores[i] > best[2]:
                best, root = (y[:, i : i + 1], y0[:, i : i + 1], scores[i]), slots[i] if k == 0 else root
                held = BestSoFar(process.complete(*best[:2]), scores[i], root)
            tried, left = tried + many, left - many
            if stop_at_first_improvement and scores[i] > record:
                break  # what is left rolls over
        assert best is not None
        here, score = best[:2], best[2]
        record = score if lower else max(record, score)
    assert here is not None
    assert held is not None
    if integrate:
        x = draw(run, name, range(slot, slot + 1), *here, process.steps - 1)
        if process.stochastic(process.steps - 1) or not torch.equal(x, held.clean):
            _, scores = yield EvaluationRequest(x, process.steps, held)
            held = BestSoFar(x, scores[0], root)
    return held


def _quotas(
    process: ReverseProcess,
    branches: Sequence[bool],
    particles: int | None,
    budget: int | None,
    quota: int | None,
    initial: int | None,
) -> list[list[int]]:
    """Candidates per level for every chain: one where candidates do not differ, elsewhere as many as are paid for."""
    if process.steps > 1 and not any(branches[1:]):
        raise NotStochasticError(
            "rbf draws several candidates for every step, and this process's transitions add no noise; use a "
            "stochastic rule, for instance process.with_rule(steer.ddim(eta=1.0)), or search.noise_search on starting "
            "noises"
        )

    def levels(amounts: Sequence[int]) -> list[int]:
        amount = iter(amounts)
        return [next(amount) if branch else 1 for branch in branches]

    first = [initial] if initial is not None and branches[0] else []
    if budget is None or quota is not None:
        each = levels([*first, *[quota or 16] * (sum(branches) - len(first))])
        count = affordable(sum(each) * process.rows, particles=particles, budget=budget, default=1)
        return [each] * count
    least = (process.steps - len(first) + sum(first)) * process.rows
    most = affordable(least, particles=particles, budget=budget)
    count = min(2, most) if particles is None else particles
    fixed = sum(first) + branches.count(False)
    return [
        levels([*first, *split_evenly(calls - fixed, sum(branches) - len(first))])
        for calls in split_evenly(budget // process.rows, count)
    ]
