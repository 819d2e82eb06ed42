"""Unsteered samples of the model."""

from __future__ import annotations

from dataclasses import replace

from ..core.chain import run_chain
from ..core.checkpoints import Checkpoints
from ..core.event import OnStep
from ..core.loop import Loop
from ..core.run import Run
from ..core.start import Start, prepared, prior, started
from ..core.trajectory import LevelRecord
from ..key import Key
from ..particles.selection import check
from ..results.result import Law, Result
from ..types import ReverseProcess, Reward


def rollout(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    seed: int | None = None,
    start: Start = prior,
    keep_states: bool = True,
    on_step: OnStep | None = None,
) -> Result:
    """Unsteered samples of the model, of equal weight, with the log-probability of every step.

    Args:
        start: `prior`, or a start that knows the reward, which no weight corrects for here.
        keep_states: keep every state and log-density; on by default.
        Others: as `steer.smc`. temperature is noted in the result, and used by starts only.

    Returns:
        Result with x [B, N, *event], reward [B, N] and equal weights; log_evidence [B] is 0 after `prior` and NaN
        elsewhere. `law` is "model" after `prior` and "none" after another start. `result.trajectory.transitions()`
        gives (k, x, x_next, log_prob, ...) along each chain, log-probabilities summed over coordinates, float64.

    Raises:
        NonFiniteError, RewardError, ShapeError, BudgetError: as `steer.smc`.
        CollapsedWeightsError: where every chain of a start met nothing but forbidden predictions.

    Cost: per problem N K network rows and N rewards.
    """
    run = Run.open(
        "rollout",
        process,
        reward,
        batch=batch,
        temperature=temperature,
        key=key,
        seed=seed,
        on_step=on_step,
        groupwise=True,
    )
    begin, count = prepared(start, run.process, run.temperature, particles=particles, budget=budget)
    loop = Loop(run)
    with loop.keeping_partial():
        loop.partial = state = started(begin, run.process, run.objective, run.key, run.problems, count)
        kept = Checkpoints(run, replace(state, keep_states=keep_states))
        loop.partial = state = run_chain(loop, kept.state, reached=kept.reached)
        scores = run.score(state.x)
        check(state)
    law: Law = "model" if start is prior else "none"
    seen = [LevelRecord(run.process.steps, state.ess, scores)]
    return Result.from_population(run, state, scores, law=law, seen=seen, interrupted=loop.interrupted)
