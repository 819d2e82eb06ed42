"""Bare UNets by direct calls: a small override for unconditional and class-conditional pipelines.

Their pipeline's call cannot pass class labels on, so the general way cannot reach them; and it is the fastest way to
run them. The scheduler's own noise levels, time grid, prediction type and clipping are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, ShapeError
from ..processes import parameterization
from ..processes.gaussian import GaussianProcess
from ..processes.schedules import RectifiedFlow, Tabulated
from ..processes.transitions import CPS, DDIM, Churn, ClippedPrediction
from ..types import Denoiser, Rule, Schedule

_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler")


def from_pipeline(
    pipe: Any,
    *,
    steps: int = 50,
    transition: Rule | None = None,
    class_labels: int | Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    chunk: int = 256,
) -> GaussianProcess:
    """A process that runs a diffusers pipeline's network on the pipeline's own noise levels.

    pipe:           a pipeline with `unet` (UNet2DModel) and `scheduler` (DDPM, DDIM or FlowMatchEuler).
    steps:          as the pipeline's num_inference_steps.
    transition:     a rule; ancestral sampling, `steer.ddim(eta=1.0)`, by default. eta = 0 gives the pipeline's DDIM.
    class_labels:   for class-conditional networks: one label for every problem, or one per problem (axis 0). None is
                    the null class, taken to be the last embedding.
    guidance_scale: classifier-free guidance, prediction of null + scale * (label - null); 1 is off. Above it every
                    prediction costs two network rows.
    chunk:          network rows per call.

    States are float32 (B, N, C, H, W); `decode` gives images in [0, 1], as the pipeline does.
    Raises ModelError for pipelines and schedulers of other kinds.
    """
    unet, scheduler = pipe.unet, pipe.scheduler
    schedule, times, to_timestep = _levels(scheduler, steps)
    network = _Network(unet, to_timestep, _labels(unet, class_labels), float(guidance_scale), chunk)
    denoiser, rule = _prediction(network, schedule, scheduler, transition or DDIM())
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return GaussianProcess(
        denoiser, schedule, times, (unet.config.in_channels, height, width), rule, _to_unit_range,
        problems=network.problems, rows=2 if network.guided else 1, device=unet.device,
    )  # fmt: skip


def serves(pipe: Any) -> bool:
    """Whether a pipeline is nothing but a UNet2DModel and a scheduler of those known here."""
    modules = [part for part in getattr(pipe, "components", {}).values() if isinstance(part, torch.nn.Module)]
    return (
        len(modules) == 1
        and type(getattr(pipe, "unet", None)).__name__ == "UNet2DModel"
        and type(getattr(pipe, "scheduler", None)).__name__ in _SCHEDULERS
    )


class _Network:
    """The UNet on states (B, N, C, H, W) and a path time, in chunks, with labels aligned to problems."""

    def __init__(self, unet: Any, to_timestep: Any, labels: Tensor | None, scale: float, chunk: int):
        self.unet, self.to_timestep, self.labels, self.scale, self.chunk = unet, to_timestep, labels, scale, chunk
        self.guided = scale != 1.0
        if self.guided and labels is None:
            raise ModelError("guidance_scale needs a class-conditional network; this one has no class embedding")

    @property
    def problems(self) -> int | None:
        return len(self.labels) if self.labels is not None and len(self.labels) > 1 else None

    def only(self, problem: int) -> _Network:
        """The network with one problem's label."""
        other = copy.copy(self)
        other.labels = None if self.labels is None else self.labels[problem : problem + 1]
        return other

    def __call__(self, x: Tensor, t: float) -> Tensor:
        # A tensor: given a Python float, the network would truncate it to an integer.
        flat, timestep = x.flatten(0, 1), torch.tensor(self.to_timestep(t), device=self.unet.device)
        if self.labels is None:
            return self._chunked(flat, timestep, None).view(x.shape)
        labels = self.labels.repeat_interleave(len(flat) // len(self.labels))
        out = self._chunked(flat, timestep, labels)
        if self.guided:
            free = self._chunked(flat, timestep, torch.full_like(labels, self.unet.config.num_class_embeds - 1))
            out = free + self.scale * (out - free)
        return out.view(x.shape)

    def _chunked(self, flat: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
        rows = flat.to(self.unet.device, self.unet.dtype).split(self.chunk)
        given = [None] * len(rows) if labels is None else labels.split(self.chunk)
        out = [self.unet(row, timestep, class_labels=label).sample for row, label in zip(rows, given, strict=True)]
        return torch.cat(out).to(flat)


def _levels(scheduler: Any, steps: int) -> tuple[Schedule, tuple[float, ...], Any]:
    """The scheduler's path, its own time grid, and the map from path time to the network's timestep."""
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise ModelError(
            f"{type(scheduler).__name__} has no grid of {steps} steps: {error}; it was trained on "
            f"{scheduler.config.num_train_timesteps} levels, so ask for at most that many"
        ) from error
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        length = scheduler.config.num_train_timesteps
        return RectifiedFlow(), tuple(scheduler.sigmas.double().tolist()), lambda t: t * length
    length = len(scheduler.alphas_cumprod)
    times = [(n + 1) / length for n in scheduler.timesteps.tolist()]
    last = 0.0 if getattr(scheduler.config, "set_alpha_to_one", True) else 1 / length
    schedule = Tabulated(scheduler.alphas_cumprod.double().tolist())
    return schedule, (*times, last), lambda t: t * length - 1.0


def _prediction(network: _Network, schedule: Schedule, scheduler: Any, rule: Rule) -> tuple[Denoiser, Rule]:
    """The denoiser of the scheduler's prediction type, and the rule with the scheduler's clipping."""
    config = scheduler.config
    if isinstance(schedule, RectifiedFlow):
        return parameterization.from_velocity(network, schedule), rule
    kinds = {
        "epsilon": lambda: parameterization.from_eps(network, schedule),
        "v_prediction": lambda: parameterization.from_v(network, schedule),
        "sample": lambda: network,
    }
    if config.prediction_type not in kinds or config.get("thresholding"):
        raise ModelError(
            f"from_pipeline knows prediction types {', '.join(kinds)} without dynamic thresholding, got "
            f"{config.prediction_type}{' with thresholding' if config.get('thresholding') else ''}"
        )
    denoise = kinds[config.prediction_type]()
    if not config.clip_sample:
        return denoise, rule
    limit = config.clip_sample_range
    if type(scheduler).__name__ == "DDIMScheduler" and isinstance(rule, DDIM | CPS | Churn):
        return denoise, ClippedPrediction(rule, limit)  # DDIM clips x_0 and keeps eps as predicted
    return _Clamped(denoise, limit), rule


@dataclass(frozen=True, eq=False)
class _Clamped:
    """A denoiser whose predictions are kept within +-limit."""

    denoiser: Denoiser
    limit: float

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return self.denoiser(x, t).clamp(-self.limit, self.limit)

    def only(self, problem: int) -> _Clamped:
        return replace(self, denoiser=parameterization.only(self.denoiser, problem))


def _labels(unet: Any, class_labels: int | Sequence[int] | None) -> Tensor | None:
    count = unet.config.num_class_embeds
    if count is None:
        if class_labels is not None:
            raise ModelError("class_labels were given, and this network has no class embedding")
        return None
    labels = torch.as_tensor(count - 1 if class_labels is None else class_labels, device=unet.device).reshape(-1)
    if labels.numel() == 0 or labels.is_floating_point() or not bool(((labels >= 0) & (labels < count)).all()):
        raise ShapeError(f"class_labels must be integers in [0, {count - 1}], got {class_labels}")
    return labels


def _to_unit_range(x: Tensor) -> Tensor:
    return (x / 2.0 + 0.5).clamp(0.0, 1.0)
