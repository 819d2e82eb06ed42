"""Best of N: the baseline of every search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from steer.core import log_weights
from steer.core.chain import advance
from steer.core.objective import check_finite, check_temperature, conditioned, open_run
from steer.core.start import Start, prepared, prior
from steer.core.trajectory import Seen, Trajectory
from steer.cost import check_counts
from steer.errors import SteerError
from steer.key import Key, as_key
from steer.results.result import Result
from steer.types import ReverseProcess, Reward


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
    on_step:   called after every step. Raising `Stop`, or an interrupt, ends the search with the samples finished so
               far and the predictions of the chunk under way: it is anytime.
    temperature is accepted for a common signature and changes nothing. log_evidence is NaN.
    Cost per problem: N K network rows and N rewards.
    """
    temperature, key = check_temperature(temperature), as_key(key)
    check_counts(keep=keep, chunk=chunk)
    process, objective, meter = open_run(process, reward, groupwise=True, key=key)
    ready, count = prepared(start, process, temperature, particles=particles, budget=budget)
    if ready is not start or objective.groupwise:
        chunk = count  # a start that spends rows of its own is paid for once, and a group is scored in one call
    samples, scores, interrupted = [], [], False
    for first in range(0, count, chunk):
        size = min(chunk, count - first)
        here = meter.key = key.shifted(slot=first)
        try:
            state = ready(process, objective, here, conditioned(process, batch), size)
            state, interrupted = advance(state, here, on_step)
        except KeyboardInterrupt:
            if not samples:
                raise
            interrupted = True
            break
        try:
            with torch.no_grad():
                score = objective(state.x)
            check_finite(score, "of the finished samples", first=first)
        except SteerError as error:
            error.keep(replace(state, x=torch.cat([*samples, state.x], 1)))
            raise
        samples.append(state.x)
        scores.append(score)
        if interrupted:
            break
    x, score = torch.cat(samples, 1), torch.cat(scores, 1)
    log_weight = log_weights.of_best(score, keep)
    none = torch.full_like(score[:, 0], torch.nan)
    return Result(
        process=process, x=x, reward=score, log_weight=log_weight, log_evidence=none,
        root=torch.arange(score.shape[1], device=score.device).expand_as(score), key=key, cost=meter.cost(),
        temperature=temperature, seen=(Seen(process.steps, log_weights.ess(log_weight), score),),
        interrupted=interrupted,
    )  # fmt: skip
