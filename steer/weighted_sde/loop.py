"""The loop of the weighted SDE: what `steer.fkc` and `steer.driftlite` run.

    started     x ~ N(0, sigma^2 / A), or another start, N particles of each of B problems
    for every level k = 0, ..., K - 1:
        evaluate    predictions, values and their derivatives; the weight of the step to come, as far as it is known
        selected    resampled where the ESS is low, or by birth-death clocks
        step        x' by Euler-Maruyama with integrated coefficients, or the composite of reverse kernels
        settled     what of the reward the weight has counted at x', as a number: it takes the next level's evaluation
    close       score x_0; weight by what exp(r(x_0) / T) is still owed

`engine` has the equations.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ..core.checkpoints import Checkpoints
from ..core.event import OnStep
from ..core.loop import Loop
from ..core.objective import FINISHED
from ..core.population import log_potential
from ..core.run import Run
from ..core.start import CheckedStart, PreparedStart, Start, check_resume, prior
from ..core.trajectory import LevelRecord, Trajectory
from ..cost import affordable
from ..errors import ModelError, NotStochasticError, SteerError
from ..key import Key
from ..particles.birth_death import BirthDeath
from ..particles.potentials import difference
from ..particles.selection import Resample, check, select
from ..particles.tempering import Tempering
from ..results.result import Result
from ..types import Reward
from .composite import Composite
from .derivatives import NO_GRADIENT, Evaluation, ValueDerivatives
from .engine import FeynmanKac, KernelRatio, Noise, WeightedSDE
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
    seed: int | None,
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
    name: str,
) -> tuple[Result, dict[int, Tensor]]:
    """A weighted population of the composite's target, and the transport's coefficients [B, 3] by level.

    Args: as `steer.fkc`, all required. name: of the method, for events.
    """
    common: dict[str, Any] = {"transport": transport, "weight": weight, "noise": noise, "look_ahead": look_ahead}
    common |= {"tempering": tempering, "active": active, "sigma_data": sigma_data}
    run = Run.open(
        name,
        target,
        _nothing if reward is None else reward,
        batch=batch,
        temperature=temperature,
        key=key,
        seed=seed,
        on_step=on_step,
    )
    engine = _engine(run, valued=reward is not None, **common)
    target, objective = engine.target, engine.derivatives.objective
    history: list[LevelRecord] = []
    loop = Loop(run)
    with loop.keeping_partial():
        start, count = _checked(engine, start, selection, particles, run.problems, budget)
        state = replace(_started(engine, start, run.problems, count), keep_states=keep_states)
        _check_noise(engine, state.k, state.x.shape[1], selection)
        kept = Checkpoints(run, state, common, selection, seen=history)
        loop.partial = state = kept.state
        thetas, ahead = _carried(kept.carried, state)
        with loop.steps():
            for k in range(state.k, target.steps):
                consistent = state  # the gain of the step from here is not in it yet
                state, scores, thetas[k] = engine.evaluate(state, ahead)
                if not engine.last(k):
                    state = _selected(state, scores, selection, run.key, history)
                loop.predicted(state, partial=consistent)
                before, (state, ahead) = state, engine.settled(engine.step(state))
                loop.stepped(before, state, partial=state)
                kept.reached(state, thetas=thetas, ahead=None if ahead is None else ahead._asdict())
        state = loop.ended(state)
        with torch.no_grad():
            if objective is None:
                run.meter.finite.samples(state.x, state.x, FINISHED)
            scores = torch.zeros_like(state.log_weight) if objective is None else objective(state.x, FINISHED)
        state = engine.potential.close(state, log_potential(scores, run.temperature))
        history.append(LevelRecord(target.steps, state.ess, scores))
        check(state)
    result = Result.from_population(run, state, scores, law="target", seen=history, interrupted=loop.interrupted)
    return result, thetas


def rows_per_particle(target: Composite, valued: bool, weight: KernelRatio | FeynmanKac, look_ahead: LookAhead) -> int:
    """Network rows that one particle costs at most."""
    predictions, own = target.steps, 0
    if valued:
        later = isinstance(weight, FeynmanKac)
        looks = look_ahead.evaluations * target.steps
        predictions += looks + later * (looks + (0 if look_ahead.local else target.steps - 1))
        own = look_ahead.rows * target.steps * (1 + later)
    return predictions * target.rows + own


def check_choices(
    target: Composite,
    transport: Transport,
    weight: KernelRatio | FeynmanKac,
    noise: Noise,
    active: tuple[float, float] | None,
) -> None:
    """Raises where parts do not go together, and warns where the result is not what was asked for."""
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
            f"weights outside t in {active} are dropped: what is sampled is then no known distribution, and neither "
            "samples nor log_evidence converge to the target as steps and particles grow"
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
            "the target has no finite normalizing constant, as far as its components' tails tell: one with a negative "
            "exponent is narrower than the rest (guidance by a conditional model wider than the unconditional one); "
            "samples run away however many particles there are"
        )


def _warn(message: str) -> None:
    """A UserWarning to the caller of the public function: for choices whose target is biased or may not exist."""
    warnings.warn(message, UserWarning, stacklevel=4)


def check_weighted(
    target: Composite,
    reward: Reward | None,
    budget: int | None,
    *,
    particles: int | None,
    start: Start | Trajectory,
    selection: Resample | BirthDeath,
    batch: int,
    key: Key | int,
    on_step: OnStep | None,
    seed: int | None = None,
    **choices: Any,
) -> None:
    """Raises what `weighted_loop` with these arguments would raise before it pays for anything."""
    wanted = _nothing if reward is None else reward
    run = Run.open("", target, wanted, batch=batch, temperature=1.0, key=key, seed=seed, on_step=on_step)
    _checked(_engine(run, valued=reward is not None, **choices), start, selection, particles, run.problems, budget)


def _engine(
    run: Run,
    *,
    valued: bool,
    transport: Transport,
    weight: KernelRatio | FeynmanKac,
    noise: Noise,
    look_ahead: LookAhead,
    tempering: Tempering | None,
    active: tuple[float, float] | None,
    sigma_data: float,
) -> WeightedSDE:
    """The choices of a run. valued: whether there is a reward; else the target is the composite itself."""
    target = cast(Composite, run.process)
    derivatives = ValueDerivatives(
        target=target,
        objective=run.objective if valued else None,
        temperature=run.temperature,
        look_ahead=look_ahead,
        probes=weight.probes if isinstance(weight, FeynmanKac) else None,
        key=run.key,
    )
    return WeightedSDE(
        target=target,
        derivatives=derivatives,
        transport=transport,
        weight=weight,
        noise=noise,
        potential=difference(tempering=tempering),
        active=active,
        sigma_data=sigma_data,
        key=run.key,
    )


def _nothing(samples: Tensor) -> Tensor:
    """The reward where there is none."""
    return torch.zeros(len(samples), dtype=torch.float64, device=samples.device)


def _checked(
    engine: WeightedSDE,
    start: Start | Trajectory,
    selection: Resample | BirthDeath,
    particles: int | None,
    problems: int,
    budget: int | None,
) -> tuple[Start | Trajectory, int]:
    """What to begin from, ready for the run, and N. Raises all that can be told before anything is paid."""
    target, derivatives = engine.target, engine.derivatives
    rows = rows_per_particle(target, engine.valued, engine.weight, derivatives.look_ahead)
    if isinstance(start, Trajectory):
        state = check_resume(start, target, particles, problems, budget, rows=-(-rows // (target.steps * target.rows)))
        level, count, start = state.k, state.x.shape[1], state
    else:
        before, level = 0, 0
        if isinstance(start, PreparedStart):
            if target.total(0) != 1.0:
                raise ModelError(
                    "starts that know the reward draw from the models' own prior N(0, sigma^2), and that of exponents "
                    f"that sum to {target.total(0):.4g} is another; leave start out, or use exponents that sum to 1"
                )
            start, before = start.prepare(target, derivatives.temperature)
        count = affordable(rows, particles=particles, budget=budget, before=before)
        if derivatives.objective is None:
            if start is not prior:
                raise SteerError("a start other than steer.prior needs a reward")
        elif isinstance(start, CheckedStart):
            start.check(target, derivatives.objective, count)
    if start is prior or isinstance(start, CheckedStart | Trajectory):
        _check_noise(engine, level, count, selection)
    if derivatives.objective is not None and any(engine.needs(k).gradient for k in range(level, target.steps)):
        derivatives.objective.check_differentiable(NO_GRADIENT)
    return start, count


def _started(engine: WeightedSDE, start: Start | Trajectory, batch: int, count: int) -> Trajectory:
    """The population at its first level, with the path's normalizing constant there in log_evidence."""
    target, objective = engine.target, engine.derivatives.objective
    if isinstance(start, Trajectory):
        state = start
    else:
        if objective is None:
            state = Trajectory.begin(target, target.prior(engine.key.fold("prior"), batch, count))
        else:
            state = start(target, objective, engine.key, batch, count)
        state = replace(state, log_evidence=state.log_evidence + target.log_prior_mass)
    if engine.tracks_log_q and state.path.log_q is None:
        if state.k > 0:
            raise SteerError("log q is followed from the first level on: resume a trajectory of this sampler")
        sigma = target.levels[0].sigma
        x = state.x.double().flatten(2)
        log_q = -0.5 * x.square().sum(2) / sigma**2 - 0.5 * x.shape[2] * math.log(2.0 * math.pi * sigma**2)
        state = state.with_path_state(log_q=log_q[..., None].repeat(1, 1, len(target.components)))
    return state


def _carried(carried: Mapping[str, Any], state: Trajectory) -> tuple[dict[int, Tensor], Evaluation | None]:
    """The transport's coefficients so far, and the evaluation of the state, as far as they are carried."""
    thetas = {int(k): theta.to(state.x.device) for k, theta in carried.get("thetas", {}).items()}
    ahead = carried.get("ahead")
    return thetas, ahead and Evaluation(**{name: part.to(state.x.device) for name, part in ahead.items()})


def _selected(
    state: Trajectory, scores: Tensor, selection: Resample | BirthDeath, key: Key, seen: list[LevelRecord]
) -> Trajectory:
    """The state after its selection: resampled by ESS, or by birth-death clocks."""
    if isinstance(selection, BirthDeath):
        seen.append(LevelRecord(state.k, state.ess, scores))
        return selection(state, key.fold("clock"))
    return select(state, scores, selection, key.fold("resample"), seen)


def _check_noise(engine: WeightedSDE, level: int, count: int, selection: Resample | BirthDeath) -> None:
    if isinstance(selection, BirthDeath):
        return
    if selection.moves is not None:
        raise SteerError(
            "moves hold for weights that are a function of the latest state, as in steer.smc; those of a weighted SDE "
            "gather along the path; run without moves"
        )
    steps = range(level, engine.target.steps - 1)
    if count > 1 and selection.threshold > 0.0 and steps and not any(engine.v(k) > 0.0 for k in steps):
        raise NotStochasticError(
            "resampling makes copies that only noise can separate; give noise > 0, or "
            "selection=steer.resample(threshold=0) to weight without resampling"
        )
