"""Plain chains of the model, and importance sampling on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import weights
from .cost import Meter, affordable
from .key import Key, as_key
from .objective import Objective, check_finite, check_temperature, conditioned, log_potential, open_run
from .result import Result, Seen
from .smc import Start, prior
from .trajectory import Trajectory
from .types import OnStep, ReverseProcess, Reward


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
    state, objective, meter = _chains(process, reward, batch, particles, budget, key, start, keep_states)
    return _run(state, objective, meter, as_key(key), check_temperature(temperature), on_step, torch.zeros_like)


def importance_sampling(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    start: Start = prior,
    keep_states: bool = False,
    on_step: OnStep | None = None,
) -> Result:
    """Unsteered samples weighted by exp(r(x) / temperature): self-normalised importance sampling.

    The control every sampler should be compared with: exact as N grows, useless where the tilt is a rare event.
    Arguments as `steer.smc`. Cost per problem: N K network rows and N rewards.
    """
    temperature = check_temperature(temperature)
    state, objective, meter = _chains(process, reward, batch, particles, budget, key, start, keep_states)
    return _run(
        state, objective, meter, as_key(key), temperature, on_step, lambda scores: log_potential(scores, temperature)
    )


def advance(state: Trajectory, key: Key, on_step: OnStep | None = None) -> Trajectory:
    """A population carried to the data by the model's own transitions, without weights."""
    process = state.process
    with torch.no_grad():
        for k in range(state.k, process.steps):
            x0 = process.denoise(state.x, k)
            state = state.step(process.transition(state.x, x0, k), key.fold("step"))
            if on_step is not None:
                on_step(state)
    return state


def _chains(
    process: ReverseProcess,
    reward: Reward,
    batch: int,
    particles: int | None,
    budget: int | None,
    key: Key | int,
    start: Start,
    keep_states: bool,
) -> tuple[Trajectory, Objective, Meter]:
    from dataclasses import replace

    process, objective, meter = open_run(process, reward)
    count = affordable(process.steps * process.rows, particles=particles, budget=budget)
    state = start(process, objective, as_key(key), conditioned(process, batch), count)
    return replace(state, keep_states=keep_states), objective, meter


def _run(
    state: Trajectory,
    objective: Objective,
    meter: Meter,
    key: Key,
    temperature: float,
    on_step: OnStep | None,
    log_weight: Callable[[Tensor], Tensor],
) -> Result:
    state = advance(state, key, on_step)
    with torch.no_grad():
        scores = objective(state.x)
    check_finite(scores, "of the finished samples", partial=state)
    state = state.reweight(log_weight(scores))
    return Result(
        process=state.process, x=state.x, reward=scores, log_weight=weights.normalise(state.log_weight),
        log_evidence=state.log_normaliser, cost=meter.cost(), temperature=temperature, trajectory=state,
        seen=(Seen(state.k, weights.ess(state.log_weight), scores),),
    )  # fmt: skip
