"""The loop of the weighted SDE: what `steer.fkc` and `steer.driftlite` run."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from ..core.log_weights import log_potential
from ..core.objective import Objective, check_temperature, conditioned, open_run
from ..core.start import PreparedStart, Start, prior, resumed
from ..core.trajectory import Seen, Trajectory
from ..cost import Meter, affordable
from ..errors import ModelError, NotStochasticError, SteerError
from ..key import Key, as_key
from ..particles.birth_death import BirthDeath
from ..particles.potentials import difference
from ..particles.selection import Resample, check, select
from ..particles.tempering import Tempering
from ..results.result import Result
from ..types import OnStep, Reward, Stop
from .composite import Composite
from .derivatives import Differentiator
from .engine import Engine, FeynmanKac, KernelRatio, Noise
from .look_ahead import LookAhead
from .transports import Transport


def weighted_loop(
    target: Composite,
    reward: Reward | None,
    *,
    batch: int,
    particles: int | None,
    budget: int | None,
    temperature: float,
    key: Key | int,
    start: Start | Trajectory,
    transport: Transport,
    weight: KernelRatio | FeynmanKac,
    noise: Noise,
    look_ahead: LookAhead,
    tempering: Tempering | None,
    selection: Resample | BirthDeath,
    active: tuple[float, float] | None,
    sigma_data: float,
    keep_states: bool,
    on_step: OnStep | None,
) -> tuple[Result, dict[int, Tensor]]:
    """A weighted population of the composite's target, and the transport's coefficients (B, 3) by level.

    Arguments as `steer.fkc`, all required.
    """
    temperature, key = check_temperature(temperature), as_key(key)
    target, objective, meter = _opened(target, reward)
    look = Differentiator(
        target, objective, temperature, look_ahead, weight.probes if isinstance(weight, FeynmanKac) else None, key
    )
    engine = Engine(target, look, transport, weight, noise, difference(tempering=tempering), active, sigma_data, key)
    rows = rows_per_particle(target, objective is not None, weight, look_ahead)
    state = _started(engine, start, conditioned(target, batch), particles, budget, rows)
    state = replace(state, keep_states=keep_states)
    if not isinstance(selection, BirthDeath):
        _check_noise(engine, state, selection)

    seen: list[Seen] = []
    thetas: dict[int, Tensor] = {}
    paid, standing, interrupted = state, state, False
    try:
        try:
            for k in range(state.k, target.steps):
                standing = state  # what an error leaves to go on from: the gain of its step is not in it yet
                state, scores, thetas[k] = engine.evaluate(state)
                if not engine.last(k):
                    state = _selected(state, scores, selection, key, seen)
                paid = state
                state = engine.step(state)
                if on_step is not None:
                    on_step(state)
        except (Stop, KeyboardInterrupt):
            if "x0" not in paid.carried:
                raise
            state, interrupted = replace(paid, x=paid.carried["x0"]), True
        with torch.no_grad():
            scores = torch.zeros_like(state.log_weight) if objective is None else objective(state.x)
        state = engine.potential.close(state, log_potential(scores, temperature))
        seen.append(Seen(target.steps, state.ess, scores))
        check(state, seen)
    except SteerError as error:
        error.keep(standing)
        raise
    result = Result.of(
        state, scores, key=key, cost=meter.cost(), temperature=temperature, seen=tuple(seen), interrupted=interrupted
    )
    return result, thetas


def rows_per_particle(target: Composite, valued: bool, weight: KernelRatio | FeynmanKac, look_ahead: LookAhead) -> int:
    """Network rows that one particle costs at most."""
    predictions = target.steps
    if valued:
        later = isinstance(weight, FeynmanKac)
        looks = look_ahead.evaluations * target.steps
        predictions += looks + later * (looks + (0 if look_ahead.local else target.steps - 1))
    return predictions * target.rows


def check_choices(
    target: Composite,
    transport: Transport,
    weight: KernelRatio | FeynmanKac,
    noise: Noise,
    active: tuple[float, float] | None,
) -> None:
    """Raises where parts do not go together, and warns where the law is not the one asked for."""
    own = not callable(noise) and noise == 1.0
    if not callable(noise) and not noise >= 0.0:
        raise SteerError(f"noise is the share v >= 0 of the models' own, got {noise}")
    if isinstance(weight, KernelRatio) and (not own or transport.flow):
        raise SteerError(
            "kernel-ratio weights hold for noise v = 1 and transports without control or flow, since a path's "
            "quadratic variation must be the noising kernel's; use weight=steer.FeynmanKac()"
        )
    if (target.varying or transport.potentials) and not own:
        raise SteerError(
            "log q along the path, which time-varying exponents and ecg() need, is known for noise v = 1 only"
        )
    if active is not None:
        _warn(
            f"weights outside t in {active} are dropped: what is sampled is then no known law, and neither samples nor "
            "evidence converge to the target as steps and particles grow"
        )
    total = target.total(target.steps)
    if total > 1.0 and not transport.flow and not callable(noise) and noise < 1.0 - 1.0 / total:
        _warn(
            f"with exponents that sum to A = {total:.4g}, noise v = {noise:.4g} is below 1 - 1 / A = "
            f"{1.0 - 1.0 / total:.4g}, where weights of this transport cannot have finite variance in the noise phase; "
            "use noise=1.0 or more, or transport=steer.flow_transport"
        )
    if target.normalisable() is False:
        _warn(
            "the target has no finite normaliser, as far as its components' tails tell: one with a negative exponent "
            "is narrower than the rest (guidance by a conditional model wider than the unconditional one); samples run "
            "away however many particles there are"
        )


def _warn(message: str) -> None:
    """A UserWarning to the caller of the public function: for choices whose law is biased or may not exist."""
    warnings.warn(message, UserWarning, stacklevel=4)


def _opened(target: Composite, reward: Reward | None) -> tuple[Composite, Objective | None, Meter]:
    if reward is None:
        meter = Meter()
        return target.metered(meter), None, meter
    process, objective, meter = open_run(target, reward)
    assert isinstance(process, Composite)
    return process, objective, meter


def _started(
    engine: Engine, start: Start | Trajectory, batch: int, particles: int | None, budget: int | None, rows: int
) -> Trajectory:
    """The population at its first level, with the path's normaliser there in its evidence."""
    target = engine.target
    if isinstance(start, Trajectory):
        each = -(-rows // (target.steps * target.rows))
        state = resumed(start, target, particles, batch, budget, rows=each)
    else:
        before = 0
        if isinstance(start, PreparedStart):
            if target.total(0) != 1.0:
                raise ModelError(
                    "starts that know the reward draw from the models' own prior N(0, sigma^2), and that of exponents "
                    f"that sum to {target.total(0):.4g} is another; leave start out, or use exponents that sum to 1"
                )
            start, before = start.prepare(target, engine.look.temperature)
        count = affordable(rows, particles=particles, budget=budget, before=before)
        objective = engine.look.objective
        if objective is None:
            if start is not prior:
                raise SteerError("a start other than steer.prior needs a reward")
            state = Trajectory.begin(target, target.prior(engine.key.fold("prior"), batch, count))
        else:
            state = start(target, objective, engine.key, batch, count)
        state = replace(state, log_evidence=state.log_evidence + target.log_prior_mass)
    if "spent" not in state.memory:
        state = state.remember(spent=torch.zeros_like(state.log_weight))
    if engine.tracks_log_q and "log_q" not in state.memory:
        if state.k > 0:
            raise SteerError("log q is followed from the first level on: go on from a trajectory of this sampler")
        sigma = target.levels[0].sigma
        x = state.x.double().flatten(2)
        log_q = -0.5 * x.square().sum(2) / sigma**2 - 0.5 * x.shape[2] * math.log(2.0 * math.pi * sigma**2)
        state = state.remember(log_q=log_q[..., None].repeat(1, 1, len(target.components)))
    return state


def _selected(
    state: Trajectory, scores: Tensor, selection: Resample | BirthDeath, key: Key, seen: list[Seen]
) -> Trajectory:
    if isinstance(selection, BirthDeath):
        seen.append(Seen(state.k, state.ess, scores))
        return selection(state, key.fold("clock"))
    return select(state, scores, selection, key.fold("resample"), seen)


def _check_noise(engine: Engine, state: Trajectory, selection: Resample) -> None:
    if selection.moves is not None:
        raise SteerError(
            "moves hold for weights that are a function of the latest state, as in steer.smc; those of a weighted SDE "
            "gather along the path; run without moves"
        )
    steps = range(state.k, engine.target.steps - 1)
    if state.x.shape[1] > 1 and selection.threshold > 0.0 and steps and not any(engine.v(k) > 0.0 for k in steps):
        raise NotStochasticError(
            "resampling makes copies that only noise can separate; give noise > 0, or "
            "selection=steer.resample(threshold=0) to weight without resampling"
        )
