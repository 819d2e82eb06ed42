"""Torch's ambient modes (autocast, inference mode, the default dtype), kept away from what they would spoil."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

_NOTHING = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A block that computes in the dtypes of its own tensors, also inside a caller's autocast.

    Half precision makes ties of close scores, and scores are compared.

    Args:
        device: that the block computes on.

    Returns:
        A context manager; it does nothing where autocast is off.
    """
    if not torch.is_autocast_enabled(device.type):
        return _NOTHING
    return torch.autocast(device.type, enabled=False)


def autocast_of(device: torch.device | str) -> str:
    """What a caller's autocast does to operations on a device.

    Args:
        device: a device, or its name.

    Returns:
        "off", or the dtype that autocast computes in, such as "bfloat16".
    """
    kind = torch.device(device).type
    return str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if torch.is_autocast_enabled(kind) else "off"


@contextmanager
def lasting() -> Iterator[None]:
    """For what outlives a call (caches, networks): outside its inference mode and gradients, and in float32 by default.

    A tensor made in inference mode can never be part of a gradient again, and a network made while another default
    dtype is set holds rounded weights. Usable as a decorator too.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def scores_in_full(call: Function) -> Function:
    """A reward's `__call__` outside its caller's autocast, as samplers call it.

    Args:
        call: a method of samples `[M, ...]`.

    Returns:
        The method; its signature stays.
    """

    @functools.wraps(call)
    def scored(self: Any, samples: Tensor, **arguments: Any) -> Any:
        with without_autocast(samples.device):
            return call(self, samples, **arguments)

    return scored  # pyright: ignore[reportReturnType]
