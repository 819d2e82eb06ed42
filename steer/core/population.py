"""Whatever reduces over particles, axis 1: log-weights, ESS, means, ancestors.

Log-weights are float64, and the maximum is always subtracted before exp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import SteerError
from ..torch_modes import lasting

SLACK = 1e-9
"""Relative rounding that an ESS of equal weights may fall short of N by."""


def log_sum_exp(log_weight: Tensor) -> Tensor:
    """Log of the sum of weights over particles, [B, N] -> [B]; -inf where every weight is zero."""
    return torch.logsumexp(log_weight, 1)


def log_mean_exp(log_weight: Tensor) -> Tensor:
    """Log of the mean weight over particles, [B, N] -> [B]; -inf where every weight is zero."""
    return torch.logsumexp(log_weight, 1) - math.log(log_weight.shape[1])


def normalise(log_weight: Tensor) -> Tensor:
    """Log-weights that sum to one within each problem, [B, N] -> [B, N]."""
    shifted = log_weight - log_weight.amax(1, keepdim=True)  # first: next to 1e8, their sum would be off by 1e-8
    return shifted - torch.logsumexp(shifted, 1, keepdim=True)


def weights_of_top_k(score: Tensor, keep: int) -> Tensor:
    """Log-weights that the `keep` highest scores of each problem share equally.

    Args:
        score: [B, N]; of equal scores the first counts as higher.
        keep: how many share. Fewer do where fewer are not forbidden (-inf); where all are, that is overlooked.

    Returns:
        [B, N], -inf for the others.
    """
    best = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :keep]
    shared = torch.full_like(score, -torch.inf).scatter_(1, best, 0.0)
    forbidden = score == -torch.inf
    return normalise(shared.masked_fill(forbidden & ~forbidden.all(1, keepdim=True), -torch.inf))


def ess(log_weight: Tensor) -> Tensor:
    """Effective sample size 1 / sum W^2 of accumulated weights, in [1, N].

    Args:
        log_weight: [B, N].

    Returns:
        [B]; NaN where all weights are zero.
    """
    return torch.softmax(log_weight, 1).square().sum(1).reciprocal()


def temper(log_weight: Tensor, log_likelihood: Tensor, lowest: Tensor, *, share: float = 0.5) -> Tensor:
    """The largest exponent lambda in [lowest, 1] that keeps ESS(log_weight + (lambda - lowest) log_likelihood).

    Args:
        log_weight: [B, N].
        log_likelihood: what the exponent multiplies, [B, N].
        lowest: exponent to begin from, [B].
        share: "keeps" means at or above share * N; the lowest exponent is returned where even that is below.

    Returns:
        Exponents, [B].

    Raises:
        SteerError: share outside (0, 1].

    Cost: forty bisections for all problems at once, with no host read.
    Source: Jasra et al. 2011.
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
    """Self-normalised mean over particles.

    Args:
        log_weight: [B, N].
        values: [B, N, ...]; those of particles of weight zero may be anything.

    Returns:
        [B, ...].
    """
    weight = torch.softmax(log_weight, 1).reshape(*log_weight.shape, *(1 for _ in values.shape[2:]))
    return torch.where(weight > 0, weight * values, 0.0).sum(1)


def log_potential(scores: Tensor, temperature: float) -> Tensor:
    """Scores over temperature: the log of what a sample's weight is multiplied by.

    Args:
        scores: rewards, [B, N]; -inf forbids a sample.
        temperature: > 0; infinite gives 0 for every sample that is not forbidden.

    Returns:
        [B, N].
    """
    if temperature == float("inf"):
        return torch.where(scores == -torch.inf, scores, 0.0 * scores)
    return scores / temperature


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """Particles index [B, M] of a tensor [B, N, ...]: [B, M, ...]."""
    return Gather(index, tensor.shape[1])(tensor)


def broadcast_like(values: Tensor, like: Tensor) -> Tensor:
    """Values [B, N], or [B, 1], with an axis for every axis of states [B, N, *event]."""
    return values.reshape(*values.shape, *(1 for _ in like.shape[values.ndim :]))


def per_particle(values: Tensor, like: Tensor) -> Tensor:
    """Values [B, N] shaped and typed to multiply states [B, N, *event]."""
    return broadcast_like(values.to(like.dtype), like)


class Gather:
    """Takes particles index [B, M] out of any number of tensors [B, N, ...]."""

    def __init__(self, index: Tensor, particles: int) -> None:
        self.shape, rows = index.shape, index
        if len(index) > 1:  # on the merged axis (B * N)
            rows = index + positions(len(index), particles, index.device)[:, None]
        self.rows = rows.reshape(-1)

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1).index_select(0, self.rows).view(*self.shape, *tensor.shape[2:])


@lru_cache(maxsize=64)
@lasting()
def positions(count: int, step: int, device: torch.device) -> Tensor:
    """0, step, 2 step, ... of that count."""
    return torch.arange(0, count * step, step, device=device)


def ancestors(parents: Sequence[Tensor], like: Tensor) -> Tensor:
    """Index [B, N] of the ancestor before a number of rearrangements, oldest first, of particles like [B, N]."""
    index = torch.arange(like.shape[1], device=like.device).expand(like.shape)
    for parent in reversed(parents):
        index = parent.gather(1, index)
    return index


def count_distinct(index: Tensor) -> Tensor:
    """How many different entries each problem has: [B, N] -> [B]."""
    ordered = index.sort(1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
