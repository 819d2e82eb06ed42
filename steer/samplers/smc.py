"""Sequential Monte Carlo on a reverse process: the one particle loop.

A run is a choice of four parts that compose: a start, a proposal, a weight and a selection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..core.log_weights import log_potential
from ..core.objective import Objective, check_finite, check_temperature, conditioned, open_run
from ..core.start import Start, prepared, prior, resumed
from ..core.trajectory import Ancestors, Seen, Trajectory
from ..errors import NotStochasticError, SteerError
from ..key import Key, as_key
from ..particles.path_mcmc import forget
from ..particles.potentials import Weight, difference
from ..particles.proposals import Proposal, bootstrap, evaluated
from ..particles.selection import Resample, check, resample, select
from ..results.result import Result
from ..types import GaussianTransition, OnStep, ReverseProcess, Reward, Stop


def smc(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    start: Start | Trajectory = prior,
    proposal: Proposal = bootstrap,
    weight: Weight | None = None,
    selection: Resample | None = None,
    keep_states: bool = False,
    on_step: OnStep | None = None,
) -> Result:
    """Weighted samples of p(x) exp(r(x) / temperature), and the log of its normaliser.

    batch:       B independent problems (a conditioned process fixes it).
    particles:   N per problem, 16 by default; or budget, network rows per problem, never exceeded.
    temperature: > 0, in units of the reward; inf ignores the reward.
    start:       where particles begin: `prior`, another start (`pcnl`, `mala`, `ula`, `top_k_of_n`), whose cost comes
                 out of the budget, or a Trajectory to go on from.
    proposal:    `bootstrap`, or `guided(scale)` for the gradient of r(x0_hat).
    weight:      potential at intermediate levels: `difference()` by default, `maximum()`, `total()`, `final_only()`.
    selection:   `resample(resampler, threshold, at)`; systematic below half of N by default.
    keep_states: remember every state and density (for `Trajectory.states` and `.transitions`).
    on_step:     called with the Trajectory after each step; raising `Stop` ends the run with what there is.

    Returns x (B, N, *event), reward (B, N), log_weight (B, N) that sum to one, log_evidence (B,), which is NaN after a
    start of unknown normaliser.
    Cost per problem: N K network rows (K = process.steps), N K rewards at the default weight; with guidance also up
    to N K backward passes. One prediction per state serves its weight, its proposal and the next step.
    Raises NonFiniteError, CollapsedWeightsError, NotStochasticError, NotDifferentiableError, RewardError, ShapeError;
    each carries what was paid for in `.partial`.
    Source: Del Moral 2004; Wu et al. 2023 (TDS), Alg. 1; Singhal et al. 2025 (FK steering). Differs: potentials close
    on r(x_0); weights not used up by a resampling are carried; resampling precedes the proposal, so that copies of a
    particle share its prediction and separate in the same step; the evidence is always returned.
    """
    temperature, key = check_temperature(temperature), as_key(key)
    weight, selection = weight or difference(), selection or resample()
    process, objective, meter = open_run(process, reward, key=key)
    if isinstance(start, Trajectory):
        state = resumed(start, process, particles, batch, budget)
    else:
        price = None if selection.moves is None else partial(selection.moves.rows, process)
        start, count = prepared(start, process, temperature, particles=particles, budget=budget, price=price)
        state = start(process, objective, key, conditioned(process, batch), count)
    state = replace(state, keep_states=keep_states)
    if "spent" not in state.memory:
        state = state.remember(spent=torch.zeros_like(state.log_weight))
    _check_stochastic(state, selection)
    loop = _Loop(objective, temperature, proposal, weight, selection, key, [])
    paid = state = loop.begun(state)  # paid: the last state with its prediction, for runs that end early
    interrupted = False
    try:
        try:
            for k in range(state.k, process.steps):
                paid = state = loop.weighed(state, weight.active(k, process.steps))
                state = loop.stepped(state)
                if on_step is not None:
                    on_step(state)
        except (Stop, KeyboardInterrupt):
            if "x0" not in paid.carried:
                raise
            state, interrupted = replace(paid, x=process.complete(paid.x, paid.carried["x0"])), True
        state, scores = loop.closed(state)
        check(state, loop.seen)
    except SteerError as error:
        error.keep(paid)
        raise
    return Result.of(
        state, scores, key=key, cost=meter.cost(), temperature=temperature, seen=tuple(loop.seen),
        interrupted=interrupted,
    )  # fmt: skip


@dataclass(frozen=True)
class _Loop:
    """What happens to a population between two levels, with what it depends on."""

    objective: Objective
    temperature: float
    proposal: Proposal
    weight: Weight
    selection: Resample
    key: Key
    seen: list[Seen]

    def begun(self, state: Trajectory) -> Trajectory:
        """The state remembering what moves will need of its beginning."""
        moves = self.selection.moves
        if moves is None:
            return state
        if not self.weight.telescopes or state.keep_states:
            raise SteerError(
                "moves change paths: their target must be a function of the latest state, which weight="
                "steer.difference() and final_only() give, and states kept from before them would connect to nothing; "
                "use such a weight and keep_states=False, or run without moves"
            )
        steps = state.process.steps
        idle = [
            k for k in sorted(moves.at) if not (k == steps or (state.k <= k < steps and self.weight.active(k, steps)))
        ]
        if idle:
            raise SteerError(
                f"particles are moved at levels that are weighted, and at the end, {steps}; {idle} of path_moves are "
                "neither; change them, or the weight's levels"
            )
        return moves.begin(state)

    def weighed(self, state: Trajectory, weighted: bool) -> Trajectory:
        """The state carrying its prediction, reweighted and resampled where its level is."""
        state, scores = evaluated(state, self.objective, self.temperature, self.proposal, weighted)
        if scores is None:
            return state
        value = log_potential(scores, self.temperature)
        return self._selected(self.weight.apply(state, value), scores, value)

    def stepped(self, state: Trajectory) -> Trajectory:
        """The state one level on."""
        model = state.process.transition(state.x, state.carried["x0"], state.k)
        drawn = self.proposal(state, cast(GaussianTransition, model)) if len(state.carried) > 1 else model
        state = state.step(drawn, self.key.fold("step"), model=None if drawn is model else model)
        return state if self.selection.moves is None else self.selection.moves.record(state, model)

    def closed(self, state: Trajectory) -> tuple[Trajectory, Tensor]:
        """The finished state, weighted by its reward, and its scores."""
        with torch.no_grad():
            scores = self.objective(state.x)
        value = log_potential(scores, self.temperature)
        state = self.weight.close(state, value)
        if state.k == state.process.steps and self.selection.moving(state.k):  # not where the run was interrupted
            state = self._selected(state.carry(score=scores), scores, value)
            scores = state.carried["score"]
        else:
            self.seen.append(Seen(state.process.steps, state.ess, scores))
        return forget(state), scores

    def _selected(self, state: Trajectory, scores: Tensor, value: Tensor) -> Trajectory:
        """The state resampled in the problems whose ESS is low, and its copies moved."""
        before, moves = state, self.selection.moves
        state = select(state, scores, self.selection, self.key.fold("resample"), self.seen)
        if moves is None or state is before or not self.selection.moving(state.k):
            return state
        parent = cast(Ancestors, state.past[-1]).parent
        value = self.weight.tempered(before, value).gather(1, parent)
        return moves(state, value, self._judged, self.key.fold("moves"))

    def _judged(self, state: Trajectory) -> tuple[Trajectory, Tensor]:
        """A moved state with what it carries, and its log-potential."""
        if state.k == state.process.steps:
            with torch.no_grad():
                scores = self.objective(state.x)
            state = state.carry(score=scores)
        else:
            state, seen = evaluated(state, self.objective, self.temperature, self.proposal, True)
            scores = cast(Tensor, seen)
        check_finite(scores, f"of paths moved to level {state.k}")
        return state, self.weight.tempered(state, log_potential(scores, self.temperature))


def _check_stochastic(state: Trajectory, selection: Resample) -> None:
    process = state.process
    if state.x.shape[1] == 1 or selection.threshold == 0.0 or (state.k > 0 and state.k >= process.steps - 1):
        return
    if not any(process.stochastic(k) for k in range(state.k, process.steps)):
        raise NotStochasticError(
            "resampling makes copies that only noise can separate, and this process's transitions add none; use a "
            "stochastic rule, for instance process.with_rule(steer.ddim(eta=1.0)), or selection=steer.resample("
            "threshold=0) to weight without resampling"
        )
