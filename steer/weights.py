"""Arithmetic of log-weights: float64, axis 1 is particles, the maximum is always subtracted before exp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import SteerError

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


def evidence_variance(log_weight: Tensor, root: Tensor, resamplings: Tensor) -> Tensor:
    """Estimate of Var(Z_hat) / Z^2, which is Var(log Z_hat) to first order, from one run: (B,).

    log_weight: final weights (B, N). root: index of each particle's ancestor at the start, (B, N). resamplings: how
    often each problem was resampled, (B,).
    Source: Lee & Whiteley 2018, V = 1 - (N / (N - 1))^(R + 1) (1 - sum_n S_n^2) with S_n the weight that
    descends from root n. Unbiased for multinomial resampling; an overestimate for the others. It degenerates to 1 once
    one root is left; there is no fixed-lag remedy, since every generation adds to the variance of the evidence.
    """
    particles = log_weight.shape[1]
    if particles < 2:
        return torch.full_like(log_weight[:, 0], math.nan)
    weight = torch.softmax(log_weight, 1)
    descended = torch.zeros_like(weight).scatter_add_(1, root, weight)
    inflation = (particles / (particles - 1)) ** (resamplings.double() + 1.0)
    return 1.0 - inflation * (1.0 - descended.square().sum(1))


def mean_variance(log_weight: Tensor, values: Tensor, ancestor: Tensor, resamplings: Tensor) -> Tensor:
    """Estimated variance of the weighted mean of values (B, N), from one run: (B,).

    ancestor: index (B, N) of each particle's ancestor at the start, or fewer resamplings ago
    (`Trajectory.ancestor(lag)`) for the fixed-lag form, which forgets what the population has forgotten and lives on
    when one root is left. resamplings: how many lie between, (B,).
    Source: Lee & Whiteley 2018 (the same V, of centred values); fixed lag: Olsson & Douc 2019. Biased by O(1 / N).
    """
    particles = log_weight.shape[1]
    weight = torch.softmax(log_weight, 1)
    spread = weight * (values - (weight * values).sum(1, keepdim=True))
    inflation = (particles / max(1, particles - 1)) ** (resamplings.double() + 1.0)
    return inflation * torch.zeros_like(weight).scatter_add_(1, ancestor, spread).square().sum(1)


def pareto_k(log_weight: Tensor) -> Tensor:
    """Shape of the generalized Pareto law that fits the largest weights of each problem: (B, N) -> (B,).

    Moments of the weights above order 1 / k do not exist, so beyond .5 the variance of an importance sampling estimate
    is infinite; up to min(1 - 1 / log10(N), .7) estimates can still be trusted at N samples. For independent particles
    (`importance_sampling`, or one pooled population), N of a hundred and more. NaN below 21 particles, and where a
    quarter of the tail ties with what lies below it, as equal weights do.
    Source: Vehtari, Simpson, Gelman, Yao & Gabry 2024 (PSIS): tail of min(N / 5, 3 sqrt(N)) weights, Sec. 3; fit of
    Zhang & Stephens 2009; weak prior of ten samples at k = .5, Appendix C.
    """
    count = log_weight.shape[1]
    tail = math.ceil(min(0.2 * count, 3.0 * math.sqrt(count)))
    if tail < 5:
        return torch.full_like(log_weight[:, 0], math.nan)
    ordered = (log_weight - log_weight.amax(1, keepdim=True)).sort(1).values[:, -tail - 1 :].exp()
    excess = ordered[:, 1:] - ordered[:, :1]
    # Posterior mean of theta = -k / scale on a grid of quantiles of its prior, by profile likelihood.
    points = 30 + math.isqrt(tail)
    quartile = excess[:, int(tail / 4 + 0.5) - 1, None]
    grid = torch.arange(1, points + 1, dtype=excess.dtype, device=excess.device)
    theta = 1.0 / excess[:, -1:] + (1.0 - (points / (grid - 0.5)).sqrt()) / (3.0 * quartile)
    shape = torch.log1p(-theta[..., None] * excess[:, None]).mean(2)
    likelihood = tail * ((-theta / shape).log() - shape - 1.0)
    centre = (torch.softmax(likelihood, 1) * theta).sum(1, keepdim=True)
    fitted = torch.log1p(-centre * excess).mean(1)
    return torch.where(quartile[:, 0] > 0.0, (fitted * tail + 5.0) / (tail + 10.0), math.nan)


def weighted_mean(log_weight: Tensor, values: Tensor) -> Tensor:
    """Self-normalised mean over particles of values (B, N, ...): (B, ...). Particles of weight zero may be anything."""
    weight = torch.softmax(log_weight, 1).reshape(*log_weight.shape, *(1 for _ in values.shape[2:]))
    return torch.where(weight > 0, weight * values, 0.0).sum(1)
