"""Where particles begin: the prior, a start that spends network rows, or a trajectory to resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, runtime_checkable

from ..cost import affordable, rows_between
from ..errors import BudgetError, ShapeError, SteerError, keep_partial
from ..key import Key
from ..processes.gaussian import check_batch
from ..processes.second_order import SecondOrderProcess, model_of, state_shape
from ..types import ReverseProcess
from .objective import Objective
from .trajectory import Trajectory

Start = Callable[[ReverseProcess, Objective, Key, int, int], Trajectory]
"""(process, objective, key, batch, particles) -> Trajectory. Weights it sets are kept, and what it has spent.

A start whose particles are already tilted by exp(v) says so in `path.log_potential = v`: the potentials on the way
multiply in what is missing, and no reward is counted twice. Where the normaliser of its law is not known it sets
log_evidence to NaN, and the run's evidence is NaN.
"""


@runtime_checkable
class PreparedStart(Protocol):
    """A start that spends network rows, or that takes its temperature from the run unless it has its own."""

    def __call__(
        self, process: ReverseProcess, objective: Objective, key: Key, batch: int, particles: int, /
    ) -> Trajectory: ...

    def prepare(self, process: ReverseProcess, temperature: float) -> tuple[Start, int]:
        """The start at the run's temperature, and the network rows per problem that it will spend."""
        ...


@runtime_checkable
class CheckedStart(PreparedStart, Protocol):
    """A start at level 0 that can say beforehand that it does not fit."""

    def check(self, process: ReverseProcess, objective: Objective, particles: int) -> None:
        """Raises what the start would raise of its arguments, before it pays for anything."""
        ...


def prior(process: ReverseProcess, objective: Objective, key: Key, batch: int, particles: int) -> Trajectory:
    """The start every chain has by default: draws of the process's prior.

    Args:
        process: the model.
        objective: the run's reward on it, which this start does not use.
        key: names the draws.
        batch: B, independent problems.
        particles: N per problem.

    Returns:
        A trajectory at level 0 with states [B, N, *event] of equal weight.

    Raises:
        ShapeError: the process is conditioned on another number of problems.

    Cost: none.
    """
    del objective
    return Trajectory.begin(process, process.prior(key.fold("prior"), batch, particles))


def started(
    start: Start, process: ReverseProcess, objective: Objective, key: Key, batch: int, particles: int
) -> Trajectory:
    """The population that a start gives. It draws noisy states; where steps remember, these begin with no memory."""
    if not isinstance(process, SecondOrderProcess):
        return start(process, objective, key, batch, particles)
    model = model_of(process)

    def lifted(state: Trajectory) -> Trajectory:
        return replace(state, process=process, x=process.begun(state.x))

    try:
        return lifted(start(model, replace(objective, process=model), key, batch, particles))
    except BaseException as error:
        if isinstance(partial := getattr(error, "partial", None), Trajectory):
            keep_partial(error, lifted(partial), instead=True)
        raise


def prepared(
    start: Start,
    process: ReverseProcess,
    temperature: float,
    *,
    particles: int | None,
    budget: int | None,
    price: Callable[[int], int] | None = None,
) -> tuple[Start, int]:
    """A start ready for a run at that temperature, and how many whole chains it leaves the budget for.

    Args:
        start: any start.
        process: the model.
        temperature: of the run; starts without one of their own take it.
        particles: N per problem, or None for what the budget pays for.
        budget: network rows per problem, never exceeded.
        price: network rows per problem of a run by its number of particles, where it is more than their chains.

    Raises:
        BudgetError: the budget pays for no particle.
    """
    start, before = start.prepare(process, temperature) if isinstance(start, PreparedStart) else (start, 0)
    rows = rows_between(process, 0, process.steps) if price is None else price
    return start, affordable(rows, particles=particles, budget=budget, before=before)


def check_resume(
    state: Trajectory, process: ReverseProcess, particles: int | None, batch: int, budget: int | None, rows: int = 1
) -> Trajectory:
    """Validates a trajectory to resume.

    Args:
        state: as an `Event` held it.
        process: the model, which takes the place of the one that the state was made by.
        particles, batch, budget: as the caller gave them.
        rows: network rows per row of a prediction that is still to come.

    Raises:
        ShapeError: of another event, number of problems or level.
        SteerError: it is a run's end, other numbers than its own were asked for, or its weights are those of another
            product of models.
        BudgetError: what is left of its chains costs more than the budget.
    """
    shape = state_shape(process, state.k)
    if tuple(state.x.shape[2:]) != shape or not 0 <= state.k <= process.steps:
        raise ShapeError(
            f"a trajectory to resume must have event {shape} and a level in [0, {process.steps}], "
            f"got event {tuple(state.x.shape[2:])} at level {state.k}"
        )
    if state.path.final_applied:
        raise SteerError(
            "a trajectory to resume is one that a run passed through, and this one is a run's end: its weights hold "
            "the final reward, and where it was stopped its states are predictions; keep `event.state` of on_step "
            "instead"
        )
    made, wanted = _exponents(state.process, state.k), _exponents(process, state.k)
    if made != wanted:
        raise SteerError(
            f"the weights of this trajectory are those of models to the powers {made}, and this run's target at level "
            f"{state.k} has powers {wanted}; go on by the method, models and exponents that made it"
        )
    problems, count = state.x.shape[:2]
    check_batch(process.problems, problems)
    if particles not in (None, count) or batch not in (1, problems):
        raise SteerError(
            f"a trajectory to resume has its own numbers, {problems} problem(s) of {count} particle(s); got "
            f"batch={batch}, particles={particles}; leave them out"
        )
    price = count * rows_between(process, state.k, process.steps) * rows
    if budget is not None and price > budget:
        raise BudgetError(
            f"resuming from level {state.k} takes {price} network rows per problem, more than a budget of {budget}; "
            f"raise it to {price}, or select fewer particles (Trajectory.select)"
        )
    return replace(state, process=process)


def _exponents(process: ReverseProcess, k: int) -> tuple[float, ...]:
    """The powers of the models whose product a process stands for at level k (`Composite.at`); (1,) for a model."""
    at = getattr(process, "at", None)
    return (1.0,) if at is None else tuple(at(k))
