"""`steer.own_solver`: a pipeline under its own deterministic solver, multistep ones included, as a reverse process.

DPM-Solver++, UniPC, Heun and others remember predictions of earlier steps. That memory belongs to a particle and must
move with it when a sampler resamples, branches or selects, so it is part of the state: entry 0 of axis 2 holds the
latents, the others hold the tensors that the scheduler keeps between steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..calls import Answer
from ..cost import Meter
from ..errors import ModelError, StateSpaceError
from ..key import Key
from ..processes.gaussian import GaussianProcess, need_gaussian_process
from ..processes.schedules import level
from ..processes.transitions import Normal
from . import noise_levels
from .from_pipeline import PipelineDenoiser

MemoryPlace = tuple[str, int | None]
"""Where a scheduler keeps a tensor: (name of an attribute, index in it if it is a list, else None)."""


def own_solver(process: GaussianProcess) -> SolverProcess:
    """Step a process by its pipeline's own scheduler, as `pipe(...)` does.

        process = steer.own_solver(steer.from_pipeline(pipe, prompt="a cat", steps=20))
        result = search.best_of_n(process, reward, budget=400)

    Args:
        process: A process from `steer.from_pipeline`.

    Returns:
        A process with states [B, N, 1 + S, *event]: the latents and S tensors of the solver's memory (0 for Euler and
        DDIM, 2 for second-order DPM-Solver++). It has one level per network evaluation, so twice as many for solvers
        that evaluate a level twice. Its steps draw nothing, so it suits methods that search over starting noise
        (`best_of_n`, `noise_search`, rollouts). Methods that need noise raise NotStochasticError; those that need
        gradients, or return to noisier levels, raise StateSpaceError.

    Raises:
        ModelError: Where the process has no pipeline, and for schedulers whose steps draw noise.

    Cost: none of the network; two runs of the scheduler on one row.
    """
    process = need_gaussian_process(
        process, "own_solver, which steps with a pipeline's scheduler,", cure="give it what from_pipeline returned"
    )
    denoiser = process.denoiser
    if not isinstance(denoiser, PipelineDenoiser):
        raise ModelError("own_solver steps with a pipeline's scheduler; this process has none: use steer.ddim(eta=0.0)")
    steered = denoiser.call.scheduler
    scheduler = steered.plain()
    scheduler.is_scale_input_called = True  # the pipeline's own call did so
    indices = tuple(range(steered.first, steered.first + steered.length))
    solver_steps = _dry_run(scheduler, scheduler.timesteps[indices[0] : indices[-1] + 1], process.event)
    slots = max(len(solver_step.places) for solver_step in solver_steps)
    return SolverProcess(process, scheduler, solver_steps, slots)


@dataclass(frozen=True, eq=False)
class SolverStep:
    """A scheduler just before one step: what all particles share, and where it keeps tensors of single particles."""

    timestep: Tensor
    shared: dict[str, Any]
    places: tuple[MemoryPlace, ...]


@dataclass(frozen=True, eq=False)
class SolverProcess:
    """A reverse process whose transitions are a scheduler's own steps. Built by `own_solver`.

    Args:
        process: The pipeline's process.
        scheduler: Its scheduler, before the first step.
        solver_steps: What the scheduler is before each step.
        slots: S, the number of tensors in the solver's memory.
    """

    process: GaussianProcess
    scheduler: Any
    solver_steps: tuple[SolverStep, ...]
    slots: int

    def __repr__(self) -> str:
        kind = type(self.scheduler).__name__
        return f"SolverProcess({kind}, event={self.event}, steps={self.steps}, {self.slots} tensors of memory)"

    @property
    def steps(self) -> int:
        """Network evaluations from noise to data."""
        return len(self.solver_steps)

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of one state: (1 + S, *event of the latents)."""
        return (1 + self.slots, *self.process.event)

    @property
    def problems(self) -> int | None:
        """Number of problems, or None where any number runs."""
        return self.process.problems

    @property
    def prompts(self) -> tuple[str, ...] | None:
        """Texts of the prompts, or None."""
        return self.process.prompts

    @property
    def rows(self) -> int:
        """Most network rows per prediction."""
        return max(self.rows_at(k) for k in range(self.steps))

    def rows_at(self, k: int) -> int:
        """Network rows of the prediction at level k."""
        return cast(PipelineDenoiser, self.process.denoiser).call.rows[k]

    @property
    def meter(self) -> Meter | None:
        """Where cost is counted; samplers set it."""
        return self.process.meter

    def prior(self, key: Key, batch: int, particles: int) -> Tensor:
        """Draw the pipeline's starting latents, with an empty memory: [B, N, 1 + S, *event]."""
        latents = self.process.prior(key, batch, particles)[:, :, None]
        return torch.cat([latents, *[torch.zeros_like(latents)] * self.slots], 2)

    @property
    def prior_moments(self) -> tuple[Tensor | None, float]:
        """Mean of the starting latents (None for zero) and their standard deviation; their memory is empty."""
        mean, std = self.process.prior_moments
        return None if mean is None else mean[:, :, None], std

    @property
    def device(self) -> torch.device | str:
        return self.process.device

    @property
    def dtype(self) -> torch.dtype:
        return self.process.dtype

    @property
    def text(self) -> None:
        """None: states are not text."""
        return None

    @property
    def visits(self) -> range:
        """Every level once, in order."""
        return range(self.steps + 1)

    @property
    def hooks(self) -> None:
        """None: nothing intervenes in the chain."""
        return None

    def denoise(self, x: Tensor, k: int, key: Key | None = None) -> Tensor:
        """The network's own output and the clean latents that follow from it, [B, N, 2, *event], at level k."""
        denoiser, latents = cast(PipelineDenoiser, self.process.denoiser), x[:, :, 0]
        meter = self.meter

        def paid(latents: Tensor) -> Answer:
            rows = latents.shape[0] * latents.shape[1] * self.rows_at(k)
            with nullcontext() if meter is None else meter.network(rows):
                return {"output": denoiser.output(latents, k)}

        output = (paid(latents) if meter is None else meter.call("denoise", k, paid, latents))["output"]
        grid = denoiser.grid
        at = level(grid.schedule, grid.times[max(i for i, index in enumerate(grid.indices) if index <= k)])
        return torch.stack([output, noise_levels.x0_from_output(output, latents, at, grid.kind, grid.data_std)], 2)

    def complete(self, x: Tensor, x0: Tensor) -> Tensor:
        """The clean state of a prediction, [B, N, 1 + S, *event]: its clean latents with an empty memory."""
        return torch.cat([x0[:, :, 1:], torch.zeros_like(x[:, :, 1:])], 2)

    def transition(self, x: Tensor, x0: Tensor, k: int) -> Normal:
        """The scheduler's own step from level k, a Normal of standard deviation 0."""
        solver_step, scheduler = self.solver_steps[k], copy.copy(self.scheduler)
        flat = x.flatten(0, 1)
        vars(scheduler).update(copy.copy(solver_step.shared))
        _write_memory(scheduler, solver_step.places, flat[:, 1:])
        latents = _scheduler_step(scheduler, x0[:, :, 0].flatten(0, 1), solver_step.timestep, flat[:, 0])
        memory = torch.zeros_like(flat[:, 1:])
        if k + 1 < self.steps:
            for slot, place in enumerate(self.solver_steps[k + 1].places):
                memory[:, slot] = _read_memory(scheduler, place)
        return Normal(torch.cat([latents[:, None], memory], 1).view(x.shape), 0.0)

    def stochastic(self, k: int) -> bool:
        """Whether the step from level k draws noise: always False."""
        return False

    def noise(self, x: Tensor, k_from: int, k_to: int, key: Key) -> Tensor:
        """Raises StateSpaceError unless the levels are equal, as a re-noised state has no earlier predictions."""
        if k_from == k_to:
            return x
        raise StateSpaceError(
            f"{type(self.scheduler).__name__} needs predictions of earlier steps, which a state of a "
            f"SolverProcess noised back to level {k_to} does not have; use this method on the "
            "process itself, without own_solver"
        )

    def decode(self, x: Tensor) -> Tensor:
        """What rewards see, decoded from the latents in states [B, N, 1 + S, *event]."""
        return self.process.decode(x[:, :, 0])

    def metered(self, meter: Meter) -> SolverProcess:
        """The process with its cost counted by `meter`."""
        return replace(self, process=self.process.metered(meter))

    def only(self, problem: int) -> SolverProcess:
        """The process of one problem."""
        return replace(self, process=self.process.only(problem))


def _dry_run(scheduler: Any, timesteps: Tensor, event: tuple[int, ...]) -> tuple[SolverStep, ...]:
    """Run the scheduler on made-up predictions to find out what it remembers before each step."""
    x = torch.ones(1, *event, device=timesteps.device)
    solver_steps: list[SolverStep] = []
    outcomes: list[Tensor] = []
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        for _ in range(2):  # a scheduler that draws noise ends elsewhere the second time
            player, state, passed = copy.deepcopy(scheduler), x, []
            solver_steps.clear()
            for i, timestep in enumerate(timesteps):
                places = tuple(_memory_places(player, x.shape))
                solver_steps.append(SolverStep(timestep, _shared_attributes(player, places), places))
                state = _scheduler_step(player, torch.full_like(x, 0.1 + 0.01 * i), timestep, state)
                passed.append(state)
            outcomes.append(torch.cat(passed))  # all states, as the last may not depend on the others
    if not torch.equal(*outcomes):
        raise ModelError(
            f"own_solver needs a scheduler without noise, and {type(scheduler).__name__} draws noise in its steps, "
            "from the global generator; leave own_solver out and choose a rule such as steer.ddim(eta=1.0), whose "
            "noise follows from key="
        )
    return tuple(solver_steps)


def _scheduler_step(scheduler: Any, output: Tensor, timestep: Tensor, x: Tensor) -> Tensor:
    """The state after the scheduler's own step; raises ModelError where that needs more than these arguments."""
    try:
        return scheduler.step(output, timestep, x, return_dict=False)[0]
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ModelError(
            f"own_solver needs a scheduler that steps by a prediction and its timestep alone; "
            f"{type(scheduler).__name__} raised {type(error).__name__}: {error}; leave own_solver out and choose "
            "steer.ddim(eta=0.0)"
        ) from error


def _memory_places(scheduler: Any, shape: torch.Size) -> Iterator[MemoryPlace]:
    """Where a scheduler keeps tensors of a batch's shape."""
    for name, value in vars(scheduler).items():
        entries = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        yield from ((name, i) for i, entry in entries if torch.is_tensor(entry) and entry.shape == shape)


def _shared_attributes(scheduler: Any, places: tuple[MemoryPlace, ...]) -> dict[str, Any]:
    """A scheduler's attributes, with None in place of tensors of single particles."""
    shared = {name: list(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}
    for name, i in places:
        if i is None:
            shared[name] = None
        else:
            shared[name][i] = None
    return shared


def _write_memory(scheduler: Any, places: tuple[MemoryPlace, ...], memory: Tensor) -> None:
    """Write particles' tensors [M, S, *event] into the scheduler, whose shared lists are copied first."""
    for name, value in list(vars(scheduler).items()):
        if isinstance(value, list):
            setattr(scheduler, name, list(value))
    for slot, (name, i) in enumerate(places):
        if i is None:
            setattr(scheduler, name, memory[:, slot])
        else:
            getattr(scheduler, name)[i] = memory[:, slot]


def _read_memory(scheduler: Any, place: MemoryPlace) -> Tensor:
    """The tensor that a scheduler keeps at a place."""
    name, i = place
    return getattr(scheduler, name) if i is None else getattr(scheduler, name)[i]
