"""Pipelines of nothing but a UNet, called directly: faster, and with class labels, which their own call does not take.

The scheduler's own noise levels, time grid, prediction type and clipping are kept.
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
from .default_rule import chosen_rule
from .families import BARE_UNET_SCHEDULERS, BARE_UNETS, name_is_in


def from_pipeline(
    pipe: Any,
    *,
    steps: int = 50,
    transition: Rule | None = None,
    class_labels: int | Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    chunk: int = 256,
) -> GaussianProcess:
    """Open a pipeline of nothing but a UNet as a process on the pipeline's own noise levels.

    Args:
        pipe: A pipeline with `unet` (UNet2DModel) and `scheduler` (DDPM, DDIM or FlowMatchEuler).
        steps: Number of steps K, the pipeline's num_inference_steps.
        transition: A transition rule; ancestral sampling, `steer.ddim(eta=1.0)`, by default. eta = 0 gives the
            pipeline's DDIM.
        class_labels: For class-conditional networks: one label for every problem, or one per problem (axis 0). None is
            the null class, taken to be the last embedding.
        guidance_scale: Classifier-free guidance: prediction of null + scale * (label - null). 1 is off; with any other
            value, every prediction costs two network rows.
        chunk: Most rows per network call.

    Returns:
        A process with states [B, N, C, H, W], float32, whose `decode` gives images in [0, 1], as the pipeline does.

    Raises:
        ModelError: For pipelines and schedulers of other kinds, and for labels or guidance of a network without
            classes.
        ShapeError: For labels that are not classes of the network.
    """
    unet, scheduler = pipe.unet, pipe.scheduler
    schedule, times, to_timestep = _schedule_and_times(scheduler, steps)
    network = _GuidedUNet(
        unet=unet,
        to_timestep=to_timestep,
        labels=_labels(unet, class_labels),
        scale=float(guidance_scale),
        chunk=chunk,
    )
    denoiser, rule = _denoiser_and_rule(network, schedule, scheduler, chosen_rule(scheduler, transition))
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return GaussianProcess(
        denoiser=denoiser,
        schedule=schedule,
        times=times,
        event=(unet.config.in_channels, height, width),
        decoder=_to_unit_range,
        problems=network.problems,
        rows=2 if network.guided else 1,
        device=unet.device,
    ).with_rule(rule)


def is_bare_unet(pipe: Any) -> bool:
    """Whether a pipeline is nothing but a UNet2DModel and one of the schedulers in `families.BARE_UNET_SCHEDULERS`."""
    modules = [part for part in getattr(pipe, "components", {}).values() if isinstance(part, torch.nn.Module)]
    return (
        len(modules) == 1
        and name_is_in(getattr(pipe, "unet", None), BARE_UNETS)
        and name_is_in(getattr(pipe, "scheduler", None), BARE_UNET_SCHEDULERS)
    )


@dataclass(frozen=True)
class _Timestep:
    """From times of the path to the network's timesteps. A class, since processes go to other processes by pickle."""

    length: int
    first: float = 0.0

    def __call__(self, t: float) -> float:
        return t * self.length - self.first


class _GuidedUNet:
    """The UNet on states [B, N, C, H, W] at a time of the path, in chunks, with guidance and one label per problem."""

    def __init__(self, unet: Any, to_timestep: Any, labels: Tensor | None, scale: float, chunk: int):
        self.unet, self.to_timestep, self.labels, self.scale, self.chunk = unet, to_timestep, labels, scale, chunk
        self.guided = scale != 1.0
        if self.guided and labels is None:
            raise ModelError(
                f"guidance_scale needs a class-conditional network, got {scale} for one with no class embedding; "
                "leave it out"
            )

    @property
    def problems(self) -> int | None:
        """Number of problems, or None where any number runs."""
        return len(self.labels) if self.labels is not None and len(self.labels) > 1 else None

    def only(self, problem: int) -> _GuidedUNet:
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
        """The UNet's output for rows [M, C, H, W], at most `chunk` per call."""
        rows = flat.to(self.unet.device, self.unet.dtype).split(self.chunk)
        given = [None] * len(rows) if labels is None else labels.split(self.chunk)
        out = [self.unet(row, timestep, class_labels=label).sample for row, label in zip(rows, given, strict=True)]
        return torch.cat(out).to(flat)


def _schedule_and_times(scheduler: Any, steps: int) -> tuple[Schedule, tuple[float, ...], Any]:
    """The scheduler's path, its own time grid, and the map from path time to the network's timestep."""
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise ModelError(
            f"{type(scheduler).__name__} has no grid of {steps} steps: {error}; give steps= at most the "
            f"{scheduler.config.num_train_timesteps} levels that it was trained on"
        ) from error
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        length = scheduler.config.num_train_timesteps
        return RectifiedFlow(), tuple(scheduler.sigmas.double().tolist()), _Timestep(length)
    length = len(scheduler.alphas_cumprod)
    times = [(n + 1) / length for n in scheduler.timesteps.tolist()]
    last = 0.0 if getattr(scheduler.config, "set_alpha_to_one", True) else 1 / length
    schedule = Tabulated(scheduler.alphas_cumprod.double().tolist())
    return schedule, (*times, last), _Timestep(length, first=1.0)


def _denoiser_and_rule(network: _GuidedUNet, schedule: Schedule, scheduler: Any, rule: Rule) -> tuple[Denoiser, Rule]:
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
            f"a bare UNet must predict one of {', '.join(kinds)}, without dynamic thresholding, got "
            f"prediction_type={config.prediction_type!r} and thresholding={bool(config.get('thresholding'))}; change "
            "the scheduler's config, or open the network by steer.from_denoiser"
        )
    denoise = kinds[config.prediction_type]()
    if not config.clip_sample:
        return denoise, rule
    limit = config.clip_sample_range
    if type(scheduler).__name__ == "DDIMScheduler" and isinstance(rule, DDIM | CPS | Churn):
        return denoise, ClippedPrediction(rule, limit)  # DDIM clips x_0 and keeps eps as predicted
    return _ClampedDenoiser(denoise, limit), rule


@dataclass(frozen=True, eq=False)
class _ClampedDenoiser:
    """A denoiser whose predictions are clamped to [-limit, limit]."""

    denoiser: Denoiser
    limit: float

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return self.denoiser(x, t).clamp(-self.limit, self.limit)

    def only(self, problem: int) -> _ClampedDenoiser:
        """The denoiser of one problem."""
        return replace(self, denoiser=parameterization.only(self.denoiser, problem))


def _labels(unet: Any, class_labels: int | Sequence[int] | None) -> Tensor | None:
    """Labels as a tensor [1] or [B], None for a network without classes; raises for labels that it does not have."""
    count = unet.config.num_class_embeds
    if count is None:
        if class_labels is not None:
            raise ModelError(
                f"class_labels need a class-conditional network, got {class_labels} for one with no class embedding; "
                "leave them out"
            )
        return None
    labels = torch.as_tensor(count - 1 if class_labels is None else class_labels, device=unet.device).reshape(-1)
    if labels.numel() == 0 or labels.is_floating_point() or not bool(((labels >= 0) & (labels < count)).all()):
        raise ShapeError(f"class_labels must be integers in [0, {count - 1}], got {class_labels}")
    return labels


def _to_unit_range(x: Tensor) -> Tensor:
    """Images in [0, 1] from states in [-1, 1]."""
    return (x / 2.0 + 0.5).clamp(0.0, 1.0)
