"""Plain chains of the model, and importance sampling on them."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..core.chain import advance
from ..core.objective import check_finite, check_temperature, conditioned, open_run
from ..core.start import Start, prepared, prior
from ..core.trajectory import Seen
from ..errors import SteerError
from ..key import Key, as_key
from ..particles.selection import check
from ..results.result import Result
from ..types import OnStep, ReverseProcess, Reward


def rollout(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    start: Start = prior,
    keep_states: bool = True,
    on_step: OnStep | None = None,
) -> Result:
    """Unsteered samples of the model, of equal weight, with the log-probability of every step.

    Arguments as `steer.smc`; temperature is noted in the result and used for nothing. `result.trajectory.transitions()`
    gives (k, x, x_next, log_prob, ...) along each chain; log-probs are sums over coordinates, float64.
    Cost per problem: N K network rows and N rewards.
    """
    temperature, key = check_temperature(temperature), as_key(key)
    process, objective, meter = open_run(process, reward, groupwise=True, key=key)
    start, count = prepared(start, process, temperature, particles=particles, budget=budget)
    state = start(process, objective, key, conditioned(process, batch), count)
    try:
        state, interrupted = advance(replace(state, keep_states=keep_states), key, on_step)
        with torch.no_grad():
            scores = objective(state.x)
        check_finite(scores, "of the finished samples")
        check(state, ())
    except SteerError as error:
        error.keep(state)
        raise
    seen = (Seen(process.steps, state.ess, scores),)
    return Result.of(
        state, scores, key=key, cost=meter.cost(), temperature=temperature, seen=seen, interrupted=interrupted
    )
