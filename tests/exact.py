"""Closed-form references and the one statistical test all samplers of a law are put to.

The statistics themselves are public, in `steer.testing`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import steer
from steer.models import GaussianMixture
from steer.results.result import Result
from steer.testing import LIMIT, worst, z, z_scores

__all__ = ["LIMIT", "worst", "z", "z_scores"]  # and what stands below


class Linear:
    """r(x) = b'x + c."""

    def __init__(self, vector, offset: float = 0.0):
        self.vector, self.offset = torch.as_tensor(vector, dtype=torch.float64), offset

    def __call__(self, x: Tensor) -> Tensor:
        return x.double().flatten(1) @ self.vector + self.offset

    def quadratic_form(self, size: int) -> steer.QuadraticForm:
        return steer.QuadraticForm(torch.zeros(size, size, dtype=torch.float64), self.vector, self.offset)


class Quadratic:
    """r(x) = -k |x - c|^2 / 2."""

    def __init__(self, center, strength: float):
        self.center, self.strength = torch.as_tensor(center, dtype=torch.float64), strength

    def __call__(self, x: Tensor) -> Tensor:
        return -0.5 * self.strength * (x.double().flatten(1) - self.center).square().sum(1)

    def quadratic_form(self, size: int) -> steer.QuadraticForm:
        return steer.QuadraticForm(
            self.strength * torch.eye(size, dtype=torch.float64),
            self.strength * self.center,
            -0.5 * self.strength * float(self.center.square().sum()),
        )


PATHS = {"vp": steer.VP(), "ve": steer.VE(), "flow": steer.RectifiedFlow()}


def times(path: str, steps: int) -> tuple[float, ...]:
    """A grid that spends its steps where each path has them to spend."""
    schedule = PATHS[path]
    if path == "ve":
        return steer.sigma_times(schedule, steps, sigma_min=0.05)
    return steer.uniform_times(schedule, steps)


def mixture_2d() -> GaussianMixture:
    """Three correlated modes in the plane."""
    means = [[2.0, 0.0], [-2.0, 1.0], [0.0, -2.0]]
    covs = [[[0.5, 0.2], [0.2, 0.4]], [[0.3, 0.0], [0.0, 0.6]], [[0.4, -0.1], [-0.1, 0.3]]]
    return GaussianMixture(means, covs, [0.5, 0.3, 0.2])


def mixture_16d() -> GaussianMixture:
    """Four modes in 16 dimensions with random full covariances."""
    key = steer.Key(7)
    means = 1.5 * key.fold("means").normal((1, 4, 16))[0]
    factors = 0.25 * key.fold("factors").normal((1, 4, 16, 16))[0]
    covs = 0.3 * torch.eye(16, dtype=torch.float64) + factors @ factors.mT / 4
    return GaussianMixture(means, covs, [0.4, 0.3, 0.2, 0.1])


def exact_chain(mixture: GaussianMixture, path: str, steps: int) -> steer.GaussianProcess:
    """A chain whose every transition is the true reverse kernel: no discretisation error at any number of steps."""
    return steer.models.gaussian_mixture(
        mixture.means, mixture.covs, mixture.weights, schedule=PATHS[path], times=times(path, steps),
        transition=steer.models.ExactStep(mixture), dtype=torch.float64,
    )  # fmt: skip


class Grid2D:
    """A law on the plane by quadrature: normaliser, mean and variances of exp(log_density) on a square."""

    def __init__(self, log_density, edge: float = 9.0, cells: int = 600):
        cell = 2.0 * edge / cells
        axis = (torch.arange(cells, dtype=torch.float64) + 0.5) * cell - edge
        points = torch.cartesian_prod(axis, axis)
        value = log_density(points)
        self.log_evidence = float(value.logsumexp(0)) + 2.0 * math.log(cell)
        self.mean = torch.softmax(value, 0) @ points
        self.variance = torch.softmax(value, 0) @ (points - self.mean).square()


def estimates(result: Result, law: Grid2D) -> tuple[Tensor, Tensor]:
    """log evidence, means and variances less their true values, pooled over problems, (5,), and influences (B, 5).

    Pooled by evidence: E[Z_hat f_hat] / E[Z_hat] is consistent in the number of problems at any number of particles.
    An influence is what a problem contributes to an estimate, to first order: the variance of an estimate is theirs
    over B.
    """
    relative = (result.log_evidence - law.log_evidence).exp()[:, None]
    share = relative / relative.mean()
    centred = result.mean(lambda x: x.double() - law.mean)
    square = result.mean(lambda x: (x.double() - law.mean).square() - law.variance)
    errors = torch.cat([centred, square], 1)
    pooled = (share * errors).mean(0)
    return torch.cat([relative.mean(0).log(), pooled]), torch.cat([share - 1.0, share * (errors - pooled)], 1)


def extrapolated(run, law: Grid2D, steps: int) -> dict[str, tuple[float, float, float]]:
    """What is left of every estimate's error when steps go to 0: (z, extrapolated error, bias of the finer run).

    run(steps) -> Result. Bias is linear in the step to leading order, so 2 E(steps / 2) - E(step) is without it; the
    two runs share no noise, so variances add.
    """
    (coarse, coarse_parts), (fine, fine_parts) = estimates(run(steps), law), estimates(run(2 * steps), law)
    error = 2.0 * fine - coarse
    spread = ((4.0 * fine_parts.var(0) + coarse_parts.var(0)) / len(fine_parts)).sqrt()
    names = ["evidence", "mean0", "mean1", "variance0", "variance1"]
    return {n: (float(error[i] / spread[i]), float(error[i]), float(coarse[i] - fine[i])) for i, n in enumerate(names)}
