"""What a pipeline does before its loop: the noise it draws, and the pipelines that it runs first."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

COMBINED = {"prior_pipe", "decoder_pipe"}
"""The pipelines inside a combined one (Kandinsky, Stable Cascade): the prior's whole loop is prelude."""

Draw = Callable[..., Tensor]
"""draw(original, shape, generator=, device=, dtype=, layout=), in place of diffusers' `randn_tensor`."""


def inner_pipelines(pipe: Any) -> list[str]:
    """The names of the pipelines that a pipeline runs."""
    return sorted(name for name, part in vars(pipe).items() if hasattr(part, "components") and callable(part))


def owner_of_loop(pipe: Any) -> Any:
    """The pipeline whose loop makes the samples: the decoder of a combined one, else the pipeline itself."""
    return pipe.decoder_pipe if set(inner_pipelines(pipe)) == COMBINED else pipe


def copied(pipe: Any, scheduler: Any) -> Any:
    """A silent copy of a pipeline that shares its modules and whose loop asks another scheduler.

    Other schedulers and guiders keep state while a pipeline runs, so the copy has its own.
    """
    other = copy.copy(pipe)
    other.set_progress_bar_config(disable=True)
    for name, part in pipe.components.items():
        if hasattr(part, "config_name") and not isinstance(part, torch.nn.Module):
            vars(other)[name] = copy.deepcopy(part)
    if owner_of_loop(pipe) is pipe:
        vars(other)["scheduler"] = scheduler
    else:
        vars(other)["prior_pipe"] = copied(pipe.prior_pipe, copy.deepcopy(pipe.prior_pipe.scheduler))
        vars(other)["decoder_pipe"] = copied(pipe.decoder_pipe, scheduler)
    return other


def constant(value: float) -> Draw:
    """Draws of one number.

    The latents a pipeline starts from are affine in their noise, so two numbers give their mean and standard deviation
    whatever else they hold: an encoded image, packing, the scheduler's own scale.
    """

    def draw(original: Any, shape: Any, device: Any = None, dtype: Any = None, **_: Any) -> Tensor:
        return torch.full(tuple(shape), value, device=device, dtype=dtype)

    return draw


def rows_alike(rows: int) -> Draw:
    """Draws in which every row of a batch is what it is alone: what a prelude draws does not tell particles apart."""

    def draw(original: Any, shape: Any, **options: Any) -> Tensor:
        if shape[0] != rows:
            return original(shape, **options)
        return original((1, *shape[1:]), **options).repeat(rows, *[1] * (len(shape) - 1))

    return draw


@contextmanager
def noise_replaced(kind: type, draw: Draw) -> Iterator[None]:
    """Every draw that a pipeline class makes by diffusers' `randn_tensor` made by `draw` instead."""
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
