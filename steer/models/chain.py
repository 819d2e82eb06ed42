"""The exact law of a discretised chain, where that law is Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ModelError
from ..processes.gaussian import GaussianProcess
from .mixture import GaussianMixture, MixtureTransition


def chain_law(process: GaussianProcess) -> GaussianMixture:
    """The law of the chain's final state, for a process whose every step is affine in the state plus Gaussian noise.

    So it is when the data is one Gaussian, under every transition rule and interpolant conversion: this is what the
    chain samples at its finite number of steps, where `process.exact` gives the limit of small steps. Each step's
    matrix is read off by evaluating it at zero and at the unit vectors, (D + 1) predictions a step.
    Raises ModelError where a step is not affine.
    """
    size = process.event[0]
    probe = torch.cat([torch.zeros(1, size), torch.eye(size), 3.0 * torch.ones(1, size)]).double()[None]
    mean = torch.zeros(size, dtype=torch.float64)
    cov = process.levels[0].sigma ** 2 * torch.eye(size, dtype=torch.float64)
    for k in range(process.steps):
        step = process.transition(probe, process.denoise(probe, k), k)
        offset, matrix = _affine_parts(step.mean[0])
        mean = matrix @ mean + offset
        root = step.factors[0] if isinstance(step, MixtureTransition) else step.std * torch.eye(size).double()
        cov = matrix @ cov @ matrix.T + root @ root.T
    return GaussianMixture(mean[None], cov[None])


def _affine_parts(image: Tensor) -> tuple[Tensor, Tensor]:
    """Offset and matrix of an affine map from its values at 0, the unit vectors and three times their sum."""
    offset, columns, total = image[0], image[1:-1] - image[0], image[-1]
    if not torch.allclose(offset + 3.0 * columns.sum(0), total, rtol=1e-6, atol=1e-8):
        raise ModelError("chain_law needs steps that are affine in the state: the data must be a single Gaussian")
    return offset, columns.T
