"""The exact distribution of a discretised chain, where it is Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ModelError
from ..processes.second_order import Remembering, SecondOrderProcess
from ..types import GaussianPath
from .mixture import GaussianMixture, MixtureTransition


def chain_law(process: GaussianPath) -> GaussianMixture:
    """Distribution of the chain's final state, for a process whose steps are affine in the state plus Gaussian noise.

    Steps are affine when the data is one Gaussian, under every transition rule and interpolant conversion. This is what
    the chain samples at its finite number of steps, whereas `process.exact` gives the limit of small steps.

    Args:
        process: The process, with event (D,).

    Returns:
        A mixture of one mode: mean [1, D] and covariance [1, D, D].

    Raises:
        ModelError: Where a step is not affine.

    Cost: one prediction of D + 2 rows per step, 2 D + 2 where steps remember: each step is evaluated at zero, at unit
    vectors, and at three times their sum, which checks that it is affine.
    """
    size = process.event[0]
    wide = size * (2 if isinstance(process, SecondOrderProcess) else 1)  # of a state with what it remembers
    probe = torch.cat([torch.zeros(1, wide), torch.eye(wide), 3.0 * torch.ones(1, wide)]).double()[None]
    mean = torch.zeros(wide, dtype=torch.float64)
    cov = torch.zeros(wide, wide, dtype=torch.float64)
    cov[:size, :size] = process.levels[0].sigma ** 2 * torch.eye(size, dtype=torch.float64)
    for k in range(process.steps):
        x = probe if wide == size else probe.unflatten(2, (2, size))
        step = process.transition(x, process.denoise(x, k), k)
        image = torch.cat([step.mean, step.memory.nan_to_num()], 2) if isinstance(step, Remembering) else step.mean
        offset, matrix = _affine_parts(image[0])
        mean = matrix @ mean + offset
        root = step.factors[0] if isinstance(step, MixtureTransition) else step.std * torch.eye(size).double()
        cov = matrix @ cov @ matrix.T
        cov[:size, :size] += root @ root.T
    return GaussianMixture(mean[None], cov[None])


def _affine_parts(image: Tensor) -> tuple[Tensor, Tensor]:
    """Offset and matrix of an affine map from its values at 0, the unit vectors and three times their sum."""
    offset, columns, total = image[0], image[1:-1] - image[0], image[-1]
    if not torch.allclose(offset + 3.0 * columns.sum(0), total, rtol=1e-6, atol=1e-8):
        raise ModelError(
            "chain_law needs steps that are affine in the state: the data must be a single Gaussian; "
            "for others, compare with the limit of small steps, process.exact(reward)"
        )
    return offset, columns.T
