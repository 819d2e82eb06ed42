"""A scheduler that makes the loop of its pipeline evaluate one chosen step.

A pipeline's loop asks its scheduler which steps there are (`timesteps`), how states are scaled (`scale_model_input`)
and what follows from a prediction (`step`). `SteeredScheduler` replaces these in a copy of the user's scheduler, so
that one call of the pipeline evaluates the one step that is wanted, and ends.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import ModelError
from ..types import Level

_REPLACED = ("set_timesteps", "step", "scale_model_input", "add_noise", "scale_noise")
"""Methods of a scheduler that `SteeredScheduler` replaces."""

Stage = Literal["before", "skip", "stub", "enter", "at", "stepped", "next", "after"]
"""Where the pipeline is, relative to its loop.

before: before the loop. skip: in an earlier step that it was asked to skip. stub: in an earlier step, on stubbed
networks. enter: in the step whose result is replaced by the job's latents. at: in the step to evaluate. stepped: past
`scheduler.step` in that step. next: in the step after it. after: past the loop.
"""


class CapturedStep(BaseException):
    """Ends a pipeline's call with what it gave to `scheduler.step`. A BaseException, as a pipeline may catch Exception.

    Args:
        output: The guided network output.
        sample: The latents that it was computed from.
    """

    def __init__(self, output: Tensor, sample: Tensor):
        super().__init__()
        self.output, self.sample = output, sample


class IgnoresInterrupt(BaseException):
    """Raised when the pipeline runs a step that it was asked to skip, as it ignores its `interrupt` flag."""


class SchedulerOutput(tuple):
    """What `step` returns to a pipeline: (x, x), with every attribute name that schedulers use."""

    prev_sample = pred_original_sample = denoised = property(lambda self: self[0])


class OffGridLevel(NamedTuple):
    """A noise level that is not one of the scheduler's.

    Args:
        timestep: The timestep to tell the networks.
        scale: Factor for states before the networks see them.
        sigma: Entry for the scheduler's table `sigmas`.
        level: The level on the path.
    """

    timestep: Tensor
    scale: float
    sigma: float
    level: Level


@dataclass(eq=False)
class Job:
    """What one call of the pipeline is for.

    Args:
        problems: The problem of each prompt in the call.
        rows_each: Rows per problem.
        index: The loop's own index of the step to evaluate; None: no step, the call continues to decode.
        x: Latents [len(problems) * rows_each, *event] to put into the loop; None: the pipeline's own.
        off_grid: A level to evaluate at instead of the step's own.
        noise: A number that replaces every draw of initial noise; None: draws.
        given: Whether the call has latents of the user's to start from.
        by_step: Whether latents enter as the result of the step before, on stubbed networks, instead of through
            prepare_latents, so that the pipeline does to them what it does between two steps.
        skip: Whether earlier steps are skipped by the pipeline's own `interrupt` flag, instead of running on stubbed
            networks.
        stubbed: Whether the step to evaluate runs on stubbed networks too, as only its latents are wanted.
        after: Function of what `step` received to what `step` returns; the call then ends at the next step, with what
            that receives (after the last step, with this result). None: the call ends at the step to evaluate.
        gradient: Whether the evaluation is recorded for differentiation.
        rows_by_step: Network rows asked for in each step of the loop, of stubbed networks too.
        sent: The latents as the pipeline got them.
        inputs: Where not None, what the networks are given in the step to evaluate is appended here.
    """

    problems: tuple[int, ...]
    rows_each: int
    index: int | None = None
    x: Tensor | None = None
    off_grid: OffGridLevel | None = None
    noise: float | None = None
    given: bool = False
    by_step: bool = False
    skip: bool = True
    stubbed: bool = False
    after: Callable[[Tensor, Tensor], Tensor] | None = None
    gradient: bool = False
    rows_by_step: Counter[int] = field(default_factory=Counter)
    sent: Tensor | None = None
    inputs: list[Any] | None = None


class SteeredScheduler:
    """Steers a deep copy of a scheduler by replacing methods of that instance.

    The copy's class stays what it was, because pipelines ask `type(scheduler)`; and the methods put in place are
    wrapped, because pipelines look for `sigmas`, `mu`, `eta` or `generator` in their signatures.

    Args:
        scheduler: The user's scheduler, which is only read.
        interrupt: Sets the pipeline's own `interrupt` flag.

    Attributes:
        steered: The copy.
        job: What the current call is for.
        stage: Where the pipeline is in it.
        loop_step: The loop's own index of the step that it is in.
        timesteps: The pipeline's own timesteps, all of the scheduler's.
        first: Index of the loop's first timestep.
        length: Number of timesteps in the loop.
    """

    def __init__(self, scheduler: Any, interrupt: Callable[[bool], None]):
        self.steered, self.scheduler_class = copy.deepcopy(scheduler), type(scheduler)
        self.interrupt = interrupt
        self.job = Job((0,), 1)
        self.stage: Stage = "before"
        self.timesteps: Tensor = torch.empty(0)
        self.first, self.length = 0, 0
        self._calls, self.loop_step, self._returned = 0, 0, torch.empty(0)
        self._known_attributes: dict[int, dict[str, Any]] = {}
        for name in _REPLACED:
            if hasattr(self.steered, name):
                replacement = functools.partial(getattr(self, f"_{name}"))
                setattr(self.steered, name, functools.wraps(getattr(self.steered, name))(replacement))

    def prepare(self, job: Job) -> None:
        """Prepare for the next call of the pipeline, which is for `job`."""
        self.job, self.stage, self._calls = job, "before", 0

    def plain(self) -> Any:
        """The scheduler with the pipeline's timesteps, not steered, as it is before its first step."""
        scheduler = copy.copy(self.steered)
        begin = vars(self.steered).get("_begin_index")
        vars(scheduler).update(self._known_attributes[max(self._known_attributes)])
        if begin is not None:
            scheduler._begin_index = begin
        for name in _REPLACED:
            vars(scheduler).pop(name, None)
        scheduler.timesteps = self.timesteps
        return scheduler

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """In place of the scheduler's own: computes the timesteps once, and gives the loop a grid that is steered."""
        # The same in every call of one pipeline, so computed once; restoring all attributes also resets the counters
        # and the histories that an earlier call left in the copy.
        self._calls += 1
        if self._calls not in self._known_attributes:
            self.scheduler_class.set_timesteps(self.steered, *args, **kwargs)
            self.timesteps = self.steered.timesteps.clone()
            self.steered.timesteps = steered_grid(self.timesteps.clone(), self._iterate)
            self._known_attributes[self._calls] = dict(vars(self.steered))
        vars(self.steered).update(self._known_attributes[self._calls])

    def _iterate(self, grid: Tensor) -> Iterator[Tensor]:
        """The timesteps that the pipeline's `for` iterates over, with `stage` set before each.

        Every earlier step is visited without effect, so that the loop's own index is right in the step to evaluate.
        """
        job, steps = self.job, grid.unbind()
        self.first, self.length = int(grid.storage_offset()), len(steps)
        passed = self._steps_to_pass(len(steps))
        for k in range(passed):
            entering = job.by_step and k == passed - 1
            self._set_stage("enter" if entering else "skip" if job.skip else "stub", False, k)
            yield steps[k]
        if job.index is None:
            self._set_stage("after", job.gradient, passed)
            return
        self._set_stage("at", job.gradient, job.index)
        yield (
            steps[job.index] if job.off_grid is None else self._off_grid_timestep(job.off_grid, self.first + job.index)
        )
        if self.stage == "stepped":
            if job.index + 1 == len(steps):
                raise CapturedStep(self._returned, self._returned)
            self._set_stage("next", False, job.index + 1)
            yield steps[job.index + 1]
        # No call of `step` came: the pipeline only read its timesteps, before its loop.
        self._set_stage("before", False, 0)
        yield from steps[max(job.index, passed) + 1 :]

    def _off_grid_timestep(self, level: OffGridLevel, index: int) -> Tensor:
        """The timestep of a level off the grid; its `sigmas` entry replaces the step's own (`sigma_entry_at`)."""
        if hasattr(self.steered, "sigmas"):
            self.steered.sigmas = self.steered.sigmas.clone()
            self.steered.sigmas[index] = level.sigma
        return level.timestep

    def _steps_to_pass(self, length: int) -> int:
        """Earlier steps to visit. Latents that enter by a step need one; decoders may read variables of the loop."""
        job = self.job
        if job.index is None:
            return length if job.skip or job.by_step else 0
        return max(job.index, 1 if job.by_step else 0)

    def _set_stage(self, stage: Stage, gradient: bool, step: int) -> None:
        """Enter a stage at a step of the loop."""
        self.stage, self.loop_step = stage, step
        self.interrupt(stage == "skip")
        # Pipelines run under no_grad; the step to evaluate may be differentiated. Restored when the call ends.
        torch.set_grad_enabled(gradient)

    def _scale_model_input(self, sample: Tensor, timestep: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """In place of the scheduler's own: scales states in the step to evaluate, and only there."""
        if self.stage != "at":
            return sample
        if self.job.off_grid is not None:
            return sample * self.job.off_grid.scale
        if self.job.index is not None:
            self.steered._step_index = self.first + self.job.index
        return self.scheduler_class.scale_model_input(self.steered, sample, timestep, *args, **kwargs)

    def _step(self, model_output: Any, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs):
        """In place of the scheduler's own: ends the call with what it is given, or returns latents without a step."""
        job = self.job
        if self.stage == "skip":
            raise IgnoresInterrupt
        if self.stage == "before":
            raise ModelError(
                "from_pipeline opens pipelines whose loop iterates over scheduler.timesteps, and this one's does not; "
                "wrap its network by steer.from_velocity, from_eps, from_edm or from_denoiser"
            )
        if self.stage == "stepped" or kwargs.get("per_token_timesteps") is not None:
            how = "twice in a step" if self.stage == "stepped" else "with one timestep per token"
            raise ModelError(
                f"the pipeline calls scheduler.step {how}, so its step depends on more than what it predicts; open its "
                "network by steer.from_velocity, from_eps, from_edm or from_denoiser"
            )
        if self.stage == "next" or (self.stage == "at" and job.after is None):
            raise CapturedStep(model_output, sample)
        x = sample
        if self.stage == "enter":
            assert job.x is not None
            torch.set_grad_enabled(job.gradient)  # what the rest of this step does to x is differentiated too
            x = job.sent = _as_copies(job.x, sample)
        elif job.after is not None and self.stage == "at":
            x = self._returned = _as_copies(job.after(model_output, sample), sample)
            self.stage = "stepped"
        if hasattr(self.steered, "_step_index"):  # pipelines read the counter after a step
            self.steered._step_index = self.first + self.loop_step + 1
        return SchedulerOutput((x, x))

    def _add_noise(self, clean: Tensor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """In place of the scheduler's own: at a level off the grid too."""
        level = self._entering_level()
        if level is None:
            return self.scheduler_class.add_noise(self.steered, clean, noise, *args, **kwargs)
        return level.alpha * clean + level.sigma * noise

    def _scale_noise(self, sample: Tensor, timestep: Any, noise: Any = None, **kwargs: Any) -> Tensor:
        """In place of the flow scheduler's own `add_noise`: at a level off the grid too."""
        level = self._entering_level()
        if level is None:
            return self.scheduler_class.scale_noise(self.steered, sample, timestep, noise, **kwargs)
        return level.alpha * sample + level.sigma * noise

    def _entering_level(self) -> Level | None:
        """The level off the grid that latents enter at, to which inpainting noises the known part."""
        return self.job.off_grid.level if self.stage == "enter" and self.job.off_grid is not None else None


def _as_copies(x: Tensor, sample: Tensor) -> Tensor:
    """New latents in place of a sample, repeated where the loop carries every row once per guidance branch.

    Always a new tensor, as some loops write into their latents.
    """
    return x.to(sample.dtype).repeat(max(1, len(sample) // len(x)), *[1] * (x.ndim - 1))


def steered_grid(timesteps: Tensor, visit: Callable[[Tensor], Iterator[Tensor]]) -> Tensor:
    """Timesteps as a tensor that a loop iterates over by `visit`.

    Its slices are too, as image-to-image starts halfway. Anything else computed from it is a plain tensor, as pipelines
    compute latents and embeddings from their timesteps.

    Args:
        timesteps: The timesteps [K].
        visit: Function of the timesteps that a loop would iterate over to the iterator to use instead.

    Returns:
        The tensor, which raises ModelError when it is deep-copied.
    """

    class SteeredGrid(torch.Tensor):
        def __iter__(self) -> Iterator[Tensor]:
            return visit(self.as_subclass(torch.Tensor))

        def __deepcopy__(self, memo: Any) -> Any:
            raise ModelError(
                "the pipeline copies its scheduler while it runs (for one noise level per frame, say), and steer "
                "steers one; use a pipeline with one noise level for all, or wrap the network by steer.from_denoiser"
            )

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
                sliced = func is torch.Tensor.__getitem__ and isinstance(args[1], slice)
                return result.as_subclass(cls) if sliced else result

    return timesteps.as_subclass(SteeredGrid)
