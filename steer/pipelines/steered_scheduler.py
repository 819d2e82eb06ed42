"""A scheduler that steers the loop of the pipeline which owns it.

A pipeline's loop asks its scheduler for everything that matters here: which steps there are (`timesteps`), how states
are scaled (`scale_model_input`), and what follows from a prediction (`step`). `SteeredScheduler` answers these for a
copy of the user's scheduler, so that one call of the pipeline evaluates the one step that is wanted, and leaves.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ModelError
from ..types import Level

_REPLACED = ("set_timesteps", "step", "scale_model_input", "add_noise", "scale_noise")


class Captured(BaseException):
    """Leaves a pipeline's call with what it handed to `scheduler.step`.

    A BaseException, as a pipeline may catch Exception.
    """

    def __init__(self, output: Tensor, sample: Tensor):
        super().__init__()
        self.output, self.sample = output, sample


class IgnoresInterrupt(BaseException):
    """The pipeline ran a step that it was asked to skip: it does not look at `interrupt`."""


class Stepped(tuple):
    """What `step` returns to a pipeline: (x, x), under every name that schedulers give it."""

    prev_sample = pred_original_sample = denoised = property(lambda self: self[0])


class OffGrid(NamedTuple):
    """A level that is not one of the scheduler's: what the networks are told, how states are scaled, its `sigma`."""

    timestep: Tensor
    scale: float
    sigma: float
    level: Level


@dataclass(eq=False)
class Job:
    """What one call of the pipeline is for.

    problems:  the problem of each prompt in the call; per: rows of each.
    index:     the loop's step to evaluate; None: none, the call goes on to decode.
    x:         latents (len(problems) * per, *event) to put into the loop; None: the pipeline's own.
    off_grid:  a level to evaluate at instead of the step's own.
    noise:     the number that stands for every draw of initial noise; None: draws.
    given:     the call carries latents of the user's to start from.
    by_step:   latents enter as the result of the step before, on stubbed networks, not through prepare_latents: what
               the pipeline does to them between two steps, it does to these.
    skip:      earlier steps are passed by the pipeline's own `interrupt` flag, not on stubbed networks.
    stubbed:   the step wanted runs on stubs too: only its latents are of interest.
    after:     called with what `step` received; its answer is what `step` returns, and the call ends at the next step,
               with what that receives (after the last, with that answer). None: the call ends at the step wanted.
    gradient:  whether the evaluation is recorded for differentiation.
    rows:      network rows evaluated, filled in by the networks.
    sent:      the latents as the pipeline got them.
    """

    problems: tuple[int, ...]
    per: int
    index: int | None = None
    x: Tensor | None = None
    off_grid: OffGrid | None = None
    noise: float | None = None
    given: bool = False
    by_step: bool = False
    skip: bool = True
    stubbed: bool = False
    after: Callable[[Tensor, Tensor], Tensor] | None = None
    gradient: bool = False
    rows: int = 0
    sent: Tensor | None = None


class SteeredScheduler:
    """Steers `copy`, a deep copy of a scheduler, through attributes of that instance.

    Its class stays what it was, because pipelines ask `type(scheduler)`; and the methods put in its place are wrapped,
    because pipelines look for `sigmas`, `mu`, `eta` or `generator` in their signatures.

    stage: where the pipeline is. "before" its loop; at a step to "skip", to "stub", where latents "enter", to evaluate
           ("at"), past its step ("stepped") or at the "next" one; "after".
    """

    def __init__(self, scheduler: Any, interrupt: Callable[[bool], None]):
        self.copy, self.kind = copy.deepcopy(scheduler), type(scheduler)
        self.interrupt = interrupt
        self.job, self.stage = Job((0,), 1), "before"
        self.timesteps: Tensor = torch.empty(0)
        self.first, self.length = 0, 0
        self._calls, self._body, self._returned = 0, 0, torch.empty(0)
        self._known: dict[int, dict[str, Any]] = {}
        for name in _REPLACED:
            if hasattr(self.copy, name):
                replacement = functools.partial(getattr(self, f"_{name}"))
                setattr(self.copy, name, functools.wraps(getattr(self.copy, name))(replacement))

    def begin(self, job: Job) -> None:
        """Prepares for the next call of the pipeline."""
        self.job, self.stage, self._calls = job, "before", 0

    def plain(self) -> Any:
        """The scheduler on the pipeline's grid, not steered, before its first step."""
        scheduler = copy.copy(self.copy)
        begin = vars(self.copy).get("_begin_index")
        vars(scheduler).update(self._known[max(self._known)])
        if begin is not None:
            scheduler._begin_index = begin
        for name in _REPLACED:
            vars(scheduler).pop(name, None)
        scheduler.timesteps = self.timesteps
        return scheduler

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        # The same in every call of one pipeline, so computed once; restoring all attributes also rewinds the counters
        # and empties the histories that an earlier call left in the copy.
        self._calls += 1
        if self._calls not in self._known:
            self.kind.set_timesteps(self.copy, *args, **kwargs)
            self.timesteps = self.copy.timesteps.clone()
            self.copy.timesteps = steered_grid(self.timesteps.clone(), self._visit)
            self._known[self._calls] = dict(vars(self.copy))
        vars(self.copy).update(self._known[self._calls])

    def _visit(self, grid: Tensor) -> Iterator[Tensor]:
        """The timesteps of the loop as its `for` sees them, staged so that one body counts.

        Every earlier step is visited, and passed, so the loop's own index is right in the body that counts.
        """
        job, steps = self.job, grid.unbind()
        self.first, self.length = int(grid.storage_offset()), len(steps)
        passed = self._passed(len(steps))
        for k in range(passed):
            entering = job.by_step and k == passed - 1
            self._enter("enter" if entering else "skip" if job.skip else "stub", False, k)
            yield steps[k]
        if job.index is None:
            self._enter("after", job.gradient, passed)
            return
        self._enter("at", job.gradient, job.index)
        yield steps[job.index] if job.off_grid is None else self._told(job.off_grid, self.first + job.index)
        if self.stage == "stepped":
            if job.index + 1 == len(steps):
                raise Captured(self._returned, self._returned)
            self._enter("next", False, job.index + 1)
            yield steps[job.index + 1]
        # No step followed: the pipeline only looked through its grid, before its loop.
        self._enter("before", False, 0)
        yield from steps[max(job.index, passed) + 1 :]

    def _told(self, level: OffGrid, index: int) -> Tensor:
        """The timestep of a level off the grid, which takes the place of a step in the table too: see `entry_at`."""
        if hasattr(self.copy, "sigmas"):
            self.copy.sigmas = self.copy.sigmas.clone()
            self.copy.sigmas[index] = level.sigma
        return level.timestep

    def _passed(self, length: int) -> int:
        """How many bodies are passed. Latents that enter by a step need one; a decoder may read loop variables."""
        job = self.job
        if job.index is None:
            return length if job.skip or job.by_step else 0
        return max(job.index, 1 if job.by_step else 0)

    def _enter(self, stage: str, gradient: bool, body: int) -> None:
        self.stage, self._body = stage, body
        self.interrupt(stage == "skip")
        # Pipelines run under no_grad; the body that counts may be differentiated. Restored when the call ends.
        torch.set_grad_enabled(gradient)

    def _scale_model_input(self, sample: Tensor, timestep: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if self.stage != "at":
            return sample
        if self.job.off_grid is not None:
            return sample * self.job.off_grid.scale
        if self.job.index is not None:
            self.copy._step_index = self.first + self.job.index
        return self.kind.scale_model_input(self.copy, sample, timestep, *args, **kwargs)

    def _step(self, model_output: Any, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs):
        job = self.job
        if self.stage == "skip":
            raise IgnoresInterrupt
        if self.stage == "before":
            raise ModelError("the pipeline's loop does not run over scheduler.timesteps, so steer cannot steer it")
        if self.stage == "stepped" or kwargs.get("per_token_timesteps") is not None:
            how = "twice in a step" if self.stage == "stepped" else "with one timestep per token"
            raise ModelError(
                f"the pipeline calls scheduler.step {how}, so its step depends on more than what it predicts; open its "
                "network by steer.from_velocity, from_eps, from_edm or from_denoiser"
            )
        if self.stage == "next" or (self.stage == "at" and job.after is None):
            raise Captured(model_output, sample)
        x = sample
        if self.stage == "enter":
            assert job.x is not None
            torch.set_grad_enabled(job.gradient)  # the rest of this body makes of x what the next one works on
            x = job.sent = _as_copies(job.x, sample)
        elif job.after is not None and self.stage == "at":
            x = self._returned = _as_copies(job.after(model_output, sample), sample)
            self.stage = "stepped"
        if hasattr(self.copy, "_step_index"):  # pipelines read the counter after a step
            self.copy._step_index = self.first + self._body + 1
        return Stepped((x, x))

    def _add_noise(self, clean: Tensor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        level = self._entering_level()
        if level is None:
            return self.kind.add_noise(self.copy, clean, noise, *args, **kwargs)
        return level.alpha * clean + level.sigma * noise

    def _scale_noise(self, sample: Tensor, timestep: Any, noise: Any = None, **kwargs: Any) -> Tensor:
        level = self._entering_level()
        if level is None:
            return self.kind.scale_noise(self.copy, sample, timestep, noise, **kwargs)
        return level.alpha * sample + level.sigma * noise

    def _entering_level(self) -> Level | None:
        """The level off the grid that latents enter at, to which inpainting noises the part that it keeps."""
        return self.job.off_grid.level if self.stage == "enter" and self.job.off_grid is not None else None


def _as_copies(x: Tensor, sample: Tensor) -> Tensor:
    """New latents in place of a sample, in which some loops carry every row once per guidance branch.

    Always a new tensor, as some loops write into their latents.
    """
    return x.to(sample.dtype).repeat(max(1, len(sample) // len(x)), *[1] * (x.ndim - 1))


def steered_grid(timesteps: Tensor, visit: Callable[[Tensor], Iterator[Tensor]]) -> Tensor:
    """The timesteps as a tensor whose iteration is `visit`. So are its slices: image-to-image starts halfway.

    Nothing else that is computed from them is: a pipeline makes latents and embeddings of its timesteps.
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
