"""A pipeline's own `__call__` as a random-access function of latents and loop step.

Every evaluation is one call of a *shallow copy* of the pipeline with a steered scheduler: the pipeline encodes, scales,
guides and decodes as it always does, and no line of it is copied here. The user's pipeline and its modules are only
read. Costs about a millisecond of Python per evaluation.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, ShapeError, SteerError
from .conditioning import Conditioning
from .network import Network, is_network
from .steered import Captured, IgnoresInterrupt, Job, OffGrid, SteeredScheduler

# What pipelines compute before their loop, under the names they give it.
_PRELUDE = (
    "encode_prompt", "encode_image", "prepare_latents", "prepare_image_latents", "prepare_mask_latents",
    "prepare_control_image", "prepare_image_embeds", "prepare_ip_adapter_image_embeds", "_get_t5_prompt_embeds",
)  # fmt: skip


class PipelineCall:
    """One pipeline with one set of call arguments. Not thread-safe: a call leaves state in the copy while it runs.

    Prompts are encoded, and images too, once per combination of problems in a batch, without gradients.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], steps: int):
        self.user, self.conditioning = pipe, Conditioning(pipe, call, steps)
        self._pipe = copy.copy(pipe)
        self._pipe.set_progress_bar_config(disable=True)
        self.scheduler = SteeredScheduler(pipe.scheduler, lambda on: setattr(self._pipe, "_interrupt", on))
        vars(self._pipe)["scheduler"] = self.scheduler.copy
        recorded: dict[Any, Any] = {}
        for name, module in pipe.components.items():
            if is_network(name, module):
                vars(self._pipe)[name] = Network(module, self.scheduler, recorded, name)
        for name in _PRELUDE:
            if hasattr(self._pipe, name):
                vars(self._pipe)[name] = self._once(name, getattr(self._pipe, name))
        # A fixed seed, unless the user gave a generator: what a prelude draws (an encoded image, say) is the same in
        # every call, and the global generators are left alone.
        generator = call.get("generator")
        self._random = (generator or torch.Generator().manual_seed(0)).get_state()
        self._random_device = "cpu" if generator is None else generator.device
        self._known: dict[Any, Any] = {}
        self._entered: dict[tuple[str, int], Tensor] = {}
        self._count: dict[str, int] = {}
        self._generator: torch.Generator | None = None
        self._event = torch.Size()
        self._by_step, self._skip = not hasattr(pipe, "prepare_latents"), True

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, which under offloading is not where its modules are."""
        return torch.device(self.user._execution_device)

    def begin(self) -> None:
        """The pipeline's own start, one row of problem 0, before any other call: it fixes what preludes draw.

        Costs one evaluation of one row, for the form of the networks' output.
        """
        self._event = self._capture(Job((0,), 1, index=0, stubbed=True)).sample.shape[1:]

    def initial(self, problem: int, noise: float) -> Tensor:
        """The latents (1, *event) that a problem starts from if each of the pipeline's draws of noise were `noise`."""
        with _noise_replaced(type(self.user), noise):
            return self._capture(Job((problem,), 1, index=0, noise=noise, stubbed=True)).sample.detach()

    def entering(self, latents: Tensor, problem: int) -> Tensor:
        """What the loop of a problem starts from, (1, *event), given one row of its `latents` argument.

        The pipeline scales and packs them as it does for its user.
        """
        kept = dict(self._known)  # what it makes of these latents is no use to the next ones
        try:
            job = Job((problem,), 1, index=0, noise=0.0, given=True, stubbed=True)
            x = self._capture(job, latents=latents).sample.detach()
        finally:
            self._known = kept
        if x.shape[1:] != self._event:
            raise ShapeError(
                f"latents of shape {tuple(latents.shape)} make {type(self.user).__name__} start from "
                f"{tuple(x.shape)}, and its own start has shape {(1, *self._event)}; give latents of the height, width "
                "and number of frames that the process was opened with"
            )
        return x

    def predict(
        self, x: Tensor, problems: tuple[int, ...], per: int, index: int, off_grid: OffGrid | None = None
    ) -> Tensor:
        """What the pipeline hands to `scheduler.step` at loop step `index`, latents being x: its guided prediction.

        x: (len(problems) * per, *event), problem by problem. off_grid: a level to evaluate at instead of the
        step's own. Differentiable in x where gradients are enabled.
        """
        job = Job(problems, per, index, x, off_grid, gradient=torch.is_grad_enabled())
        output = self._capture(job).output
        if len(output) != len(x):
            raise ShapeError(
                f"{type(self.user).__name__} predicts {tuple(output.shape)} for latents {tuple(x.shape)}: its first "
                "axis is not the batch, and steer cannot tell particles apart"
            )
        return output

    def decode(self, x: Tensor, problems: tuple[int, ...], per: int) -> Tensor:
        """The pipeline's output for final latents x (len(problems) * per, *event): images in [0, 1], frames, sound."""
        job = Job(problems, per, x=x, gradient=torch.is_grad_enabled())
        try:
            output = self._run(job)
        except NameError:  # the decoder reads a variable of the loop's body: run one, on stubs
            output = self._run(Job(problems, per, x=x, gradient=job.gradient), by_step=True)
        return _first(output)

    def output(self, pipe: Any, problems: tuple[int, ...], per: int) -> Tensor:
        """What another pipeline object returns for the same arguments and random numbers: see `steer.verify`."""
        arguments = self.conditioning.arguments(problems, per)
        with self._seeded(arguments):
            return _first(pipe(**arguments))

    def probe(self, x: Tensor) -> int:
        """Finds out how latents enter this pipeline, and returns the network rows that one prediction costs.

        x: one row (1, *event). Raises ModelError for pipelines whose loop does more with latents than predict and
        step. Costs one or two evaluations.
        """
        try:
            rows = self._enters(x)
            if rows is None and not self._by_step:
                self._by_step = True  # what prepare_latents returns is not what the loop works on
                rows = self._enters(x)
        except (SteerError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # its own call went through up to here, so it is steering that it does not stand
            raise ModelError(
                f"{type(self.user).__name__} cannot be steered: given latents in the form of those that it hands to "
                f"scheduler.step, it raised {type(error).__name__}: {error}; pipelines that keep part of the latents "
                "aside (a first frame, say), or that call scheduler.step twice in a step, have to be opened by their "
                "network: steer.from_velocity, from_eps, from_edm or from_denoiser"
            ) from error
        if rows is None:
            raise ModelError(
                f"{type(self.user).__name__} changes the latents between its steps, which steer would have to copy; "
                "for inpainting, load a checkpoint whose network is given mask and image (9 channels); else wrap the "
                "network by steer.from_eps, from_v, from_velocity or from_denoiser"
            )
        return rows

    def _enters(self, x: Tensor) -> int | None:
        """Network rows of one prediction, or None where the loop did not see x or changed what its step returned."""
        received: list[Tensor] = []

        def after(output: Tensor, sample: Tensor) -> Tensor:
            received.append(sample)
            return 0.5 * sample

        def leave(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> Any:
            raise Captured(tensors["latents"], tensors["latents"])

        job = Job((0,), 1, index=0, x=x, after=after)
        callback = {"callback_on_step_end": leave} if "callback_on_step_end" in self.conditioning.parameters else {}
        if not callback:
            job.after = None
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            left = self._capture(job, **callback)
        seen = received[0] if received else left.sample
        same = job.sent is not None and seen.shape == job.sent.shape and torch.equal(seen, job.sent)
        kept = not received or torch.allclose(left.sample.to(seen), 0.5 * seen)
        return job.rows if same and kept else None

    def _capture(self, job: Job, **extra: Any) -> Captured:
        left = self._run(job, **extra)
        if not isinstance(left, Captured):
            raise ModelError(f"{type(self.user).__name__} ended without calling scheduler.step: it is not a loop")
        return left

    def _run(self, job: Job, *, by_step: bool = False, **extra: Any) -> Any:
        """One call of the pipeline: its output, or what it was left with. Restores every global mode it touched."""
        job.by_step = (self._by_step or by_step) and job.x is not None
        arguments = {**self.conditioning.arguments(job.problems, job.per), **extra}
        gradients = torch.is_grad_enabled()
        while True:
            job.skip, job.rows, job.sent = self._skip, 0, None
            self.scheduler.begin(job)
            self._count.clear()
            try:
                with self._seeded(arguments):
                    return self._pipe(**arguments)
            except Captured as left:
                return left
            except IgnoresInterrupt:
                self._skip = False  # earlier steps of this pipeline are passed on stubbed networks from here on
            finally:
                torch.set_grad_enabled(gradients)
                vars(self._pipe).pop("_interrupt", None)

    @contextmanager
    def _seeded(self, arguments: dict[str, Any]) -> Iterator[None]:
        """The generators of a call at their fixed state; the global ones as they were, afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
            for device in devices:
                torch.cuda.set_rng_state(torch.Generator(device).manual_seed(0).get_state(), device)
            if "generator" in self.conditioning.parameters:
                self._generator = arguments["generator"] = torch.Generator(self._random_device)
                self._generator.set_state(self._random)
            yield

    def _once(self, name: str, function: Any) -> Any:
        """A part of the prelude, computed once per batch of problems; latents are exchanged for the job's."""

        def prepared(*args: Any, **kwargs: Any) -> Any:
            job = self.scheduler.job
            self._count[name] = self._count.get(name, 0) + 1
            key = (name, self._count[name], job.problems, job.per)
            if name.startswith("prepare_"):
                key = (*key, job.noise, job.given)
            if key not in self._known:
                if self._generator is not None:
                    # Initial noise takes more random numbers in a larger batch; what is drawn after it, an encoded
                    # image say, must not change with that: every part starts where it did for one row.
                    entered = self._entered.setdefault(key[:2], self._generator.get_state())
                    self._generator.set_state(entered)
                with torch.no_grad():
                    value = function(*args, **kwargs)
                self._known[key] = value, self._generator.get_state() if self._generator is not None else None
            value, state = self._known[key]
            if self._generator is not None and state is not None:
                self._generator.set_state(state)  # what is not computed again still uses up its random numbers
            if name != "prepare_latents" or job.x is None or job.by_step:
                return list(value) if isinstance(value, list) else value
            first = value if torch.is_tensor(value) else value[0]
            job.sent = job.x.to(first.device, first.dtype)
            return job.sent if torch.is_tensor(value) else (job.sent, *value[1:])

        return prepared


def _first(output: Any) -> Tensor:
    """The first field of a pipeline's output, as one tensor."""
    first = output[0] if isinstance(output, tuple) else next(iter(output.values()))
    return first if torch.is_tensor(first) else torch.stack([torch.as_tensor(part) for part in first])


@contextmanager
def _noise_replaced(kind: type, value: float) -> Iterator[None]:
    """Every draw that a pipeline class makes by diffusers' `randn_tensor` replaced by one number.

    The latents a pipeline starts from are affine in that noise, so two numbers give their mean and standard deviation
    whatever else they hold: an encoded image, packing, the scheduler's own scale.
    """

    def constant(
        shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> Tensor:
        return torch.full(tuple(shape), value, device=device, dtype=dtype)

    functions = (getattr(kind, name, None) for name in ("__call__", "prepare_latents"))
    modules = [inspect.unwrap(function).__globals__ for function in functions if function is not None]
    modules = [module for module in modules if "randn_tensor" in module]
    drawn = [module["randn_tensor"] for module in modules]
    try:
        for module in modules:
            module["randn_tensor"] = constant
        yield
    finally:
        for module, original in reversed(list(zip(modules, drawn, strict=True))):
            module["randn_tensor"] = original
