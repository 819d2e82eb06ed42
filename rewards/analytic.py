"""Rewards in closed form, differentiable: linear, quadratic, and log-densities.

`Linear` and `Quadratic` also tell their coefficients, so that analytic models tilt by them exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.errors import ShapeError
from steer.types import QuadraticForm, RewardSpec

NATS = RewardSpec("nat", gradient="exact")
UNSAID = RewardSpec("nat")


@dataclass(frozen=True, eq=False)
class Linear:
    """r(x) = w . x + offset on flattened events.

    weight: D numbers in any shape, kept as float64 (D,). offset: a number. spec: say so if the unit is not nats.
    Scores (M,) of samples (M, *event): float64 for float64 samples, else float32. Raises ShapeError where the event
    has not D numbers.
    """

    weight: Any
    offset: float = 0.0
    spec: RewardSpec = NATS

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", torch.as_tensor(self.weight, dtype=torch.float64).flatten())

    def __call__(self, samples: Tensor) -> Tensor:
        x = flat(samples, self.weight.numel(), "Linear(weight)")
        return x @ self.weight.to(x) + self.offset

    def quadratic_form(self, dim: int) -> QuadraticForm:
        """The coefficients of r(x) = -x'Ax/2 + b'x + c, float64; A is zero. dim must be D."""
        _check_size(dim, self.weight.numel(), "Linear(weight)")
        return QuadraticForm(self.weight.new_zeros(dim, dim), self.weight, float(self.offset))


@dataclass(frozen=True, eq=False)
class Quadratic:
    """r(x) = -(x - c)' P (x - c) / 2 on flattened events: highest at c where P is positive.

    center: D numbers in any shape, kept as float64 (D,). spec: say so if the unit is not nats.
    precision: a number, a diagonal of shape (D,) or of center's shape, or a matrix (D, D); kept as the matrix's
    symmetric part, on which alone r depends, float64 (D, D). Negative curvature is allowed.
    Scores (M,) of samples (M, *event): float64 for float64 samples, else float32. Raises ShapeError where sizes differ.
    """

    center: Any
    precision: Any = 1.0
    spec: RewardSpec = NATS

    def __post_init__(self) -> None:
        center = torch.as_tensor(self.center, dtype=torch.float64)
        precision = torch.as_tensor(self.precision, dtype=torch.float64).to(center.device)
        size = center.numel()
        if precision.shape == (size, size):
            matrix = 0.5 * (precision + precision.T)
        elif precision.ndim == 0 or precision.shape in ((size,), center.shape):
            matrix = torch.diag(precision.flatten().expand(size))
        else:
            raise ShapeError(
                f"precision must be a number, {size} numbers (a diagonal) or a matrix ({size}, {size}), as center has "
                f"{size} numbers, got shape {tuple(precision.shape)}"
            )
        object.__setattr__(self, "center", center.flatten())
        object.__setattr__(self, "precision", matrix)

    def __call__(self, samples: Tensor) -> Tensor:
        x = flat(samples, self.center.numel(), "Quadratic(center)")
        away = x - self.center.to(x)
        return -0.5 * (away @ self.precision.to(x) * away).sum(1)

    def quadratic_form(self, dim: int) -> QuadraticForm:
        """The coefficients of r(x) = -x'Ax/2 + b'x + c, float64: A = P, b = Pc. dim must be D."""
        _check_size(dim, self.center.numel(), "Quadratic(center)")
        vector = self.precision @ self.center
        return QuadraticForm(self.precision, vector, -0.5 * float(self.center @ vector))


@dataclass(frozen=True, eq=False)
class LogDensity:
    """r(x) = log q(x), or log q(x) - log p(x) with a reference p: at temperature 1 it tilts p into q.

    log_prob, reference: functions of flattened samples (M, D) to log-densities (M,) in nats, for instance the
    `log_prob` of a steer.models.GaussianMixture; differentiable where these are. Half-precision samples are cast to
    float32 first. Raises ShapeError where one does not return (M,).
    """

    log_prob: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor], Tensor] | None = None
    spec: RewardSpec = UNSAID

    def __call__(self, samples: Tensor) -> Tensor:
        x = flat(samples)
        value = _density(self.log_prob, x, "log_prob")
        return value if self.reference is None else value - _density(self.reference, x, "reference")


def flat(samples: Tensor, size: int | None = None, name: str = "") -> Tensor:
    """Samples (M, *event) as (M, D) in at least float32; ShapeError where D is not the size that `name` has."""
    x = samples.flatten(1)
    if size is not None:
        _check_size(x.shape[1], size, name)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_size(got: int, size: int, name: str) -> None:
    if got != size:
        raise ShapeError(f"{name} was given {size} numbers, and events have {got}; give it one number per coordinate")


def _density(function: Callable[[Tensor], Tensor], x: Tensor, name: str) -> Tensor:
    value = function(x)
    if value.shape != x.shape[:1]:
        raise ShapeError(
            f"LogDensity({name}) must give one log-density per sample, shape ({x.shape[0]},), for samples of shape "
            f"{tuple(x.shape)}, got {tuple(value.shape)}; sum it over coordinates"
        )
    return value
