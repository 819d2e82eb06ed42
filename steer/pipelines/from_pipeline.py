"""`steer.from_pipeline`: opens a diffusers pipeline and its call arguments as a Gaussian reverse process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, NotDifferentiableError, ShapeError
from ..processes import schedules
from ..processes.gaussian import GaussianProcess
from ..processes.transitions import CPS, DDIM, Churn, ClippedPrediction
from ..types import Rule
from . import noise_levels, refusals, several_problems, unet2d
from .chunking import Chunked
from .decoder_gradient import recomputed, weights_kept
from .default_rule import chosen_rule
from .families import CLIP_KEEPS_EPS_SCHEDULERS, name_begins
from .pipeline_call import PipelineCall
from .probing import probe
from .steered_scheduler import OffGridLevel


def from_pipeline(
    pipe: Any,
    *,
    steps: int | None = None,
    transition: Rule | None = None,
    chunk: int | None = None,
    checkpoint_decode: bool = False,
    **call: Any,
) -> GaussianProcess:
    """Open a diffusers pipeline, unmodified, as a process on the pipeline's own noise levels.

    Args:
        pipe: Any pipeline whose loop runs one scheduler. It is only read, and stays usable beside the process. Set up
            its scheduler, adapters, offloading, VAE tiling and compiled modules before opening it.
        steps: Number of steps K, the pipeline's num_inference_steps; 50 by default, or the length of the pipeline's own
            argument `timesteps` or `sigmas`.
        transition: A transition rule. By default ancestral sampling, `steer.ddim(eta=1.0)`, or with the pipeline's own
            `eta`; for distilled networks (LCM, TCD, TrigFlow) the re-noising steps of their scheduler. Where that is
            not how the pipeline steps, a line to the log "steer" says so. `ddim(eta=0.0)` equals the pipeline's own
            DDIM, Euler and flow-match solvers.
        chunk: Most rows per network or decoder call, 16 by default (256 for bare UNets). Halved, with a warning to the
            log "steer", whenever memory runs out.
        checkpoint_decode: Recompute the decoder in the backward pass instead of keeping its activations.
        **call: The pipeline's own call arguments: prompt, negative_prompt, guidance_scale, height, image, ... A list of
            B prompts makes B problems (axis 0), each with all its particles and as it is alone; other arguments with an
            entry per prompt are divided likewise, which is found out by what the pipeline does with them. Bare UNets
            (DDPMPipeline) take class_labels and guidance_scale: see `unet2d.from_pipeline`. `latents`, one row per
            prompt as the pipeline takes them, are where all particles of that prompt start, so that only the
            transition's noise separates them (`steer.from_latents` gives each its own). `generator` fixes what the
            pipeline draws before its loop, an encoded image say; all other noise follows from the sampler's key.

    Returns:
        A process whose states [B, N, *event] are the latents that the pipeline's scheduler steps, float32 whatever the
        networks compute in, with the pipeline's own distribution of starting latents. `decode` gives what the pipeline
        returns with output_type="pt": images [M, 3, H, W] in [0, 1], frames [M, F, 3, H, W], or several images of one
        state likewise; latents with output_type="latent". Where inpainting pastes a known part over the latents after
        each step, the state there has no effect and is its own prediction; the pasted part is noised by one draw made
        before the loop. Not thread-safe.

    Raises:
        ModelError: For pipelines that cannot be opened, and for arguments that are not the pipeline's or would have no
            effect.
        SteerError: Where steps or chunk is not a whole number of at least 1.

    The pipeline's modules are left as they were (attention processors, dtypes, hooks, adapter scales), whether opening
    and later calls succeed or not. A safety checker keeps blackening pictures, which the log "steer" reports.

    Cost: two network evaluations of one row. Prompts are encoded here, and not again for the same batch of problems.

    Check a pipeline that steer's tests do not cover by `steer.verify(process)`.
    """
    number = refusals.checked_counts(steps, chunk, call)
    if unet2d.is_bare_unet(pipe):
        unknown = sorted(set(call) - {"class_labels", "guidance_scale"})
        if unknown:
            raise ModelError(
                f"a bare UNet takes class_labels and guidance_scale, got {', '.join(unknown)}; give steps= for the "
                "number of steps, transition= for their noise, and the sampler key= for its draws, batch= and "
                "particles= for the number of samples, and start=steer.from_latents(...) for where they start"
            )
        return unet2d.from_pipeline(pipe, steps=number, transition=transition, chunk=chunk or 256, **call)
    refusals.check_pipeline(pipe)
    refusals.check_arguments(pipe, call, steps)
    opened = PipelineCall(pipe, call, number)
    try:
        several_problems.divide_arguments(opened)
        opened.record_start()
    except Exception as error:
        refusals.check_strength(pipe, call, number, error)
        raise
    probe(opened)
    mean, std = _initial_moments(opened)
    grid = noise_levels.read_grid(opened.scheduler.plain(), opened.scheduler.first, opened.scheduler.length)
    conditioning = opened.conditioning
    # The prior of a combined pipeline draws for every row: one row per call keeps a row independent of its batch.
    chunk = (chunk or 16) if conditioning.accepts_rows and opened.owner is pipe else 1
    denoiser = PipelineDenoiser(opened, grid, chunk)
    rule = chosen_rule(opened.scheduler.plain(), transition, call.get("eta"))
    rule, denoiser.clamp = _clipping(opened.scheduler.plain(), rule)
    decoder = PipelineDecoder(opened, chunk, checkpoint_decode)
    return GaussianProcess(
        denoiser=denoiser,
        schedule=grid.schedule,
        times=grid.times,
        event=tuple(mean.shape[2:]),
        decoder=None if conditioning.wants_latents and opened.free is None else decoder,
        problems=conditioning.problems,
        prompts=conditioning.prompts,
        rows=max(opened.rows[index] for index in grid.indices),
        initial=(mean, std),
        device=opened.device,
    ).with_rule(rule)


class PipelineDenoiser:
    """E[x_0 | x_t] by a pipeline, for states [B, N, *event], at a time of its grid or between two.

    Off the grid the networks are told the interpolated timestep, and the loop's index is that of the step before.

    Args:
        call: The opened pipeline.
        grid: Its noise levels.
        chunk: Most rows per network call.
        problem: The only problem to predict for; None: all.

    Raises:
        ShapeError: Where the pipeline's predictions do not have the shape of its latents.
    """

    def __init__(self, call: PipelineCall, grid: noise_levels.Grid, chunk: int, problem: int | None = None):
        self.call, self.grid, self.problem = call, grid, problem
        self.clamp: float | None = None
        self._step, self._off_grid = 0, None
        self._network = Chunked(
            f"{type(call.user_pipe).__name__}'s networks", self._predict, chunk, several_problems.SharedCalls(call)
        )

    @property
    def chunk(self) -> int:
        """Most rows per network call now, after any halving."""
        return self._network.chunk

    def __call__(self, x: Tensor, t: float) -> Tensor:
        at, step = schedules.level(self.grid.schedule, t), self.grid.step_at(t)
        off_grid = None
        if step is None:
            step = self.grid.step_before(t)
            scheduler = self.call.scheduler.plain()
            timestep = torch.tensor(noise_levels.timestep_at(scheduler, at), dtype=torch.float32, device=x.device)
            off_grid = OffGridLevel(
                timestep, noise_levels.input_scale(scheduler, at), noise_levels.sigma_entry_at(scheduler, at), at
            )
        output = self.output(x, self.grid.indices[step], off_grid)
        x0 = noise_levels.x0_from_output(output, x, at, self.grid.kind, self.grid.data_std)
        x0 = x0 if self.clamp is None else x0.clamp(-self.clamp, self.clamp)
        free = self.call.free
        if free is None:
            return x0
        # Coordinates that the pipeline pastes over predict themselves, so no step depends on the network there.
        return torch.where(free if self.problem is None else free[self.problem], x0, x)

    def rows_at(self, t: float) -> int:
        """Network rows of a prediction at a time of the path."""
        return self.call.rows[self.grid.indices[self.grid.step_before(t)]]

    def output(self, x: Tensor, index: int, off_grid: OffGridLevel | None = None) -> Tensor:
        """The pipeline's guided network output, as it gives it to `scheduler.step`.

        Args:
            x: States [B, N, *event].
            index: The loop's own index of the step.
            off_grid: A level to evaluate at instead of that step's.

        Returns:
            The output [B, N, *event], in the pipeline's prediction type.
        """
        self._step, self._off_grid = index, off_grid
        several = self.call.conditioning.problems and self.problem is None
        return self._network(x.flatten(0, 1), len(x) if several else 1).to(x.dtype).view(x.shape)

    def only(self, problem: int) -> PipelineDenoiser:
        """The denoiser of one problem."""
        other = PipelineDenoiser(self.call, self.grid, self.chunk, problem)
        other.clamp = self.clamp
        return other

    def _predict(self, rows: Tensor, problems: tuple[int, ...], rows_each: int) -> Tensor:
        """Network output for one chunk of rows."""
        problems = problems if self.problem is None else (self.problem,)
        output = self.call.predict(rows, problems, rows_each, self._step, self._off_grid)
        if output.shape[1] == 2 * rows.shape[1]:
            output = output[:, : rows.shape[1]]  # learned variances follow the mean; transition rules have their own
        if output.shape != rows.shape:
            raise ShapeError(
                f"a pipeline's prediction must have the shape of its latents, {tuple(rows.shape)}, got "
                f"{tuple(output.shape)}; wrap its network by steer.from_eps, from_v, from_velocity or from_denoiser"
            )
        return output


class PipelineDecoder:
    """A pipeline's output for final latents [M, *event], in chunks, optionally checkpointed for the backward pass.

    Args:
        call: The opened pipeline.
        chunk: Most rows per decoder call.
        checkpoint: Recompute in the backward pass instead of keeping activations.
        problem: The only problem that rows belong to; None: all, problem by problem.
    """

    def __init__(self, call: PipelineCall, chunk: int, checkpoint: bool, problem: int | None = None):
        self.call, self.checkpoint, self.problem = call, checkpoint, problem
        self._chunked = Chunked(f"{type(call.user_pipe).__name__}'s decoder", self._decode, chunk)

    def __call__(self, flat: Tensor) -> Tensor:
        return self._chunked(flat, self.call.conditioning.problems or 1 if self.problem is None else 1)

    def only(self, problem: int) -> PipelineDecoder:
        """The decoder of one problem."""
        return PipelineDecoder(self.call, self._chunked.chunk, self.checkpoint, problem)

    def _decode(self, rows: Tensor, problems: tuple[int, ...], rows_each: int) -> Tensor:
        """The pipeline's output for one chunk of rows."""
        problems = problems if self.problem is None else (self.problem,)
        if not (torch.is_grad_enabled() and rows.requires_grad):
            output = self.call.decode(rows, problems, rows_each)
        else:
            output = self._differentiable(rows, problems, rows_each)
        # Several images of one state are an axis of their own, as frames are.
        return output if len(output) == len(rows) else output.unflatten(0, (len(rows), -1))

    def _differentiable(self, rows: Tensor, problems: tuple[int, ...], rows_each: int) -> Tensor:
        """The output with its gradient; raises NotDifferentiableError where the pipeline leaves torch on the way."""

        def decode(rows: Tensor) -> Tensor:
            with weights_kept(self.call.modules.modules):
                return self.call.decode(rows, problems, rows_each)

        try:
            output = recomputed(decode, rows) if self.checkpoint else decode(rows)
        except RuntimeError as error:
            if "requires grad" not in str(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        else:
            if output.requires_grad:
                return output
            reason = "its output has none"
        raise NotDifferentiableError(
            f"the decoder of {type(self.call.user_pipe).__name__} gives no gradient ({reason}); use a method without "
            "gradients (proposal=steer.bootstrap, smc, a search), or switch off what it does to its output after the "
            "autoencoder"
        )


def _initial_moments(call: PipelineCall) -> tuple[Tensor, float]:
    """Mean [B or 1, 1, *event] and standard deviation (0 for given latents) of the pipeline's starting latents."""
    means, spreads, rounding = [], [], 0.0
    problems, latents = call.conditioning.problems or 1, call.conditioning.latents
    if latents is not None:
        return torch.stack([call.state_of_latents(latents[b : b + 1], b).float() for b in range(problems)]), 0.0
    for problem in range(problems):
        still = call.initial_latents(problem, 0.0)
        # In half precision a larger number, as what is left of 1 beside a large mean is rounding.
        number = 1.0 if still.dtype == torch.float32 else 16.0
        moved = call.initial_latents(problem, number).float() / number
        rounding = max(rounding, torch.finfo(still.dtype).eps * float(moved.abs().max()))
        means.append(still.float())
        spreads.append(moved - still.float() / number)
    spread = torch.stack(spreads)
    if call.free is not None and not bool(call.free.any()):
        raise ModelError(
            f"{type(call.user_pipe).__name__} needs a mask with something to fill in, got one that keeps "
            "everything; give another mask_image"
        )
    spread = spread if call.free is None else spread[call.free]  # where the pipeline pastes, the start has no effect
    std = float(spread.double().mean())
    if not std > 0.0 or float((spread - std).abs().max()) > 1e-2 * std + rounding:
        raise ModelError(
            "a pipeline must start from Gaussian latents of one standard deviation; those of "
            f"{type(call.user_pipe).__name__} range from {float(spread.min()):.3g} to {float(spread.max()):.3g}; wrap "
            "its network by steer.from_denoiser"
        )
    return torch.stack(means), std


def _clipping(scheduler: Any, rule: Rule) -> tuple[Rule, float | None]:
    """The rule and the limit to clamp x_0 to, as the scheduler clips: DDIM keeps eps as predicted, others do not."""
    config = scheduler.config
    if not getattr(config, "clip_sample", False):  # the attribute, not the entry: some pipelines switch it off
        return rule, None
    limit = float(config.get("clip_sample_range", 1.0) or 1.0)
    if name_begins(scheduler, CLIP_KEEPS_EPS_SCHEDULERS) and isinstance(rule, DDIM | CPS | Churn):
        return ClippedPrediction(rule, limit), None
    return rule, limit
