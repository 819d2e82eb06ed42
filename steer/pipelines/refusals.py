"""What `steer.from_pipeline` refuses before anything runs: pipelines of another kind, and arguments without effect."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ..cost import check_counts
from ..errors import ModelError
from . import noise_levels
from .families import COMBINED_PIPELINES, SCHEDULERS_OUTSIDE_LOOP, TOKEN_SCHEDULERS, name_is_in
from .preparation import inner_pipelines

_WITHOUT_EFFECT = {
    "use_clipped_model_output": "an argument of DDIM's own step; give transition= a rule of steer.rules",
    "callback_on_step_end_tensor_inputs": "for a callback; give the sampler on_step=",
    "padding_mask_crop": "for pictures that are pasted into their originals after decoding; crop image and mask_image "
    "yourself, and paste the samples",
}


def check_pipeline(pipe: Any) -> None:
    """Raises ModelError for anything but a pipeline whose loop steps Gaussian latents by one scheduler."""
    kind = type(pipe).__name__
    if any(base.__name__ == "ModularPipeline" for base in type(pipe).__mro__):
        raise ModelError(
            f"from_pipeline steers the loop of a DiffusionPipeline, and {kind} is a modular pipeline, whose loop is in "
            "its blocks; load the same weights as a DiffusionPipeline, or open the network by steer.from_eps, from_v "
            "or from_velocity"
        )
    if not hasattr(pipe, "components"):
        raise ModelError(
            f"from_pipeline opens diffusers pipelines that own a scheduler, got {kind}; wrap a network (a UNet2DModel, "
            "say) by steer.from_eps, from_v, from_velocity or from_denoiser"
        )
    inner = inner_pipelines(pipe)
    if inner and set(inner) != COMBINED_PIPELINES:
        raise ModelError(
            f"{kind} runs other pipelines ({', '.join(inner)}), each with a loop and a scheduler of its own; open the "
            f"one to steer, for instance steer.from_pipeline(pipe.{inner[0]}, ...)"
        )
    _check_schedulers(pipe, kind)
    for name, module in pipe.components.items():
        if getattr(module, "is_cache_enabled", False):
            raise ModelError(
                f"pipe.{name} caches activations from step to step, and samplers visit states in any order; call "
                f"pipe.{name}.disable_cache() before opening the pipeline"
            )
    if getattr(pipe, "free_noise_enabled", False):
        raise ModelError(
            f"{kind} has FreeNoise on, which draws the frames' latents from each other, so that they do not start from "
            "independent Gaussian noise; call pipe.disable_free_noise() before opening it"
        )


def _check_schedulers(pipe: Any, kind: str) -> None:
    """Raises ModelError unless the loop of a pipeline steps by one scheduler, `pipe.scheduler`, of Gaussian levels."""
    stepped = [
        name
        for name, part in pipe.components.items()
        if name.endswith("scheduler") and part is not None and name not in SCHEDULERS_OUTSIDE_LOOP
    ]
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        named = f"which has {' and '.join(stepped)}" if stepped else "which has none"
        raise ModelError(
            f"from_pipeline opens diffusers pipelines that own a scheduler, pipe.scheduler, got {kind}, {named}; wrap "
            "its network by steer.from_eps, from_v, from_velocity or from_denoiser"
        )
    if len(stepped) > 1:
        raise ModelError(
            f"the loop of {kind} steps by {len(stepped)} schedulers ({', '.join(stepped)}), and a process is the chain "
            "of one; wrap its network by steer.from_velocity or from_denoiser"
        )
    if name_is_in(scheduler, TOKEN_SCHEDULERS):
        raise ModelError(
            f"{type(scheduler).__name__} of {kind} steps tokens, which have no Gaussian noise levels; open its network "
            "by steer.from_logits"
        )
    noise_levels.check_known(scheduler)


def checked_counts(steps: int | None, chunk: int | None, call: Mapping[str, Any]) -> int:
    """The number of steps to ask the pipeline for: given, or that of its own `timesteps` or `sigmas`, or 50.

    Args:
        steps: As given to `from_pipeline`.
        chunk: Likewise.
        call: The pipeline's arguments.

    Raises:
        SteerError: Where a number is not a whole one of at least 1.
        ModelError: Where `steps` is not the length of the grid that was given.
    """
    check_counts(steps=steps, chunk=chunk)
    for name in ("timesteps", "sigmas"):
        grid = call.get(name)
        if grid is None:
            continue
        if steps is not None and steps != len(grid):
            raise ModelError(f"steps={steps} and {len(grid)} {name} say different things; leave steps out")
        return len(grid)
    return 50 if steps is None else steps


def check_arguments(pipe: Any, call: Mapping[str, Any], steps: int | None) -> None:
    """Raises ModelError for arguments that steer would ignore: without effect here, or without an entry."""
    kind = type(pipe).__name__
    for name, reason in _WITHOUT_EFFECT.items():
        if call.get(name) is not None:
            raise ModelError(f"{name} is not an argument of a process: it is {reason}")
    for name, value in call.items():
        if isinstance(value, (list, tuple)) and not value and "prompt" in name:
            raise ModelError(f"{name} must hold a text for every problem, got none; give {kind} at least one")
    if steps is not None and "num_inference_steps" not in inspect.signature(type(pipe).__call__).parameters:
        names = [name for name in inspect.signature(type(pipe).__call__).parameters if "steps" in name]
        raise ModelError(
            f"{kind} takes no num_inference_steps, so steps={steps} would have no effect; leave steps out"
            f"{f', and give its own {names[0]}' if names else ''}"
        )


def check_strength(pipe: Any, call: Mapping[str, Any], steps: int, error: Exception) -> None:
    """Raises ModelError where an error of a pipeline's own call comes from a strength that leaves no step."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("strength")
    strength = call.get("strength", None if parameter is None else parameter.default)
    if isinstance(strength, int | float) and strength * steps < 1.0 and not isinstance(error, torch.OutOfMemoryError):
        raise ModelError(
            f"strength={strength} of {steps} steps leaves {type(pipe).__name__} no step to take; give a strength of at "
            f"least {1.0 / steps:.3g}, or more steps"
        ) from error
