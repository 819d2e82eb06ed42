"""A pipeline under its own deterministic solver, multistep ones included, as a reverse process.

DPM-Solver++, UniPC, Heun and others remember predictions of earlier steps. That memory belongs to a particle: when a
sampler resamples, branches or selects, it must move along. So it is part of the state: slot 0 of axis 2 holds the
latents, the others the tensors that the scheduler keeps between steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..cost import Meter
from ..errors import ModelError, StateSpaceError
from ..key import Key
from ..processes.gaussian import GaussianProcess, need_gaussian_process
from ..processes.schedules import level
from ..processes.transitions import Normal
from . import noise_levels
from .from_pipeline import PipelineDenoiser

Place = tuple[str, int | None]
"""An attribute of a scheduler, or an entry of one that is a list."""


def own_solver(process: GaussianProcess) -> SolverProcess:
    """The process stepped by its pipeline's own scheduler, as `pipe(...)` would.

        process = steer.own_solver(steer.from_pipeline(pipe, prompt="a cat", steps=20))
        result = search.best_of_n(process, reward, budget=400)

    States are (B, N, 1 + S, *event): latents, and S tensors of the solver's memory (0 for Euler and DDIM, 2 for
    second-order DPM-Solver++). One level per network evaluation: twice as many for solvers that evaluate a level twice.
    Steps draw nothing, so this is for methods that search starting noises (`best_of_n`, `noise_search`, rollouts);
    methods that need noise raise NotStochasticError, those that need gradients or go back StateSpaceError.
    Raises ModelError where no pipeline is behind the process, and for schedulers whose steps draw noise.
    """
    process = need_gaussian_process(
        process, "own_solver, which steps with a pipeline's scheduler,", cure="give it what from_pipeline returned"
    )
    denoiser = process.denoiser
    if not isinstance(denoiser, PipelineDenoiser):
        raise ModelError("own_solver steps with a pipeline's scheduler; this process has none: use steer.ddim(eta=0.0)")
    steered = denoiser.call.scheduler
    scheduler = steered.plain()
    scheduler.is_scale_input_called = True  # it was, inside the pipeline's call
    indices = tuple(range(steered.first, steered.first + steered.length))
    stages = _rehearse(scheduler, scheduler.timesteps[indices[0] : indices[-1] + 1], process.event)
    slots = max(len(stage.places) for stage in stages)
    return SolverProcess(process, scheduler, stages, slots)


@dataclass(frozen=True, eq=False)
class Stage:
    """A scheduler before one step: attributes that are the same for every particle, and where the others are."""

    timestep: Tensor
    shared: dict[str, Any]
    places: tuple[Place, ...]


@dataclass(frozen=True, eq=False)
class SolverProcess:
    """A ReverseProcess whose transitions are a scheduler's own steps. Built by `own_solver`."""

    process: GaussianProcess
    scheduler: Any
    stages: tuple[Stage, ...]
    slots: int

    def __repr__(self) -> str:
        kind = type(self.scheduler).__name__
        return f"SolverProcess({kind}, event={self.event}, steps={self.steps}, {self.slots} tensors of memory)"

    @property
    def steps(self) -> int:
        """Network evaluations from noise to data."""
        return len(self.stages)

    @property
    def event(self) -> tuple[int, ...]:
        """(1 + slots, *event of the latents)."""
        return (1 + self.slots, *self.process.event)

    @property
    def problems(self) -> int | None:
        return self.process.problems

    @property
    def prompts(self) -> tuple[str, ...] | None:
        return self.process.prompts

    @property
    def rows(self) -> int:
        return self.process.rows

    @property
    def meter(self) -> Meter | None:
        return self.process.meter

    def prior(self, key: Key, batch: int, particles: int) -> Tensor:
        """Starting latents as the pipeline's, and an empty memory."""
        latents = self.process.prior(key, batch, particles)[:, :, None]
        return torch.cat([latents, *[torch.zeros_like(latents)] * self.slots], 2)

    @property
    def prior_moments(self) -> tuple[Tensor | None, float]:
        """Mean of the starting latents, None for zero, and their standard deviation: the first step has no memory."""
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
        """What the network predicts, in its own terms, and the clean latents that stands for: (B, N, 2, *event)."""
        denoiser, latents = cast(PipelineDenoiser, self.process.denoiser), x[:, :, 0]
        rows = x.shape[0] * x.shape[1] * self.rows
        if self.meter is None:
            output = denoiser.output(latents, k)
        else:
            with self.meter.network(rows):
                output = denoiser.output(latents, k)
        grid = denoiser.grid
        at = level(grid.schedule, grid.times[max(i for i, index in enumerate(grid.indices) if index <= k)])
        return torch.stack([output, noise_levels.x0_of(output, latents, at, grid.kind, grid.data_std)], 2)

    def complete(self, x: Tensor, x0: Tensor) -> Tensor:
        """The clean latents of a prediction, with no memory."""
        return torch.cat([x0[:, :, 1:], torch.zeros_like(x[:, :, 1:])], 2)

    def transition(self, x: Tensor, x0: Tensor, k: int) -> Normal:
        """The scheduler's step, without noise."""
        stage, scheduler = self.stages[k], copy.copy(self.scheduler)
        flat = x.flatten(0, 1)
        vars(scheduler).update(copy.copy(stage.shared))
        _put(scheduler, stage.places, flat[:, 1:])
        latents = _stepped(scheduler, x0[:, :, 0].flatten(0, 1), stage.timestep, flat[:, 0])
        memory = torch.zeros_like(flat[:, 1:])
        if k + 1 < self.steps:
            for slot, place in enumerate(self.stages[k + 1].places):
                memory[:, slot] = _get(scheduler, place)
        return Normal(torch.cat([latents[:, None], memory], 1).view(x.shape), 0.0)

    def stochastic(self, k: int) -> bool:
        """Never."""
        return False

    def noise(self, x: Tensor, k_from: int, k_to: int, key: Key) -> Tensor:
        """Refused: a noised state has no earlier predictions for the solver to go on from."""
        if k_from == k_to:
            return x
        raise StateSpaceError(
            f"a SolverProcess keeps the memory of {type(self.scheduler).__name__}, which has no value at a state that "
            "was noised back; search with the process itself, without own_solver"
        )

    def decode(self, x: Tensor) -> Tensor:
        """Latents as rewards see them."""
        return self.process.decode(x[:, :, 0])

    def metered(self, meter: Meter) -> SolverProcess:
        return replace(self, process=self.process.metered(meter))

    def only(self, problem: int) -> SolverProcess:
        return replace(self, process=self.process.only(problem))


def _rehearse(scheduler: Any, timesteps: Tensor, event: tuple[int, ...]) -> tuple[Stage, ...]:
    """The scheduler before each step of a run on stand-ins, which finds out what it remembers."""
    x = torch.ones(1, *event, device=timesteps.device)
    stages: list[Stage] = []
    outcomes: list[Tensor] = []
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        for _ in range(2):  # a scheduler that draws noise passes elsewhere the second time
            player, state, passed = copy.deepcopy(scheduler), x, []
            stages.clear()
            for i, timestep in enumerate(timesteps):
                places = tuple(_remembered(player, x.shape))
                stages.append(Stage(timestep, _without(player, places), places))
                state = _stepped(player, torch.full_like(x, 0.1 + 0.01 * i), timestep, state)
                passed.append(state)
            outcomes.append(torch.cat(passed))  # all: a last step may keep nothing of the state
    if not torch.equal(*outcomes):
        raise ModelError(
            f"{type(scheduler).__name__} draws noise in its steps, which its global generator would name; leave "
            "own_solver out: steer.ddim(eta=1.0) and other rules draw noise that is named by key"
        )
    return tuple(stages)


def _stepped(scheduler: Any, output: Tensor, timestep: Tensor, x: Tensor) -> Tensor:
    try:
        return scheduler.step(output, timestep, x, return_dict=False)[0]
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ModelError(
            f"{type(scheduler).__name__} does not step by a prediction and its timestep alone, it raised "
            f"{type(error).__name__}: {error}; leave own_solver out: steer.ddim(eta=0.0) steps without it"
        ) from error


def _remembered(scheduler: Any, shape: torch.Size) -> Iterator[Place]:
    """Where a scheduler holds tensors of a batch's shape."""
    for name, value in vars(scheduler).items():
        entries = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        yield from ((name, i) for i, entry in entries if torch.is_tensor(entry) and entry.shape == shape)


def _without(scheduler: Any, places: tuple[Place, ...]) -> dict[str, Any]:
    """A scheduler's attributes with None where a particle's tensors are."""
    shared = {name: list(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}
    for name, i in places:
        if i is None:
            shared[name] = None
        else:
            shared[name][i] = None
    return shared


def _put(scheduler: Any, places: tuple[Place, ...], memory: Tensor) -> None:
    """Particles' tensors (M, S, *event) into their places; lists are copied, for others share them."""
    for name, value in list(vars(scheduler).items()):
        if isinstance(value, list):
            setattr(scheduler, name, list(value))
    for slot, (name, i) in enumerate(places):
        if i is None:
            setattr(scheduler, name, memory[:, slot])
        else:
            getattr(scheduler, name)[i] = memory[:, slot]


def _get(scheduler: Any, place: Place) -> Tensor:
    name, i = place
    return getattr(scheduler, name) if i is None else getattr(scheduler, name)[i]
