"""A pipeline's own `__call__` as a function of latents and loop step, in any order.

Every evaluation is one call of a *shallow copy* of the pipeline with a steered scheduler: the pipeline encodes, scales,
guides and decodes as usual, and none of its code is copied here. The user's pipeline and its modules are only read.
Each evaluation costs about a millisecond of Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, ShapeError
from ..key import Key
from . import preparation
from .condition_cache import recall, remember
from .conditioning import Conditioning
from .families import METHODS_BEFORE_LOOP
from .module_state import WatchedModules
from .network_proxy import NetworkProxy, is_network
from .picture_checks import PictureChecks
from .row_composition import rows_of_pair
from .steered_scheduler import CapturedStep, IgnoresInterrupt, Job, OffGridLevel, SteeredScheduler


class PipelineCall:
    """One pipeline with one set of call arguments. Not thread-safe: a call leaves state in the copy while it runs.

    Prompts and images are encoded once per combination of problems in a batch, without gradients.

    Args:
        pipe: The user's pipeline.
        call: Its call arguments.
        steps: Number of inference steps.

    Attributes:
        user_pipe: The user's pipeline.
        owner: The pipeline whose loop is steered: the decoder of a combined one, else `user_pipe`.
        start: The pipeline's own starting latents, one row.
        computed: Results of the methods before the loop, by method, problems and rows.
        rows: Network rows per prediction of one row, at every step of the loop.
        networks: The modules that its loop calls.
        found: Their state before opening.
        changed_by_opening: What of their state opening changed for good, by name; nothing, that is.
        draw: What draws for so many rows of a call.
        by_step: Whether latents enter as the result of the first step, not as that of `prepare_latents`.
        skip: Whether the loop passes over earlier steps; else it runs them on stubbed networks.
        modules: All modules of the pipeline, which every call leaves as it found them.
        pictures: The safety checker and the watermark that its decoder ends with.
        free: Which coordinates of the latents are sampled, bool [B or 1, 1, *event]; None: all. Inpainting pastes over
            the others between two steps, with an image noised by a draw that it makes before its loop.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], steps: int):
        self.user_pipe, self.conditioning = pipe, Conditioning(pipe, call, steps)
        self.owner = preparation.owner_of_loop(pipe)
        self.scheduler = SteeredScheduler(self.owner.scheduler, lambda on: setattr(self._loop, "_interrupt", on))
        self._pipe = preparation.copy_pipeline(pipe, self.scheduler.steered)
        self._loop = preparation.owner_of_loop(self._pipe)
        self.pictures = PictureChecks(self._loop)
        parts = {**pipe.components, **self.owner.components}
        modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
        self.modules = WatchedModules(modules.values())
        self._encoders = WatchedModules(part for name, part in modules.items() if not is_network(name, part))
        self._encoders_known: Any = None
        self.networks = [module for name, module in self.owner.components.items() if is_network(name, module)]
        recorded: dict[Any, Any] = {}
        for name, module in self.owner.components.items():
            if is_network(name, module):
                vars(self._loop)[name] = NetworkProxy(module, self.scheduler, recorded, name)
            elif preparation.has_encoder(module):
                vars(self._loop)[name] = preparation.EncodedOnce(module)
        for name in METHODS_BEFORE_LOOP:
            if hasattr(self._loop, name):
                vars(self._loop)[name] = self._computed_once(name, getattr(self._loop, name))
        if self._loop is not self._pipe:
            vars(self._pipe)["prior_pipe"] = self._computed_once("prior_pipe", self._pipe.prior_pipe)
        # A fixed seed, unless the user gave a generator: what is drawn before the loop (an encoded image, say) is the
        # same in every call, and the global generators are left alone.
        generator = call.get("generator")
        self._random = (generator or torch.Generator().manual_seed(0)).get_state()
        self._random_device = "cpu" if generator is None else generator.device
        self._draws = preparation.modules_that_draw(self.owner, encoders=True)
        self.draw = preparation.same_draw_per_row
        self.computed: dict[Any, Any] = {}
        self._generator_states: dict[tuple[str, int], Tensor] = {}
        self._calls: dict[str, int] = {}
        self._generator: torch.Generator | None = None
        self.start, self._copies = torch.empty(0), 1
        self.by_step, self.skip = not hasattr(self.owner, "prepare_latents"), True
        self.free: Tensor | None = None
        self.rows: list[int] = []
        self.found, self.changed_by_opening = self.modules.read(), []

    @property
    def device(self) -> torch.device:
        """Device that the pipeline computes on, which under offloading is not where its modules are."""
        return torch.device(self.user_pipe._execution_device)

    @property
    def network_dtype(self) -> torch.dtype:
        """What the networks of the loop compute in, by their first parameter of a floating type."""
        types = (parameter.dtype for network in self.networks for parameter in network.parameters())
        return next((dtype for dtype in types if dtype.is_floating_point), torch.float32)

    def record_start(self) -> None:
        """Record the pipeline's own starting latents, one row of problem 0, and fix what is drawn before its loop.

        To be called before any other method.

        Cost: one network evaluation of one row, for the form of the networks' output.
        """
        start = self.capture(Job((0,), 1, index=0, stubbed=True)).sample.detach().clone()
        self._copies = len(start)
        self.start = self.first_copy(start, 1)

    def initial_latents(self, problem: int, noise: float) -> Tensor:
        """Starting latents of a problem if every draw of noise by the pipeline were one number.

        Args:
            problem: Index of the problem.
            noise: The number.

        Returns:
            Latents [1, *event].
        """
        modules = preparation.modules_that_draw(self.owner)
        with preparation.noise_replaced(modules, preparation.constant_draw(noise)):
            return self.capture(Job((problem,), 1, index=0, noise=noise, stubbed=True)).sample.detach().clone()

    def state_of_latents(self, latents: Tensor, problem: int) -> Tensor:
        """The state that a problem's loop starts from, given one row of its `latents` argument.

        The pipeline scales and packs the latents as it does for its user.

        Args:
            latents: One row, in the form of the pipeline's own argument.
            problem: Index of the problem.

        Returns:
            The state [1, *event].

        Raises:
            ModelError: For combined pipelines, whose `latents` are their prior's.
            ShapeError: For latents of another size than the process was opened with.
        """
        if self.owner is not self.user_pipe:
            raise ModelError(
                f"latents= of a combined pipeline such as {type(self.user_pipe).__name__} are its prior's; open "
                "pipe.decoder_pipe instead"
            )
        with self.forgetting():  # what is computed from these latents does not serve others
            job = Job((problem,), 1, index=0, noise=0.0, given=True, stubbed=True)
            x = self.capture(job, latents=latents).sample.detach().clone()
        if x.shape != self.start.shape:
            raise ShapeError(
                f"{type(self.user_pipe).__name__} starts from states of shape {tuple(self.start.shape)}, got latents "
                f"{tuple(latents.shape)}, which make {tuple(x.shape)}; give latents of the height, width and number of "
                "frames that the process was opened with"
            )
        return x

    def predict(
        self, x: Tensor, problems: tuple[int, ...], rows_each: int, index: int, off_grid: OffGridLevel | None = None
    ) -> Tensor:
        """The pipeline's guided prediction at one step, as it gives it to `scheduler.step`.

        Args:
            x: Latents [len(problems) * rows_each, *event], problem by problem.
            problems: The problems in the batch.
            rows_each: Rows per problem.
            index: The loop's own index of the step.
            off_grid: A level to evaluate at instead of that step's.

        Returns:
            The prediction, one row per row of x; differentiable in x where gradients are enabled.

        Raises:
            ShapeError: Where the first axis of the prediction is not the batch.
        """
        job = Job(problems, rows_each, index=index, x=x, off_grid=off_grid, gradient=torch.is_grad_enabled())
        output = self.capture(job).output
        if len(output) != len(x):
            raise ShapeError(
                f"a prediction's first axis must be the batch, {len(x)}; {type(self.user_pipe).__name__} predicts "
                f"{tuple(output.shape)} for latents {tuple(x.shape)}; wrap its network by steer.from_denoiser"
            )
        return output

    def network_inputs(self, x: Tensor, problems: tuple[int, ...], rows_each: int, index: int) -> list[Any]:
        """What the networks are given at one step, and what the scheduler is; networks are stubbed.

        Args:
            x: Latents [len(problems) * rows_each, *event], problem by problem.
            problems: The problems in the batch.
            rows_each: Rows per problem.
            index: The loop's own index of the step.
        """
        inputs: list[Any] = []
        with torch.no_grad():
            left = self.capture(Job(problems, rows_each, index=index, x=x, stubbed=True, inputs=inputs))
        return [*inputs, left.output, left.sample]

    def first_predictions(self, pair: tuple[int, int], index: int, **exchanged: Any) -> list[list[Tensor]]:
        """The pipeline's own predictions for two problems in one call, and what its next step starts from.

        Args:
            pair: The problems.
            index: The loop's own index of the step.
            **exchanged: Arguments to replace.

        Returns:
            For each problem, its rows of the prediction and of the latents after a made-up step.
        """
        seen: list[Tensor] = []

        def step(output: Tensor, sample: Tensor) -> Tensor:
            seen.append(output.clone())
            one = Key(0).normal((1, *sample.shape[1:])).to(sample)
            return one.expand_as(sample).contiguous()

        with torch.no_grad(), self.forgetting():
            left = self._run(Job(pair, 1, index=index, after=step), **exchanged)
        if not isinstance(left, CapturedStep):
            raise ModelError("its loop ends without calling scheduler.step")
        return list(rows_of_pair([*seen, left.sample]))

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Within this context, what is computed before the loop is kept for the context only."""
        kept, states = dict(self.computed), dict(self._generator_states)
        try:
            yield
        finally:
            self.computed, self._generator_states = kept, states

    def forget(self, unwanted: Callable[[Any], bool]) -> None:
        """Drop what was computed before the loop under keys that are not wanted any more."""
        self.computed = {key: value for key, value in self.computed.items() if not unwanted(key)}

    def decode(self, x: Tensor, problems: tuple[int, ...], rows_each: int) -> Tensor:
        """The pipeline's output for final latents: images in [0, 1], frames or sound.

        Args:
            x: Latents [len(problems) * rows_each, *event], problem by problem.
            problems: The problems in the batch.
            rows_each: Rows per problem.

        Returns:
            The output, one or several entries per row.
        """
        job = Job(problems, rows_each, x=x, gradient=torch.is_grad_enabled())
        try:
            output = self._run(job, by_step=self.scheduler.length == 1)  # a single step has none after it to probe
        except NameError:  # the decoder reads a variable of the loop's body: run one step on stubbed networks
            output = self._run(Job(problems, rows_each, x=x, gradient=job.gradient), by_step=True)
        return _first_field(output)

    def output(self, pipe: Any, problems: tuple[int, ...] | None, rows_each: int) -> Tensor:
        """What another pipeline object returns for the same arguments and random numbers; used by `steer.verify`.

        Args:
            pipe: The other pipeline.
            problems: The problems in the batch; None: all, with the arguments as the user gave them.
            rows_each: Rows per problem.
        """
        everything = problems is None
        arguments = self.conditioning.undivided() if everything else self.conditioning.arguments(problems, rows_each)
        rows = (self.conditioning.problems or 1) if everything else len(problems) * rows_each
        with (
            self._fixed_generators(arguments),
            preparation.noise_replaced(self._draws, self.draw(rows)),
        ):
            return _first_field(pipe(**arguments))

    def rows_asked_for(self, index: int) -> int:
        """Network rows that one row's prediction at a step of the loop asks for; networks are stubbed."""
        job = Job((0,), 1, index=index, x=self.start, stubbed=True)
        with torch.no_grad():
            self.capture(job)
        return job.rows_by_step[index]

    def capture(self, job: Job, **extra: Any) -> CapturedStep:
        """Run one call of the pipeline up to `scheduler.step`, and return what that was given.

        Args:
            job: What the call is for.
            **extra: Arguments to replace.

        Raises:
            ModelError: Where the loop does not call `scheduler.step`.
        """
        left = self._run(job, **extra)
        if not isinstance(left, CapturedStep):
            raise ModelError(
                "from_pipeline opens pipelines whose loop calls scheduler.step, and "
                f"{type(self.user_pipe).__name__} ended without calling it; wrap its network by steer.from_denoiser"
            )
        rows = len(job.problems) * job.rows_each
        return CapturedStep(self.first_copy(left.output, rows), self.first_copy(left.sample, rows))

    def first_copy(self, tensor: Tensor, rows: int) -> Tensor:
        """The rows of a batch, where some loops carry one copy per guidance branch.

        Args:
            tensor: What the loop carries, [copies * rows, ...].
            rows: Rows in the batch.

        Returns:
            The first copy, [rows, ...].

        Raises:
            ModelError: Where the copies differ.
        """
        if self._copies == 1:
            return tensor
        if not torch.equal(tensor, tensor[:rows].repeat(self._copies, *[1] * (tensor.ndim - 1))):
            raise ModelError(
                f"{type(self.user_pipe).__name__} gives {len(tensor)} rows to scheduler.step for a batch of {rows}, "
                "and not as copies, so particles cannot be told apart; wrap its network by steer.from_denoiser"
            )
        return tensor[:rows]

    def _run(self, job: Job, *, by_step: bool = False, **extra: Any) -> Any:
        """One call of the pipeline: its output, or the captured step. Restores every global mode that it changed."""
        pastes = self.free is not None and (job.index != 0 or job.off_grid is not None)
        job.by_step = (self.by_step or by_step or pastes) and job.x is not None
        arguments = {**self.conditioning.arguments(job.problems, job.rows_each), **extra}
        gradients = torch.is_grad_enabled()
        alike = self.draw(len(job.problems) * job.rows_each)
        self._forget_if_encoders_changed()
        while True:
            job.skip, job.sent = self.skip, None
            job.rows_by_step.clear()
            self.scheduler.prepare(job)
            self._calls.clear()
            try:
                with self._fixed_generators(arguments), preparation.noise_replaced(self._draws, alike):
                    return self._pipe(**arguments)
            except CapturedStep as left:
                return left
            except IgnoresInterrupt:
                self.skip = False  # from now on, earlier steps of this pipeline run on stubbed networks
            finally:
                torch.set_grad_enabled(gradients)
                vars(self._loop).pop("_interrupt", None)

    def _forget_if_encoders_changed(self) -> None:
        """Drop conditions that were prepared by text encoders with other weights, adapters or adapter scales."""
        answers = self._encoders.answers()
        if answers != self._encoders_known:
            self.computed.clear()
            self._encoders_known = answers

    @contextmanager
    def _fixed_generators(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Within this context all generators are in a fixed state; the global ones are restored afterwards.

        So are the user's modules, however the call ends.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self.modules.left_as_found():
            torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
            for device in devices:
                torch.cuda.set_rng_state(torch.Generator(device).manual_seed(0).get_state(), device)
            if "generator" in self.conditioning.parameters:
                self._generator = arguments["generator"] = torch.Generator(self._random_device)
                self._generator.set_state(self._random)
            yield

    def _computed_once(self, name: str, function: Any) -> Any:
        """Wrap a method called before the loop: computed once per batch of problems, with the job's latents put in."""

        def prepared(*args: Any, **kwargs: Any) -> Any:
            job = self.scheduler.job
            self._calls[name] = self._calls.get(name, 0) + 1
            key = (name, self._calls[name], job.problems, job.rows_each)
            if name.startswith("prepare_"):
                key = (*key, job.noise, job.given)
            known = recall(self.computed, key)
            if known is None:
                if self._generator is not None:
                    # A larger batch draws more random numbers for its initial noise, and what is drawn after it, an
                    # encoded image say, must not change with that: every method starts from its state for one row.
                    entered = self._generator_states.setdefault(key[:2], self._generator.get_state())
                    self._generator.set_state(entered)
                with torch.no_grad():
                    value = function(*args, **kwargs)
                known = value, self._generator.get_state() if self._generator is not None else None
                remember(self.computed, key, known, len(job.problems), job.rows_each)
            value, state = known
            if self._generator is not None and state is not None:
                self._generator.set_state(state)  # as if it had been computed again
            if name == "prepare_latents":
                return self._with_job_latents(value, job)
            return list(value) if isinstance(value, list) else value

        return prepared

    def _with_job_latents(self, value: Any, job: Job) -> Any:
        """The result of prepare_latents with its latents replaced by the job's, where they have the same shape."""
        several = isinstance(value, tuple)
        # Copies throughout, as some loops write into their latents.
        parts = [part.clone() if torch.is_tensor(part) else part for part in (value if several else (value,))]
        if job.x is not None and not job.by_step and parts[0].shape[1:] == job.x.shape[1:]:
            with torch.set_grad_enabled(job.gradient):
                x = job.x.to(parts[0].device, parts[0].dtype, copy=True)
                parts[0] = job.sent = x if self.free is None else torch.where(self._rows_of_free(job), x, parts[0])
        return tuple(parts) if several else parts[0]

    def _rows_of_free(self, job: Job) -> Tensor:
        """`free` for every row of a call, [rows, *event]."""
        assert self.free is not None
        return self.free[list(job.problems), 0].repeat_interleave(job.rows_each, 0)


def _first_field(output: Any) -> Tensor:
    """The first field of a pipeline's output, as one tensor."""
    import numpy as np

    first = output[0] if isinstance(output, tuple) else next(iter(output.values()))
    if isinstance(first, np.ndarray) and first.ndim == 4:  # channels last: DDPMPipeline before diffusers 0.41
        return torch.from_numpy(first).permute(0, 3, 1, 2)
    return first if torch.is_tensor(first) else torch.stack([torch.as_tensor(part) for part in first])
