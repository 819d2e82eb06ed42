"""`steer.from_pipeline`: a diffusers pipeline and its call arguments as a Gaussian reverse process."""

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
from .pipeline_call import PipelineCall
from .preparation import COMBINED, inner_pipelines
from .steered_scheduler import OffGrid


def from_pipeline(
    pipe: Any,
    *,
    steps: int = 50,
    transition: Rule | None = None,
    chunk: int | None = None,
    checkpoint_decode: bool = False,
    **call: Any,
) -> GaussianProcess:
    """A process that runs a diffusers pipeline, unmodified, on the pipeline's own noise levels.

    pipe:       any pipeline whose loop runs one scheduler; it is only read, and stays usable beside the process. Set
                its scheduler, adapters, offloading, VAE tiling or compiled modules up before opening it.
    steps:      as the pipeline's num_inference_steps.
    transition: a rule; ancestral sampling, `steer.ddim(eta=1.0)`, by default. eta = 0 equals the pipeline's own DDIM,
                Euler and flow-match solvers.
    chunk:      most rows per network or decoder call, 16 by default (256 for bare UNets); halved, with a warning to
                the log "steer", whenever memory runs out.
    checkpoint_decode: recompute the decoder in the backward pass instead of keeping its activations.
    **call:     the pipeline's own call arguments: prompt, negative_prompt, guidance_scale, height, image, ... A list
                of prompts makes that many problems (axis 0), each with all particles; other lists of that length, and
                prompt embeddings, are taken per problem. Bare UNets (DDPMPipeline) take class_labels and
                guidance_scale: see `unet2d`. `latents`, one row per prompt as the pipeline takes them, are where all
                particles of that prompt start (`steer.from_latents` gives each its own); only the transition's noise
                then separates them. A generator fixes what the pipeline draws before its loop, an encoded image say;
                all other noise is named by the sampler's key.

    States are the latents that the pipeline's scheduler steps, float32 whatever the networks compute in, and start from
    the law the pipeline starts from. Where inpainting pastes a known part over them after each step, the states there
    are never looked at, and predict themselves; what it pastes is noised by one draw of the prelude. `decode` gives
    what the pipeline returns with output_type="pt": images (M, 3, H, W) in [0, 1], frames (M, F, 3, H, W), or several
    images of one state likewise; latents with output_type="latent". Opening costs two evaluations of one row and
    encodes the prompts, which are not encoded again. Not thread-safe.

    Raises ModelError for pipelines that cannot be opened and for arguments that are not the pipeline's. Check a
    pipeline that steer's tests do not cover by `steer.verify(process)`.
    """
    if unet2d.serves(pipe):
        unknown = sorted(set(call) - {"class_labels", "guidance_scale"})
        if unknown:
            raise ModelError(
                f"a bare UNet takes class_labels and guidance_scale, got {', '.join(unknown)}; samplers own the rest: "
                "key= names the noise, batch= and particles= say how many, start=steer.from_latents(...) where they "
                "begin"
            )
        return unet2d.from_pipeline(pipe, steps=steps, transition=transition, chunk=chunk or 256, **call)
    _check(pipe)
    opened = PipelineCall(pipe, call, steps)
    opened.begin()
    rows = opened.probe()
    mean, std = _initial(opened)
    grid = noise_levels.read(opened.scheduler.plain(), opened.scheduler.first, opened.scheduler.length)
    conditioning = opened.conditioning
    # A prior draws for every row, so that rows alone are what they are in any batch.
    chunk = (chunk or 16) if conditioning.any_batch and opened.owner is pipe else 1
    denoiser = PipelineDenoiser(opened, grid, chunk)
    rule, denoiser.clamp = _clipping(opened.scheduler.plain(), transition or DDIM())
    return GaussianProcess(
        denoiser, grid.schedule, grid.times, tuple(mean.shape[2:]), rule,
        None if conditioning.latent and opened.free is None else Decoder(opened, chunk, checkpoint_decode),
        problems=conditioning.problems, prompts=conditioning.prompts, rows=rows, initial=(mean, std),
        device=opened.device,
    )  # fmt: skip


class PipelineDenoiser:
    """E[x_0 | x_t] by a pipeline, for states (B, N, *event), at a time of its grid or between two.

    Off the grid the networks are told the interpolated timestep, and the loop's index is that of the step before.
    """

    def __init__(self, call: PipelineCall, grid: noise_levels.Grid, chunk: int, problem: int | None = None):
        self.call, self.grid, self.problem = call, grid, problem
        self.clamp: float | None = None
        self._step, self._off_grid = 0, None
        self._network = Chunked(
            f"{type(call.user).__name__}'s networks", self._predict, chunk, call.conditioning.together
        )

    @property
    def chunk(self) -> int:
        """Most rows per network call."""
        return self._network.chunk

    def __call__(self, x: Tensor, t: float) -> Tensor:
        at, step = schedules.level(self.grid.schedule, t), self.grid.step_at(t)
        off_grid = None
        if step is None:
            step = self.grid.step_before(t)
            scheduler = self.call.scheduler.plain()
            timestep = torch.tensor(noise_levels.timestep_at(scheduler, at), dtype=torch.float32, device=x.device)
            off_grid = OffGrid(
                timestep, noise_levels.input_scale(scheduler, at), noise_levels.entry_at(scheduler, at), at
            )
        output = self.output(x, self.grid.indices[step], off_grid)
        x0 = noise_levels.x0_of(output, x, at, self.grid.kind, self.grid.data_std)
        x0 = x0 if self.clamp is None else x0.clamp(-self.clamp, self.clamp)
        free = self.call.free
        if free is None:
            return x0
        # What the pipeline pastes over in any case predicts itself, so no law of a step depends on the network there.
        return torch.where(free if self.problem is None else free[self.problem], x0, x)

    def output(self, x: Tensor, index: int, off_grid: OffGrid | None = None) -> Tensor:
        """What the pipeline hands its scheduler at the loop's step `index`, for states (B, N, *event)."""
        self._step, self._off_grid = index, off_grid
        several = self.call.conditioning.problems and self.problem is None
        return self._network(x.flatten(0, 1), len(x) if several else 1).to(x.dtype).view(x.shape)

    def only(self, problem: int) -> PipelineDenoiser:
        """The denoiser of one problem."""
        other = PipelineDenoiser(self.call, self.grid, self.chunk, problem)
        other.clamp = self.clamp
        return other

    def _predict(self, rows: Tensor, problems: tuple[int, ...], per: int) -> Tensor:
        problems = problems if self.problem is None else (self.problem,)
        output = self.call.predict(rows, problems, per, self._step, self._off_grid)
        if output.shape[1] == 2 * rows.shape[1]:
            output = output[:, : rows.shape[1]]  # learned variances follow the mean; a rule has its own
        if output.shape != rows.shape:
            raise ShapeError(f"the pipeline predicts {tuple(output.shape)} for latents of shape {tuple(rows.shape)}")
        return output


class Decoder:
    """A pipeline's output for final latents (M, *event), in chunks, optionally checkpointed for the backward pass."""

    def __init__(self, call: PipelineCall, chunk: int, checkpoint: bool, problem: int | None = None):
        self.call, self.checkpoint, self.problem = call, checkpoint, problem
        self._chunked = Chunked(
            f"{type(call.user).__name__}'s decoder", self._decode, chunk, call.conditioning.together
        )

    def __call__(self, flat: Tensor) -> Tensor:
        return self._chunked(flat, self.call.conditioning.problems or 1 if self.problem is None else 1)

    def only(self, problem: int) -> Decoder:
        """The decoder of one problem."""
        return Decoder(self.call, self._chunked.chunk, self.checkpoint, problem)

    def _decode(self, rows: Tensor, problems: tuple[int, ...], per: int) -> Tensor:
        problems = problems if self.problem is None else (self.problem,)
        if not (self.checkpoint and torch.is_grad_enabled() and rows.requires_grad):
            output = self.call.decode(rows, problems, per)
        else:
            from torch.utils.checkpoint import checkpoint

            # Every call draws from generators at a fixed state, so there is none to put back.
            output: Tensor = checkpoint(
                self.call.decode, rows, problems, per, use_reentrant=False, preserve_rng_state=False
            )  # pyright: ignore[reportAssignmentType]
        # Several images of one state are an axis of their own, as frames are.
        return output if len(output) == len(rows) else output.unflatten(0, (len(rows), -1))


def _initial(call: PipelineCall) -> tuple[Tensor, float]:
    """Mean (B or 1, 1, *event) and standard deviation, 0 for given latents, of what the pipeline starts from."""
    means, spreads = [], []
    problems, latents = call.conditioning.problems or 1, call.conditioning.latents
    if latents is not None:
        return torch.stack([call.entering(latents[b : b + 1], b).float() for b in range(problems)]), 0.0
    for problem in range(problems):
        still, moved = (call.initial(problem, noise).float() for noise in (0.0, 1.0))
        means.append(still)
        spreads.append(moved - still)
    spread = torch.stack(spreads)
    if call.free is not None and not bool(call.free.any()):
        raise ModelError(f"{type(call.user).__name__} is given a mask that keeps everything: nothing is left to sample")
    spread = spread if call.free is None else spread[call.free]  # what is pasted over starts anywhere
    std = float(spread.double().mean())
    if not std > 0.0 or float((spread - std).abs().max()) > 1e-2 * std:
        raise ModelError(
            f"{type(call.user).__name__} starts from latents that are not Gaussian of one standard deviation (found "
            f"{float(spread.min()):.3g} to {float(spread.max()):.3g}); steer has no prior for it"
        )
    return torch.stack(means), std


def _clipping(scheduler: Any, rule: Rule) -> tuple[Rule, float | None]:
    """The rule, and the limit to clamp x_0 to, as the scheduler clips: DDIM keeps eps as predicted, others do not."""
    config = scheduler.config
    if not getattr(config, "clip_sample", False):  # the attribute, which some pipelines switch off: not the entry
        return rule, None
    limit = float(config.get("clip_sample_range", 1.0) or 1.0)
    if type(scheduler).__name__.startswith("DDIM") and isinstance(rule, DDIM | CPS | Churn):
        return ClippedPrediction(rule, limit), None
    return rule, limit


def _check(pipe: Any) -> None:
    """Raises ModelError for what is no pipeline, and where a network answers from a cache of earlier steps."""
    if not hasattr(pipe, "components") or getattr(pipe, "scheduler", None) is None:
        raise ModelError(
            f"from_pipeline opens diffusers pipelines that own a scheduler, got {type(pipe).__name__}; wrap a network "
            "(a UNet2DModel, say) by steer.from_eps, from_v, from_velocity or from_denoiser"
        )
    inner = inner_pipelines(pipe)
    if inner and set(inner) != COMBINED:
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
