"""Gradients through a decoder: recomputed to save memory, and with weights whose dtype changes on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def recomputed(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """The function's output, whose activations are computed again in the backward pass instead of being kept.

    Every call sets its generators to a fixed state, so the second gives the same as the first. Only `rows` get a
    gradient, and no second one.
    """
    return _Recomputed.apply(rows, function)  # pyright: ignore[reportReturnType]


class _Recomputed(torch.autograd.Function):
    """torch.utils.checkpoint compares dtypes of weights between its two passes, which upcast decoders change."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(rows)
        ctx.function = function
        return function(rows.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.enable_grad():
            rows = ctx.saved_tensors[0].detach().requires_grad_()
            output = ctx.function(rows)
        (found,) = torch.autograd.grad(output, rows, gradient)
        return found, None


def weights_kept(modules: Iterable[torch.nn.Module]) -> AbstractContextManager[Any]:
    """Within this context, the backward pass will see weights as they are now, where a decoder is upcast meanwhile.

    Pipelines move such an autoencoder to float32 for the call and back at its end, in place, and the backward pass,
    which comes later, would find float16 weights. The float32 ones live as long as the graph does.
    """
    if not any(_is_upcast(module) for module in modules):
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_alias_of_weight, lambda tensor: tensor)


def _alias_of_weight(tensor: Tensor) -> Tensor:
    """Another tensor on the same memory, where it is a weight; `module.to` gives the weight itself other memory."""
    return tensor.detach() if isinstance(tensor, torch.nn.Parameter) else tensor


def _is_upcast(module: torch.nn.Module) -> bool:
    """Whether a pipeline moves a module to float32 while it decodes."""
    config = getattr(module, "config", None)
    return bool(getattr(config, "force_upcast", False)) and getattr(module, "dtype", None) == torch.float16
