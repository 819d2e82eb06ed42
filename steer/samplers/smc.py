"""Sequential Monte Carlo on a reverse process: the one particle loop.

    start       x ~ the prior, or another start, N particles of each of B problems
    for every level k = 0, ..., K - 1:
        weigh       predict x0_hat and score it; weight by the potential; resample where the ESS is low
        move        x' ~ the proposal; weight by model(x') / proposal(x')
    close       score x_0; weight by what exp(r(x_0) / T) is still owed

A run is a choice of four parts that compose: a start, a proposal, a potential and a selection.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..core.checkpoints import Checkpoints
from ..core.event import OnStep
from ..core.loop import Loop
from ..core.objective import FINISHED
from ..core.population import log_potential
from ..core.run import Run
from ..core.start import CheckedStart, Start, check_resume, prepared, prior, started
from ..core.temperature import Temperature, settle
from ..core.trajectory import LevelRecord, ResamplingRecord, Trajectory, required
from ..errors import NotStochasticError, SteerError
from ..key import Key
from ..particles.path_mcmc import forget
from ..particles.potentials import Potential, default_weight
from ..particles.proposals import (
    Proposal,
    ProposalFunction,
    bootstrap,
    check_proposal,
    predict_and_score,
    propose,
)
from ..particles.selection import Resample, check, resample, select
from ..results.result import Result
from ..types import ReverseProcess, Reward


def smc(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: Temperature = 1.0,
    ess: float | None = None,
    kl: float | None = None,
    key: Key | int = 0,
    seed: int | None = None,
    start: Start | Trajectory = prior,
    proposal: Proposal | ProposalFunction = bootstrap,
    weight: Potential | None = None,
    selection: Resample | None = None,
    keep_states: bool = False,
    on_step: OnStep | None = None,
) -> Result:
    """Weighted samples of p(x) exp(r(x) / temperature), and the log of its normalizing constant.

    Args:
        process: the model as a reverse process; its weights are not changed.
        reward: samples [M, ...] to scores [M], in any unit. Higher is better, -inf forbids a sample.
        batch: B, independent problems; a process conditioned on prompts or labels has its own number.
        particles: N per problem, 16 by default.
        budget: network rows (NFE x batch rows) per problem, never exceeded; takes the place of `particles`, or checks
            it.
        temperature: > 0, in units of the reward; inf ignores the reward, "auto" is ess=0.5.
        ess: in place of a temperature: the one at which the ESS of unsteered samples weighted by exp(r / temperature)
            is this share of them, in (0, 1). Chosen before the run from unsteered samples on noise of their own, which
            cost up to a quarter of the budget (docs/temperature.md); `result.temperature_choice` says how.
        kl: in place of a temperature: the one at which the target's KL to the model is this, in nats.
        key: names all noise of the run, an integer or a `Key`.
        seed: the same as `key`, for those who call it that; give one of them.
        start: where particles begin: `prior`, another start (`pcnl`, `mala`, `ula`, `top_k_of_n`), whose cost comes out
            of the budget, or a Trajectory to resume (`event.state` of `on_step`, `.partial` of an error).
        proposal: what particles move by: `bootstrap`, the model's own transition; `guided(scale)`, along the gradient
            of r(x0_hat); or one of yours, an object or a plain function (state, model) -> transition, which is
            called at every step that draws noise.
        weight: potential at intermediate levels: `difference()`, `maximum()`, `total()`, `final_only()`. By default
            `difference()`, and where the first values would leave an ESS below N / 8, as predictions far out of the
            range of the data do, tempered from there as by `adaptive_tempering()`.
        selection: `resample(resampler, threshold, at)`; systematic below half of N by default.
        keep_states: keep every state and log-density, for `Trajectory.states` and `.transitions`; B N states per step.
        on_step: called with an `Event` after each step; raising `Stop` ends the run with what there is.

    Returns:
        Result with x [B, N, *event], reward [B, N], log_weight [B, N] that sum to one, and log_evidence [B], which is
        NaN after a start of unknown normalizing constant. Its variance comes from the ancestors of one run for
        `multinomial` resampling alone; for others run batch >= 2 repetitions (`Result.log_evidence_variance`). `law` is
        "target".

    Raises:
        NonFiniteError: where the reward is NaN or +inf, or densities overflow.
        CollapsedWeightsError: where the reward forbids every particle of a problem.
        NotStochasticError: where copies would never separate, because the transition rule adds no noise.
        NotDifferentiableError: where a proposal needs a gradient that reward or network do not have.
        RewardError: where the reward raises, or does not return one number per sample.
        ShapeError: where a trajectory to resume, or `batch`, does not fit the process.
        BudgetError: where the budget does not pay for one particle. Each has what was computed before it in `.partial`.

    Cost: per problem N K network rows (K = process.steps) and N K rewards at the default weight; with guidance also up
    to N K backward passes; before it, where the temperature is chosen, up to 128 chains of K rows and a reward. One
    prediction per state serves its weight, its proposal and the next step.

    Source: Del Moral 2004; Wu et al. 2023 (TDS), Alg. 1; Singhal et al. 2025 (FK steering).
    Differs: potentials close on r(x_0); weights not used up by a resampling are carried on; resampling precedes the
    proposal, so that copies of a particle share its prediction and separate in the same step; the normalizing constant
    is always estimated.
    """
    common: dict[str, Any] = {"batch": batch, "key": key, "seed": seed}
    parts = (proposal, weight or default_weight(), selection or resample())
    again: dict[str, Any] = {"particles": particles, "start": start, "keep_states": keep_states, "on_step": on_step}
    beforehand = partial(check_smc, process, reward, parts=parts, **again, **common)
    asked = settle(process, reward, temperature=temperature, ess=ess, kl=kl, budget=budget, check=beforehand, **common)
    run = Run.open("smc", process, reward, temperature=asked.temperature, on_step=asked.on_step(on_step), **common)
    particle_filter = _ParticleFilter(run, *parts)
    loop = Loop(run)
    with loop.keeping_partial():
        state = particle_filter.start(start, particles, asked.budget, batch, keep_states)
        kept = Checkpoints(run, state, *parts, seen=particle_filter.history)
        loop.partial = state = kept.state
        with loop.steps():
            for _ in range(state.k, run.process.steps):
                state = loop.predicted(particle_filter.weigh(state))
                before, state = state, particle_filter.move(state)
                loop.stepped(before, state, partial=state)
                kept.reached(state)
        state, scores = particle_filter.close(loop.ended(state))
        check(state)
    return asked.told(
        Result.from_population(
            run, state, scores, law="target", seen=particle_filter.history, interrupted=loop.interrupted
        )
    )


def check_smc(
    process: ReverseProcess,
    reward: Reward,
    budget: int | None,
    *,
    batch: int,
    particles: int | None,
    key: Key | int,
    seed: int | None,
    start: Start | Trajectory,
    parts: tuple[Proposal | ProposalFunction, Potential, Resample],
    keep_states: bool,
    on_step: OnStep | None,
) -> None:
    """Raises what `smc` with these arguments would raise before it pays for anything, whatever the temperature."""
    run = Run.open("smc", process, reward, batch=batch, temperature=1.0, key=key, seed=seed, on_step=on_step)
    _ParticleFilter(run, *parts).check(start, particles, budget, batch, keep_states)


@dataclass(frozen=True)
class _ParticleFilter:
    """The four parts of a run, and what they do to a population at a level."""

    run: Run
    proposal: Proposal | ProposalFunction
    weight: Potential
    selection: Resample
    history: list[LevelRecord] = field(default_factory=list)

    def start(
        self, start: Start | Trajectory, particles: int | None, budget: int | None, batch: int, keep_states: bool
    ) -> Trajectory:
        """The population that the run begins with."""
        run, moves = self.run, self.selection.moves
        start, count = self.check(start, particles, budget, batch, keep_states)
        state = start
        if not isinstance(state, Trajectory):
            state = started(cast(Start, start), run.process, run.objective, run.key, run.problems, count)
            self._check_level(state.k, state.x.shape[1], keep_states)
        state = replace(state, keep_states=keep_states)
        return state if moves is None else moves.begin(state)

    def check(
        self, start: Start | Trajectory, particles: int | None, budget: int | None, batch: int, keep_states: bool
    ) -> tuple[Start | Trajectory, int]:
        """What to begin from, ready for the run, and N. Raises all that can be told before anything is paid."""
        run, moves = self.run, self.selection.moves
        if isinstance(start, Trajectory):
            start = check_resume(start, run.process, particles, batch, budget)
            count = start.x.shape[1]
            self._check_level(start.k, count, keep_states)
        else:
            price = None if moves is None else partial(moves.rows, run.process)
            start, count = prepared(
                start, run.process, run.temperature, particles=particles, budget=budget, price=price
            )
            if isinstance(start, CheckedStart):
                start.check(run.process, run.objective, count)
            if start is prior or isinstance(start, CheckedStart):
                self._check_level(0, count, keep_states)
        check_proposal(self.proposal, run.process, run.objective)
        return start, count

    def _check_level(self, level: int, count: int, keep_states: bool) -> None:
        """Raises where parts do not go together in a run of N particles from a level on."""
        _check_stochastic(self.run.process, level, count, self.selection)
        moves, steps = self.selection.moves, self.run.process.steps
        if moves is None:
            return
        moves.check(self.run.process, level)
        if not self.weight.telescopes or keep_states:
            raise SteerError(
                "moves change paths: their target must be a function of the latest state, which weight="
                "steer.difference() and final_only() give, and states kept from before them would connect to nothing; "
                "use such a weight and keep_states=False, or run without moves"
            )
        idle = [
            k for k in sorted(moves.at) if not (k == steps or (level <= k < steps and self.weight.active(k, steps)))
        ]
        if idle:
            raise SteerError(
                f"particles are moved at levels that are weighted, and at the end, {steps}; {idle} of path_moves are "
                "neither; change them, or the weight's levels"
            )

    def weigh(self, state: Trajectory) -> Trajectory:
        """Predicts, scores, reweights, and resamples where the ESS is low: the state, caching its prediction."""
        weighted = self.weight.active(state.k, state.process.steps)
        state, scores = self._predict(state, self.run.key, weighted)
        if scores is None:
            return state
        value = log_potential(scores, self.run.temperature)
        return self._select(self.weight.apply(state, value), scores, value)

    def move(self, state: Trajectory) -> Trajectory:
        """Draws the next state from the proposal: the state one level on."""
        model = state.process.transition(state.x, required(state.cache.x0), state.k)
        drawn = propose(self.proposal, state, model)
        state = state.step(drawn, self.run.key.fold("step"), model=None if drawn is model else model)
        return state if self.selection.moves is None else self.selection.moves.record(state, model)

    def close(self, state: Trajectory) -> tuple[Trajectory, Tensor]:
        """Weights the finished state by its reward: the state, and its scores [B, N]."""
        with torch.no_grad():
            scores = self.run.objective(state.x, FINISHED)
        value = log_potential(scores, self.run.temperature)
        state = self.weight.close(state, value)
        if state.k == state.process.steps and self.selection.moving(state.k):  # not where the run was interrupted
            state = self._select(state.with_step_cache(score=scores), scores, value)
            scores = required(state.cache.score)
        else:
            self.history.append(LevelRecord(state.process.steps, state.ess, scores))
        return forget(state), scores

    def _predict(self, state: Trajectory, key: Key, weighted: bool) -> tuple[Trajectory, Tensor | None]:
        return predict_and_score(state, self.run.objective, self.run.temperature, self.proposal, weighted, key)

    def _select(self, state: Trajectory, scores: Tensor, value: Tensor) -> Trajectory:
        """Resamples the problems whose ESS is low, and moves the copies."""
        before, moves = state, self.selection.moves
        state = select(state, scores, self.selection, self.run.key.fold("resample"), self.history)
        if moves is None or state is before or not self.selection.moving(state.k):
            return state
        parent = cast(ResamplingRecord, state.past[-1]).parent
        value = self.weight.tempered(before, value).gather(1, parent)
        return moves(state, value, self._judge, self.run.key.fold("moves"))

    def _judge(self, state: Trajectory, key: Key) -> tuple[Trajectory, Tensor]:
        """A moved state with what it caches, and its log-potential [B, M]."""
        if state.k == state.process.steps:
            with torch.no_grad():
                scores = self.run.objective(state.x, f"of paths moved to level {state.k}")
            state = state.with_step_cache(score=scores)
        else:
            state, seen = self._predict(state, key, True)
            scores = required(seen)
        return state, self.weight.tempered(state, log_potential(scores, self.run.temperature))


def _check_stochastic(process: ReverseProcess, level: int, count: int, selection: Resample) -> None:
    if count == 1 or selection.threshold == 0.0 or (level > 0 and level >= process.steps - 1):
        return
    if not any(process.stochastic(k) for k in range(level, process.steps)):
        raise NotStochasticError(
            "resampling makes copies that only noise can separate, and this process's transitions add none; use a "
            "stochastic rule, for instance process.with_rule(steer.ddim(eta=1.0)), or selection=steer.resample("
            "threshold=0) to weight without resampling"
        )
