"""What a pipeline does before its loop: the noise it draws and the pipelines that it runs first."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .families import COMBINED_PIPELINES

DrawFunction = Callable[..., Tensor]
"""draw(original, shape, generator=, device=, dtype=, layout=), which replaces diffusers' `randn_tensor`."""


def inner_pipelines(pipe: Any) -> list[str]:
    """Names of the other pipelines that a pipeline runs, sorted."""
    return sorted(name for name, part in vars(pipe).items() if hasattr(part, "components") and callable(part))


def owner_of_loop(pipe: Any) -> Any:
    """The pipeline whose loop makes the samples: the decoder of a combined pipeline, else the pipeline itself."""
    return pipe.decoder_pipe if set(inner_pipelines(pipe)) == COMBINED_PIPELINES else pipe


def copy_pipeline(pipe: Any, scheduler: Any) -> Any:
    """Copy a pipeline so that its loop uses another scheduler. Modules are shared, and the copy shows no progress bar.

    Other schedulers and guiders keep state while a pipeline runs, so the copy gets its own.

    Args:
        pipe: The pipeline, which is only read.
        scheduler: The scheduler of the copy's loop.

    Returns:
        The copy.
    """
    other = copy.copy(pipe)
    other.set_progress_bar_config(disable=True)
    for name, part in pipe.components.items():
        if hasattr(part, "config_name") and not isinstance(part, torch.nn.Module):
            vars(other)[name] = copy.deepcopy(part)
    if owner_of_loop(pipe) is pipe:
        vars(other)["scheduler"] = scheduler
    else:
        vars(other)["prior_pipe"] = copy_pipeline(pipe.prior_pipe, copy.deepcopy(pipe.prior_pipe.scheduler))
        vars(other)["decoder_pipe"] = copy_pipeline(pipe.decoder_pipe, scheduler)
    return other


def constant_draw(value: float) -> DrawFunction:
    """Draws that are all equal to one number.

    The latents that a pipeline starts from are affine in their noise, so two such numbers give their mean and standard
    deviation whatever else they contain: an encoded image, packing, the scheduler's own scale.
    """

    def draw(original: Any, shape: Any, device: Any = None, dtype: Any = None, **_: Any) -> Tensor:
        return torch.full(tuple(shape), value, device=device, dtype=dtype)

    return draw


def same_draw_per_row(rows: int) -> DrawFunction:
    """Draws of one row, repeated over a batch, so that what is drawn before the loop is the same for every particle."""

    def draw(original: Any, shape: Any, **options: Any) -> Tensor:
        if shape[0] != rows:
            return original(shape, **options)
        return original((1, *shape[1:]), **options).repeat(rows, *[1] * (len(shape) - 1))

    return draw


@contextmanager
def noise_replaced(kind: type, draw: DrawFunction) -> Iterator[None]:
    """Within this context, draws that a pipeline class makes by diffusers' `randn_tensor` are made by `draw`."""
    functions = (getattr(kind, name, None) for name in ("__call__", "prepare_latents"))
    modules = [inspect.unwrap(function).__globals__ for function in functions if function is not None]
    modules = [module for module in modules if "randn_tensor" in module]
    drawn = [module["randn_tensor"] for module in modules]

    def replacement(original: Any) -> Any:
        names = ("generator", "device", "dtype", "layout")
        return lambda shape, *args, **options: draw(original, shape, **dict(zip(names, args, strict=False)), **options)

    try:
        for module, original in zip(modules, drawn, strict=True):
            module["randn_tensor"] = replacement(original)
        yield
    finally:
        for module, original in zip(modules, drawn, strict=True):
            module["randn_tensor"] = original
