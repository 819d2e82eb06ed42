"""Targets whose answers are known in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.mixture import ExactStep, GaussianMixture, gaussian, gaussian_mixture
from ..processes.gaussian import GaussianProcess
from ..processes.schedules import uniform_times
from ..types import QuadraticForm, Rule


class Linear:
    """r(x) = b'x."""

    vector = torch.tensor([0.5, -0.3], dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        return x.double() @ self.vector

    def quadratic_form(self, size: int) -> QuadraticForm:
        return QuadraticForm(torch.zeros(size, size, dtype=torch.float64), self.vector, 0.0)


LINEAR = Linear()


def plane_mixture() -> GaussianMixture:
    covs = [[[0.5, 0.2], [0.2, 0.4]], [[0.3, 0.0], [0.0, 0.6]]]
    return GaussianMixture([[1.5, 0.0], [-1.5, 1.0]], covs, [0.6, 0.4])


def exact_chain(schedule: Any, steps: int = 5) -> GaussianProcess:
    """A chain whose every transition is the true reverse kernel: no error of discretisation."""
    mixture, grid = plane_mixture(), uniform_times(schedule, steps)
    return gaussian_mixture(
        mixture.means,
        mixture.covs,
        mixture.weights,
        schedule=schedule,
        times=grid,
        transition=ExactStep(mixture),
        dtype=torch.float64,
    )


def gaussian_chain(schedule: Any, rule: Rule, steps: int) -> GaussianProcess:
    """Gaussian data under a rule: every step is affine, so the distribution of the chain is known."""
    grid = uniform_times(schedule, steps, start=0.9)
    return gaussian(
        [0.5, -0.3], [[0.8, 0.3], [0.3, 0.5]], schedule=schedule, times=grid, transition=rule, dtype=torch.float64
    )


def learned_process(steps: int = 5) -> GaussianProcess:
    """A process without a closed form of its steps, as a pretrained model is."""
    mixture = plane_mixture()
    return gaussian_mixture(mixture.means, mixture.covs, mixture.weights, steps=steps, dtype=torch.float64)


class Nothing:
    """r(x) = 0."""

    def quadratic_form(self, size: int) -> QuadraticForm:
        return QuadraticForm(torch.zeros(size, size).double(), torch.zeros(size).double(), 0.0)
