"""A pipeline's own `__call__` as a random-access function of latents and loop step.

Every evaluation is one call of a *shallow copy* of the pipeline with a steered scheduler: the pipeline encodes, scales,
guides and decodes as it always does, and no line of it is copied here. The user's pipeline and its modules are only
read. Costs about a millisecond of Python per evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError, ShapeError, SteerError
from ..key import Key
from . import preparation
from .conditioning import Conditioning
from .network_proxy import Network, is_network
from .steered_scheduler import Captured, IgnoresInterrupt, Job, OffGrid, SteeredScheduler

# What pipelines compute before their loop, under the names they give it.
_PRELUDE = (
    "encode_prompt", "encode_image", "prepare_latents", "prepare_image_latents", "prepare_mask_latents",
    "prepare_control_image", "prepare_image_embeds", "prepare_ip_adapter_image_embeds", "_get_t5_prompt_embeds",
)  # fmt: skip


_CHANGES = (
    "changes the latents between its steps, by more than pasting a known part over them, which steer would have to "
    "copy; wrap the network by steer.from_eps, from_v, from_velocity or from_denoiser"
)


class PipelineCall:
    """One pipeline with one set of call arguments. Not thread-safe: a call leaves state in the copy while it runs.

    Prompts are encoded, and images too, once per combination of problems in a batch, without gradients.

    free: (problems, 1, *event), which coordinates of the latents are the chain's; None: all. Inpainting pastes the
          others over between two steps, with an image that it noises by what its prelude drew.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], steps: int):
        self.user, self.conditioning = pipe, Conditioning(pipe, call, steps)
        self.owner = preparation.owner_of_loop(pipe)
        self.scheduler = SteeredScheduler(self.owner.scheduler, lambda on: setattr(self._loop, "_interrupt", on))
        self._pipe = preparation.copied(pipe, self.scheduler.copy)
        self._loop = preparation.owner_of_loop(self._pipe)
        recorded: dict[Any, Any] = {}
        for name, module in self.owner.components.items():
            if is_network(name, module):
                vars(self._loop)[name] = Network(module, self.scheduler, recorded, name)
        for name in _PRELUDE:
            if hasattr(self._loop, name):
                vars(self._loop)[name] = self._once(name, getattr(self._loop, name))
        if self._loop is not self._pipe:
            vars(self._pipe)["prior_pipe"] = self._once("prior_pipe", self._pipe.prior_pipe)
        # A fixed seed, unless the user gave a generator: what a prelude draws (an encoded image, say) is the same in
        # every call, and the global generators are left alone.
        generator = call.get("generator")
        self._random = (generator or torch.Generator().manual_seed(0)).get_state()
        self._random_device = "cpu" if generator is None else generator.device
        self._known: dict[Any, Any] = {}
        self._entered: dict[tuple[str, int], Tensor] = {}
        self._count: dict[str, int] = {}
        self._generator: torch.Generator | None = None
        self._start, self._copies = torch.empty(0), 1
        self._by_step, self._skip = not hasattr(self.owner, "prepare_latents"), True
        self.free: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, which under offloading is not where its modules are."""
        return torch.device(self.user._execution_device)

    def begin(self) -> None:
        """The pipeline's own start, one row of problem 0, before any other call: it fixes what preludes draw.

        Costs one evaluation of one row, for the form of the networks' output.
        """
        start = self._capture(Job((0,), 1, index=0, stubbed=True)).sample.detach().clone()
        self._copies = len(start)
        self._start = self.first_copy(start, 1)

    def initial(self, problem: int, noise: float) -> Tensor:
        """The latents (1, *event) that a problem starts from if each of the pipeline's draws of noise were `noise`."""
        with preparation.noise_replaced(type(self.owner), preparation.constant(noise)):
            return self._capture(Job((problem,), 1, index=0, noise=noise, stubbed=True)).sample.detach().clone()

    def entering(self, latents: Tensor, problem: int) -> Tensor:
        """What the loop of a problem starts from, (1, *event), given one row of its `latents` argument.

        The pipeline scales and packs them as it does for its user.
        """
        if self.owner is not self.user:
            raise ModelError(f"latents= of {type(self.user).__name__} are its prior's; open pipe.decoder_pipe instead")
        kept = dict(self._known)  # what it makes of these latents is no use to the next ones
        try:
            job = Job((problem,), 1, index=0, noise=0.0, given=True, stubbed=True)
            x = self._capture(job, latents=latents).sample.detach().clone()
        finally:
            self._known = kept
        if x.shape != self._start.shape:
            raise ShapeError(
                f"latents of shape {tuple(latents.shape)} make {type(self.user).__name__} start from "
                f"{tuple(x.shape)}, and its own start has shape {tuple(self._start.shape)}; give latents of the "
                "height, width and number of frames that the process was opened with"
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
            output = self._run(job, by_step=self.scheduler.length == 1)  # no other step showed what follows its step
        except NameError:  # the decoder reads a variable of the loop's body: run one, on stubs
            output = self._run(Job(problems, per, x=x, gradient=job.gradient), by_step=True)
        return _first(output)

    def output(self, pipe: Any, problems: tuple[int, ...], per: int) -> Tensor:
        """What another pipeline object returns for the same arguments and random numbers: see `steer.verify`."""
        arguments = self.conditioning.arguments(problems, per)
        with self._seeded(arguments):
            return _first(pipe(**arguments))

    def probe(self) -> int:
        """Finds out how latents enter this pipeline, and returns the network rows that one prediction costs.

        Raises ModelError for pipelines whose loop does more with latents than predict, step, and paste a known part
        over them. Costs one or two evaluations of one row.
        """
        try:
            rows = self._probed()
        except (SteerError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # its own call went through up to here, so it is steering that it does not stand
            raise ModelError(
                f"{type(self.user).__name__} cannot be steered: given latents in the form of those that it hands to "
                f"scheduler.step, it raised {type(error).__name__}: {error}; open its network: steer.from_velocity, "
                "from_eps, from_edm or from_denoiser"
            ) from error
        if rows is None:
            raise ModelError(f"{type(self.user).__name__} {_CHANGES}")
        return rows

    def _probed(self) -> int | None:
        """As `probe`; None where the loop never sees what it was given."""
        free = torch.stack([self._followed(problem) for problem in range(self.conditioning.problems or 1)])
        self.free = None if bool(free.all()) else free
        rows = None if self._by_step else self._enters(free[0])
        if rows is None:
            self._by_step = True  # what prepare_latents returns is not what the scheduler steps
            rows = self._enters(free[0])
        if rows is not None and self.free is not None:
            self._skip = self._skips_alike()
        return rows

    def _enters(self, free: Tensor) -> int | None:
        """Network rows of one prediction, or None where the loop does not see the latents that it was given."""
        other = Key(1).normal(self._start.shape).to(self._start)
        job = Job((0,), 1, index=0, x=torch.where(free, other, self._start))
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            seen = self._capture(job).sample
        if job.sent is None or seen.shape != self._start.shape:
            return None
        return job.rows if torch.equal(seen, torch.where(free, job.sent[:1].to(seen), self._start)) else None

    def _skips_alike(self) -> bool:
        """Whether skipped steps leave a pipeline that pastes as steps on stubs do. No network runs.

        Steps that are skipped draw nothing; a loop that draws what it pastes has to run them all.
        """
        last = Job((0,), 1, index=self.scheduler.length - 1, x=self._start, stubbed=True)
        skipped = self._capture(last).sample.clone()
        if not self._skip:
            return False
        self._skip = False
        return torch.equal(skipped, self._capture(last).sample)

    def _followed(self, problem: int) -> Tensor:
        """Where (1, *event) the second step of a problem starts from what the first returned; elsewhere, not at all.

        Raises ModelError where it starts from anything that is made of both.
        """
        returned = Key(0).normal((2, *self._start.shape)).to(self._start)
        # A change of precision on the way is none of the latents.
        jobs = [Job((problem,), 1, index=0, stubbed=True, after=lambda _, __, y=y: y.clone()) for y in returned]
        one, two = (self._capture(job).sample.to(returned) for job in jobs)
        if one.shape == two.shape == returned.shape[1:]:
            kept = torch.isclose(one, returned[0]) & torch.isclose(two, returned[1])
            if bool((kept | (one == two)).all()):
                return kept
        raise ModelError(f"{type(self.user).__name__} {_CHANGES}")

    def _capture(self, job: Job, **extra: Any) -> Captured:
        left = self._run(job, **extra)
        if not isinstance(left, Captured):
            raise ModelError(f"{type(self.user).__name__} ended without calling scheduler.step: it is not a loop")
        rows = len(job.problems) * job.per
        return Captured(self.first_copy(left.output, rows), self.first_copy(left.sample, rows))

    def first_copy(self, tensor: Tensor, rows: int) -> Tensor:
        """The rows of a batch, of which some loops carry one copy per guidance branch. Raises where these differ."""
        if self._copies == 1:
            return tensor
        if not torch.equal(tensor, tensor[:rows].repeat(self._copies, *[1] * (tensor.ndim - 1))):
            raise ModelError(
                f"{type(self.user).__name__} hands {len(tensor)} rows to scheduler.step for {rows}, and not as copies: "
                "their first axis is not the batch, and steer cannot tell particles apart"
            )
        return tensor[:rows]

    def _run(self, job: Job, *, by_step: bool = False, **extra: Any) -> Any:
        """One call of the pipeline: its output, or what it was left with. Restores every global mode it touched."""
        pastes = self.free is not None and (job.index != 0 or job.off_grid is not None)
        job.by_step = (self._by_step or by_step or pastes) and job.x is not None
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
                vars(self._loop).pop("_interrupt", None)

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
                alike = preparation.rows_alike(len(job.problems) * job.per)
                with torch.no_grad(), preparation.noise_replaced(type(self.owner), alike):
                    value = function(*args, **kwargs)
                self._known[key] = value, self._generator.get_state() if self._generator is not None else None
            value, state = self._known[key]
            if self._generator is not None and state is not None:
                self._generator.set_state(state)  # what is not computed again still uses up its random numbers
            if name == "prepare_latents":
                return self._injected(value, job)
            return list(value) if isinstance(value, list) else value

        return prepared

    def _injected(self, value: Any, job: Job) -> Any:
        """What prepare_latents returned, the latents in it exchanged for the job's where they are of the same form."""
        several = isinstance(value, tuple)
        # Copies throughout, as some loops write into their latents.
        parts = [part.clone() if torch.is_tensor(part) else part for part in (value if several else (value,))]
        if job.x is not None and not job.by_step and parts[0].shape[1:] == job.x.shape[1:]:
            with torch.set_grad_enabled(job.gradient):
                x = job.x.to(parts[0].device, parts[0].dtype, copy=True)
                parts[0] = job.sent = x if self.free is None else torch.where(self._rows_of_free(job), x, parts[0])
        return tuple(parts) if several else parts[0]

    def _rows_of_free(self, job: Job) -> Tensor:
        """`free` for every row of a call."""
        assert self.free is not None
        return self.free[list(job.problems), 0].repeat_interleave(job.per, 0)


def _first(output: Any) -> Tensor:
    """The first field of a pipeline's output, as one tensor."""
    first = output[0] if isinstance(output, tuple) else next(iter(output.values()))
    if isinstance(first, np.ndarray) and first.ndim == 4:  # channels last: DDPMPipeline before diffusers 0.41
        return torch.from_numpy(first).permute(0, 3, 1, 2)
    return first if torch.is_tensor(first) else torch.stack([torch.as_tensor(part) for part in first])
