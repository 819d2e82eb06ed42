"""Best of N: the baseline of every search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from steer.cost import affordable
from steer.key import Key, as_key
from steer.objective import check_finite, check_temperature, conditioned, open_run
from steer.result import Result, Seen
from steer.rollout import advance
from steer.smc import Start, prior
from steer.trajectory import Trajectory
from steer.types import ReverseProcess, Reward, Stop


def best_of_n(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    keep: int = 1,
    chunk: int = 256,
    start: Start = prior,
    on_step: Callable[[Trajectory], None] | None = None,
) -> Result:
    """N unsteered samples, ranked by final reward; the `keep` best share the weight.

    particles: N per problem, 16 by default; or budget, network rows per problem, never exceeded.
    chunk:     samples per problem run at once. Memory and speed depend on it, results do not: noise is named by slot.
    on_step:   called after every step; raising `Stop` (or an interrupt) returns the best of the chunks finished so
               far, so the search is anytime.
    temperature is accepted for a common signature and changes nothing. log_evidence is NaN.
    Cost per problem: N K network rows and N rewards.
    """
    check_temperature(temperature)
    key = as_key(key)
    process, objective, meter = open_run(process, reward)
    count = affordable(process.steps * process.rows, particles=particles, budget=budget)
    samples, scores, interrupted = [], [], False
    try:
        for first in range(0, count, chunk):
            size = min(chunk, count - first)
            here = key.shifted(slot=first)
            state = start(process, objective, here, conditioned(process, batch), size)
            state = advance(state, here, on_step)
            with torch.no_grad():
                score = objective(state.x)
            check_finite(score, f"of samples {first} to {first + size - 1}")
            samples.append(state.x)
            scores.append(score)
    except (Stop, KeyboardInterrupt):
        if not samples:
            raise
        interrupted = True
    x, score = torch.cat(samples, 1), torch.cat(scores, 1)
    result = Result(
        process=process, x=x, reward=score, log_weight=torch.zeros_like(score),
        log_evidence=torch.full_like(score[:, 0], torch.nan), cost=meter.cost(), temperature=temperature,
        seen=(Seen(process.steps, torch.full_like(score[:, 0], float(keep)), score),), interrupted=interrupted,
    )  # fmt: skip
    winners = result.ranked()[:, :keep]
    log_weight = torch.full_like(score, -torch.inf).scatter_(1, winners, -torch.tensor(float(winners.shape[1])).log())
    return replace(result, log_weight=log_weight)
