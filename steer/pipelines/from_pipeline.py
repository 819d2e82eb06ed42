"""`steer.from_pipeline`: opens a diffusers pipeline and its call arguments as a Gaussian reverse process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, ShapeError
from ..processes import schedules
from ..processes.gaussian import GaussianProcess
from ..processes.transitions import CPS, DDIM, Churn, ClippedPrediction
from ..types import Rule
from . import noise_levels, unet2d
from .chunking import Chunked
from .families import CLIP_KEEPS_EPS_SCHEDULERS, COMBINED_PIPELINES, name_begins
from .pipeline_call import PipelineCall
from .preparation import inner_pipelines
from .steered_scheduler import OffGridLevel


def from_pipeline(
    pipe: Any,
    *,
    steps: int = 50,
    transition: Rule | None = None,
    chunk: int | None = None,
    checkpoint_decode: bool = False,
    **call: Any,
) -> GaussianProcess:
    """Open a diffusers pipeline, unmodified, as a process on the pipeline's own noise levels.

    Args:
        pipe: Any pipeline whose loop runs one scheduler. It is only read, and stays usable beside the process. Set up
            its scheduler, adapters, offloading, VAE tiling and compiled modules before opening it.
        steps: Number of steps K, the pipeline's num_inference_steps.
        transition: A transition rule; ancestral sampling, `steer.ddim(eta=1.0)`, by default. eta = 0 equals the
            pipeline's own DDIM, Euler and flow-match solvers.
        chunk: Most rows per network or decoder call, 16 by default (256 for bare UNets). Halved, with a warning to the
            log "steer", whenever memory runs out.
        checkpoint_decode: Recompute the decoder in the backward pass instead of keeping its activations.
        **call: The pipeline's own call arguments: prompt, negative_prompt, guidance_scale, height, image, ... A list
            of B prompts makes B problems (axis 0), each with all its particles; other lists of that length, and prompt
            embeddings, are split by problem. Bare UNets (DDPMPipeline) take class_labels and guidance_scale: see
            `unet2d.from_pipeline`. `latents`, one row per prompt as the pipeline takes them, are where all particles of
            that prompt start, so that only the transition's noise separates them (`steer.from_latents` gives each its
            own). `generator` fixes what the pipeline draws before its loop, an encoded image say; all other noise
            follows from the sampler's key.

    Returns:
        A process whose states [B, N, *event] are the latents that the pipeline's scheduler steps, float32 whatever the
        networks compute in, with the pipeline's own distribution of starting latents. `decode` gives what the pipeline
        returns with output_type="pt": images [M, 3, H, W] in [0, 1], frames [M, F, 3, H, W], or several images of one
        state likewise; latents with output_type="latent". Where inpainting pastes a known part over the latents after
        each step, the state there has no effect and is its own prediction; the pasted part is noised by one draw made
        before the loop. Not thread-safe.

    Raises:
        ModelError: For pipelines that cannot be opened, and for arguments that are not the pipeline's.

    Cost: two network evaluations of one row. Prompts are encoded here, and not again for the same batch of problems.

    Check a pipeline that steer's tests do not cover by `steer.verify(process)`.
    """
    if unet2d.is_bare_unet(pipe):
        unknown = sorted(set(call) - {"class_labels", "guidance_scale"})
        if unknown:
            raise ModelError(
                f"a bare UNet takes class_labels and guidance_scale, got {', '.join(unknown)}; give the sampler key= "
                "for the noise, batch= and particles= for the number of samples, and start=steer.from_latents(...) for "
                "where they start"
            )
        return unet2d.from_pipeline(pipe, steps=steps, transition=transition, chunk=chunk or 256, **call)
    _check_pipeline(pipe)
    opened = PipelineCall(pipe, call, steps)
    opened.record_start()
    rows = opened.probe()
    mean, std = _initial_moments(opened)
    grid = noise_levels.read_grid(opened.scheduler.plain(), opened.scheduler.first, opened.scheduler.length)
    conditioning = opened.conditioning
    # The prior of a combined pipeline draws for every row: one row per call keeps a row independent of its batch.
    chunk = (chunk or 16) if conditioning.accepts_rows and opened.owner is pipe else 1
    denoiser = PipelineDenoiser(opened, grid, chunk)
    rule, denoiser.clamp = _clipping(opened.scheduler.plain(), transition or DDIM())
    decoder = PipelineDecoder(opened, chunk, checkpoint_decode)
    return GaussianProcess(
        denoiser=denoiser,
        schedule=grid.schedule,
        times=grid.times,
        event=tuple(mean.shape[2:]),
        rule=rule,
        decoder=None if conditioning.wants_latents and opened.free is None else decoder,
        problems=conditioning.problems,
        prompts=conditioning.prompts,
        rows=rows,
        initial=(mean, std),
        device=opened.device,
    )


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
            f"{type(call.user_pipe).__name__}'s networks", self._predict, chunk, call.may_share
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
        if not (self.checkpoint and torch.is_grad_enabled() and rows.requires_grad):
            output = self.call.decode(rows, problems, rows_each)
        else:
            from torch.utils.checkpoint import checkpoint

            # Every call sets its generators to a fixed state, so there is none to restore.
            output: Tensor = checkpoint(
                self.call.decode, rows, problems, rows_each, use_reentrant=False, preserve_rng_state=False
            )  # pyright: ignore[reportAssignmentType]
        # Several images of one state are an axis of their own, as frames are.
        return output if len(output) == len(rows) else output.unflatten(0, (len(rows), -1))


def _initial_moments(call: PipelineCall) -> tuple[Tensor, float]:
    """Mean [B or 1, 1, *event] and standard deviation (0 for given latents) of the pipeline's starting latents."""
    means, spreads = [], []
    problems, latents = call.conditioning.problems or 1, call.conditioning.latents
    if latents is not None:
        return torch.stack([call.state_of_latents(latents[b : b + 1], b).float() for b in range(problems)]), 0.0
    for problem in range(problems):
        still, moved = (call.initial_latents(problem, noise).float() for noise in (0.0, 1.0))
        means.append(still)
        spreads.append(moved - still)
    spread = torch.stack(spreads)
    if call.free is not None and not bool(call.free.any()):
        raise ModelError(
            f"{type(call.user_pipe).__name__} needs a mask with something to fill in, got one that keeps "
            "everything; give another mask_image"
        )
    spread = spread if call.free is None else spread[call.free]  # where the pipeline pastes, the start has no effect
    std = float(spread.double().mean())
    if not std > 0.0 or float((spread - std).abs().max()) > 1e-2 * std:
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


def _check_pipeline(pipe: Any) -> None:
    """Raises ModelError for anything but a pipeline, and where a network caches activations of earlier steps."""
    if not hasattr(pipe, "components") or getattr(pipe, "scheduler", None) is None:
        raise ModelError(
            f"from_pipeline opens diffusers pipelines that own a scheduler, got {type(pipe).__name__}; wrap a network "
            "(a UNet2DModel, say) by steer.from_eps, from_v, from_velocity or from_denoiser"
        )
    inner = inner_pipelines(pipe)
    if inner and set(inner) != COMBINED_PIPELINES:
        raise ModelError(
            f"{type(pipe).__name__} runs other pipelines ({', '.join(inner)}), each with a loop and a scheduler of its "
            f"own; open the one to steer, for instance steer.from_pipeline(pipe.{inner[0]}, ...)"
        )
    for name, module in pipe.components.items():
        if getattr(module, "is_cache_enabled", False):
            raise ModelError(
                f"pipe.{name} caches activations from step to step, and samplers visit states in any order; call "
                f"pipe.{name}.disable_cache() before opening the pipeline"
            )
