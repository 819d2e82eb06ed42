"""Bounds on the prediction of x_0, where a network runs out of the range of the data: static, or by a quantile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SteerError


@dataclass(frozen=True)
class StaticClip:
    """Every coordinate of x_0 is kept in [low, high]."""

    low: float
    high: float

    def __call__(self, x0: Tensor) -> Tensor:
        return x0.clamp(self.low, self.high)


@dataclass(frozen=True)
class DynamicClip:
    """Every sample is kept in [-s, s] and scaled by limit / s, s its quantile of |x_0|. Built by `dynamic_clip`."""

    quantile: float
    limit: float

    def __call__(self, x0: Tensor) -> Tensor:
        size = x0.abs().flatten(2)
        rank = max(1, math.ceil(self.quantile * size.shape[2]))
        bound = size.kthvalue(rank, dim=2).values.clamp(min=self.limit)
        bound = bound.reshape(*bound.shape, *(1 for _ in x0.shape[2:]))
        return torch.maximum(torch.minimum(x0, bound), -bound) * (self.limit / bound)


Clip = StaticClip | DynamicClip


def dynamic_clip(quantile: float = 0.995, *, limit: float = 1.0) -> DynamicClip:
    """Dynamic thresholding, for `clip=` of `steer.from_eps` and the others.

    A sample whose quantile s of |x_0| is above the limit is kept in [-s, s], and scaled back to the limit; others are
    kept within the limit.

    Args:
        quantile: of the coordinates of one sample, in (0, 1].
        limit: largest |x_0| of the data, > 0.

    Returns:
        What `clip=` takes.

    Raises:
        SteerError: a quantile outside (0, 1], or a limit that is not positive.

    Source: Saharia et al. 2022 (Imagen), Sec. 2.3, with limit 1.
    """
    if not 0.0 < quantile <= 1.0 or not 0.0 < limit < math.inf:
        raise SteerError(f"a quantile is in (0, 1] and a limit is positive, got quantile={quantile}, limit={limit}")
    return DynamicClip(quantile, limit)


def as_clip(clip: float | tuple[float, float] | Clip | None) -> Clip | None:
    """What `clip=` was given, checked: a number c is [-c, c], a pair is [low, high]."""
    if clip is None or isinstance(clip, StaticClip | DynamicClip):
        return clip
    bounds = clip if isinstance(clip, tuple | list) else (-clip, clip) if isinstance(clip, int | float) else ()
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise SteerError(f"clip is a bound c > 0 for [-c, c], or a pair (low, high) with low < high, got {clip}")
    return StaticClip(float(bounds[0]), float(bounds[1]))
