"""What the checks share: z statistics against closed forms, and the error they raise."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..models.mixture import Exact, GaussianMixture
from ..results.result import Result

LIMIT = 4.0
"""A statistic with |z| above this fails: 6e-5 two-sided for one normal."""


class CheckFailed(AssertionError):
    """A part does not keep its contract. The message says which, what was expected and what came."""


def z_scores(result: Result, target: Exact, mixture: GaussianMixture | None = None) -> dict[str, float]:
    """z of the normalizing constant, means and second moments over the problems of a result.

    Every one is exactly unbiased at any number of particles: for a weighted population with evidence estimate Z_hat and
    weighted mean f_hat, E[Z_hat (f_hat - E f)] = 0 and E[Z_hat] = Z. Problems are independent, so the mean over its
    standard error is a standard normal up to the central limit.

    Args:
        result: of B problems of one target, [B, N, D].
        target: the closed form, `process.exact(reward)`.
        mixture: also compares the masses of the tilted modes.

    Returns:
        Name of the statistic -> z.
    """
    relative = (result.log_evidence - target.log_evidence).exp()
    centred = result.mean(lambda x: x.double().flatten(1) - target.mean)
    square = result.mean(lambda x: (x.double().flatten(1) - target.mean).square() - target.cov.diagonal())
    columns = {"evidence": relative - 1.0}
    columns |= {f"mean{i}": relative * centred[:, i] for i in range(centred.shape[1])}
    columns |= {f"variance{i}": relative * square[:, i] for i in range(square.shape[1])}
    if mixture is not None:
        tilted = GaussianMixture(target.means, target.covs, target.weights)
        masses = result.mean(lambda x: tilted.responsibilities(x.double().flatten(1)) - target.weights)
        columns |= {f"mass{i}": relative * masses[:, i] for i in range(masses.shape[1])}
    return {name: z(column) for name, column in columns.items()}


def z(values: Tensor) -> float:
    """Mean over its standard error. A column without spread passes only at exactly zero."""
    error = values.std() / math.sqrt(len(values))
    if error == 0.0:
        return 0.0 if bool((values.abs() < 1e-12).all()) else math.inf
    return float(values.mean() / error)


def worst(scores: dict[str, float]) -> tuple[float, str]:
    """The largest |z| and its name; NaN counts as infinite."""
    return max((math.inf if math.isnan(value) else abs(value), name) for name, value in scores.items())


def described(*tensors: Any) -> str:
    return ", ".join(f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__ for t in tensors)
