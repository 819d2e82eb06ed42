"""Rewards in closed form, differentiable: linear, quadratic, and log-densities.

`Linear` and `Quadratic` also give their coefficients, so that analytic models can be tilted by them exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.errors import ShapeError
from steer.torch_modes import scores_in_full
from steer.types import QuadraticForm, RewardSpec

NATS = RewardSpec("nat", gradient="exact")
NATS_OF_UNKNOWN_GRADIENT = RewardSpec("nat")


@dataclass(frozen=True, eq=False)
class Linear:
    """r(x) = w . x + offset on flattened samples.

    Called with samples `[M, *event]` of D numbers each.

    Args:
        weight: w, D numbers in any shape; kept as float64 `[D]`.
        offset: a number.
        spec: of the reward; pass one if the unit is not nats.

    Returns:
        Scores `[M]`, differentiable: float64 for float64 samples, else float32.

    Raises:
        ShapeError: where a sample does not have D numbers.
    """

    weight: Any
    offset: float = 0.0
    spec: RewardSpec = NATS

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", torch.as_tensor(self.weight, dtype=torch.float64).flatten())

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        x = flatten_samples(samples, self.weight.numel(), "Linear(weight)")
        return x @ self.weight.to(x) + self.offset

    def quadratic_form(self, dim: int) -> QuadraticForm:
        """The coefficients A, b, c of r(x) = -x'Ax/2 + b'x + c; here A is zero.

        Args:
            dim: numbers in a sample; must be D.

        Returns:
            A `[D, D]`, b `[D]` and c, float64.

        Raises:
            ShapeError: if dim is not D.
        """
        _check_size(dim, self.weight.numel(), "Linear(weight)")
        return QuadraticForm(self.weight.new_zeros(dim, dim), self.weight, float(self.offset))


@dataclass(frozen=True, eq=False)
class Quadratic:
    """r(x) = -(x - c)' P (x - c) / 2 on flattened samples: highest at c where P is positive definite.

    Called with samples `[M, *event]` of D numbers each.

    Args:
        center: c, D numbers in any shape; kept as float64 `[D]`.
        precision: P, a number, a diagonal of shape `[D]` or of center's shape, or a matrix `[D, D]`. Kept as the
            matrix's symmetric part, on which alone r depends, float64 `[D, D]`. Negative curvature is allowed.
        spec: of the reward; pass one if the unit is not nats.

    Returns:
        Scores `[M]`, differentiable: float64 for float64 samples, else float32.

    Raises:
        ShapeError: where the sizes of center, precision and samples differ.
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

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        x = flatten_samples(samples, self.center.numel(), "Quadratic(center)")
        offset = x - self.center.to(x)
        return -0.5 * (offset @ self.precision.to(x) * offset).sum(1)

    def quadratic_form(self, dim: int) -> QuadraticForm:
        """The coefficients A, b, c of r(x) = -x'Ax/2 + b'x + c; here A = P and b = P center.

        Args:
            dim: numbers in a sample; must be D.

        Returns:
            A `[D, D]`, b `[D]` and c, float64.

        Raises:
            ShapeError: if dim is not D.
        """
        _check_size(dim, self.center.numel(), "Quadratic(center)")
        vector = self.precision @ self.center
        return QuadraticForm(self.precision, vector, -0.5 * float(self.center @ vector))


@dataclass(frozen=True, eq=False)
class LogDensity:
    """r(x) = log q(x), or log q(x) - log p(x) with a reference p: at temperature 1 it tilts p into q.

    Called with samples `[M, *event]` of D numbers each; half precision is raised to float32 first.

    Args:
        log_prob: log q, from flattened samples `[M, D]` to log-densities `[M]` in nats, for instance the `log_prob` of
            a steer.models.GaussianMixture.
        reference: log p, of the same kind; None for none.
        spec: of the reward. The default leaves open whether there is a gradient.

    Returns:
        Scores `[M]` in nats; differentiable where log_prob and reference are.

    Raises:
        ShapeError: where one of the functions does not return `[M]`.
    """

    log_prob: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor], Tensor] | None = None
    spec: RewardSpec = NATS_OF_UNKNOWN_GRADIENT

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        x = flatten_samples(samples)
        value = _log_density(self.log_prob, x, "log_prob")
        return value if self.reference is None else value - _log_density(self.reference, x, "reference")


def flatten_samples(samples: Tensor, size: int | None = None, name: str = "") -> Tensor:
    """Samples as rows of numbers.

    Args:
        samples: `[M, *event]`.
        size: the D that is required, if any.
        name: of what has that size, for the message.

    Returns:
        `[M, D]`, in at least float32.

    Raises:
        ShapeError: where D is not `size`.
    """
    x = samples.flatten(1)
    if size is not None:
        _check_size(x.shape[1], size, name)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_size(got: int, size: int, name: str) -> None:
    """ShapeError where samples have another number of coordinates than the argument `name` has numbers."""
    if got != size:
        raise ShapeError(f"{name} was given {size} numbers, and events have {got}; give it one number per coordinate")


def _log_density(function: Callable[[Tensor], Tensor], x: Tensor, name: str) -> Tensor:
    """One log-density per sample; ShapeError for any other shape."""
    value = function(x)
    if value.shape != x.shape[:1]:
        raise ShapeError(
            f"LogDensity({name}) must give one log-density per sample, shape ({x.shape[0]},), for samples of shape "
            f"{tuple(x.shape)}, got {tuple(value.shape)}; sum it over coordinates"
        )
    return value
