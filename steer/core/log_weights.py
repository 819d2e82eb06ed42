"""Arithmetic of log-weights: float64, axis 1 is particles, the maximum is always subtracted before exp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import SteerError

SLACK = 1e-9
"""Relative rounding that an ESS of equal weights may fall short of N by."""


def log_mean_exp(log_weight: Tensor) -> Tensor:
    """log of the mean weight over particles: (B, N) -> (B,). -inf where every weight is zero."""
    return torch.logsumexp(log_weight, 1) - math.log(log_weight.shape[1])


def normalise(log_weight: Tensor) -> Tensor:
    """Log-weights that sum to one within each problem, (B, N)."""
    shifted = log_weight - log_weight.amax(1, keepdim=True)  # first: next to 1e8, their sum would be off by 1e-8
    return shifted - torch.logsumexp(shifted, 1, keepdim=True)


def of_best(score: Tensor, keep: int) -> Tensor:
    """Log-weights (B, N) that the `keep` highest scores of each problem share equally (the first of equals).

    Fewer share where fewer are not forbidden (-inf); where all are, that is overlooked.
    """
    best = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :keep]
    shared = torch.full_like(score, -torch.inf).scatter_(1, best, 0.0)
    forbidden = score == -torch.inf
    return normalise(shared.masked_fill(forbidden & ~forbidden.all(1, keepdim=True), -torch.inf))


def ess(log_weight: Tensor) -> Tensor:
    """Effective sample size 1 / sum W^2 of accumulated weights, in [1, N]: (B, N) -> (B,). NaN where all are zero."""
    return torch.softmax(log_weight, 1).square().sum(1).reciprocal()


def temper(log_weight: Tensor, log_likelihood: Tensor, lowest: Tensor, *, share: float = 0.5) -> Tensor:
    """The largest exponent lambda in [lowest, 1] that keeps ESS(log_weight + (lambda - lowest) log_likelihood).

    "Keeps" means at or above share * N; the lowest exponent where even that is below. Forty bisections for all
    problems at once, with no host read: (B, N), (B, N), (B,) -> (B,). Source: Jasra et al. 2011.
    """
    if not 0.0 < share <= 1.0:
        raise SteerError(f"share of N that the ESS must keep is in (0, 1], got {share}")
    goal = share * log_weight.shape[1] * (1.0 - SLACK)
    low, high = lowest, torch.ones_like(lowest)
    full = ess(log_weight + (high - lowest)[:, None] * log_likelihood) >= goal
    for _ in range(40):
        middle = 0.5 * (low + high)
        enough = ess(log_weight + (middle - lowest)[:, None] * log_likelihood) >= goal
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(full, torch.ones_like(low), low)


def weighted_mean(log_weight: Tensor, values: Tensor) -> Tensor:
    """Self-normalised mean over particles of values (B, N, ...): (B, ...). Particles of weight zero may be anything."""
    weight = torch.softmax(log_weight, 1).reshape(*log_weight.shape, *(1 for _ in values.shape[2:]))
    return torch.where(weight > 0, weight * values, 0.0).sum(1)


def log_potential(scores: Tensor, temperature: float) -> Tensor:
    """scores / temperature; 0 for every sample that is not forbidden where the temperature is infinite."""
    if temperature == float("inf"):
        return torch.where(scores == -torch.inf, scores, 0.0 * scores)
    return scores / temperature
