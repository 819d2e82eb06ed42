"""Diagnostics of weighted populations: variance of estimates, tails of weights, mixing of chains."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def one_root(log_weight: Tensor, root: Tensor) -> Tensor:
    """Whether one of the starting particles has all of a problem's weight, or all but a thousandth: [B].

    What `evidence_variance` says then, 1, is the same however wrong the evidence is. Arguments as there.
    """
    weight = torch.softmax(log_weight, 1)
    share = torch.zeros_like(weight).scatter_add_(1, root, weight)
    return share.amax(1) > 0.999


def surviving_seeds(root: Tensor, log_weight: Tensor) -> Tensor:
    """How many distinct starting particles those of positive weight descend from: [B], float64.

    Args:
        root: index of each particle's ancestor at the start, [B, N].
        log_weight: [B, N].
    """
    counts = [len(own[weight > -torch.inf].unique()) for own, weight in zip(root, log_weight, strict=True)]
    return torch.tensor(counts, dtype=torch.float64)


def evidence_variance(log_weight: Tensor, root: Tensor, resamplings: Tensor) -> Tensor:
    """Estimate of Var(Z_hat) / Z^2, which is Var(log Z_hat) to first order, from the ancestors of one run.

    It holds for multinomial resampling, at fixed levels or by ESS, and where nothing was resampled. Two particles that
    multinomial resampling has drawn have independent ancestors, which is what pairs of particles of different roots
    are counted by. Other resamplers keep nearly every particle in its place: roots do not coalesce while the factor of
    R grows, and V falls below zero without bound. Which pairs they draw at all depends on the order of the particles
    (systematic resampling never draws some), so no count of pairs of one run replaces it; `variance_between` does, over
    several.

    Args:
        log_weight: final weights, [B, N].
        root: index of each particle's ancestor at the start, [B, N].
        resamplings: how often each problem was resampled, R, [B].

    Returns:
        [B]; NaN for one particle. Z_hat^2 V is unbiased for the variance of Z_hat, so a single V may be negative. It is
        1 once one root is left (`one_root`), whatever the variance; there is no fixed-lag remedy, since every
        generation adds to the variance of the evidence.

    Source: Lee & Whiteley 2018, V = 1 - (N / (N - 1))^(R + 1) (1 - sum_n S_n^2) with S_n the weight that descends from
    root n.
    """
    particles = log_weight.shape[1]
    if particles < 2:
        return torch.full_like(log_weight[:, 0], math.nan)
    weight = torch.softmax(log_weight, 1)
    descended = torch.zeros_like(weight).scatter_add_(1, root, weight)
    inflation = (particles / (particles - 1)) ** (resamplings.double() + 1.0)
    return 1.0 - inflation * (1.0 - descended.square().sum(1))


def variance_between(log_evidence: Tensor) -> Tensor:
    """Estimate of Var(Z_hat) / Z^2, which is Var(log Z_hat) to first order, from the spread of independent runs.

    It holds for any method whose Z_hat is unbiased: any resampler, moves, trees.

    Args:
        log_evidence: of B independent repetitions of one run, [B].

    Returns:
        The same number for each, [B], with a relative standard error of about sqrt(2 / (B - 1)); NaN for B = 1.
    """
    if len(log_evidence) < 2:
        return torch.full_like(log_evidence, math.nan)
    relative = (log_evidence - torch.logsumexp(log_evidence, 0) + math.log(len(log_evidence))).exp()
    return relative.var().expand_as(log_evidence)


def mean_variance(log_weight: Tensor, values: Tensor, ancestor: Tensor, resamplings: Tensor) -> Tensor:
    """Estimated variance of the weighted mean of values, from one run.

    Args:
        log_weight: final weights, [B, N].
        values: what is averaged, [B, N].
        ancestor: index of each particle's ancestor at the start, [B, N]; or fewer resamplings ago
            (`Trajectory.ancestor(lag)`) for the fixed-lag form, which forgets what the population has forgotten and
            lives on when one seed is left.
        resamplings: how many lie between, [B].

    Returns:
        [B], biased by O(1 / N).

    Source: Lee & Whiteley 2018 (the same V, of centred values); fixed lag: Olsson & Douc 2019.
    """
    particles = log_weight.shape[1]
    weight = torch.softmax(log_weight, 1)
    spread = weight * (values - (weight * values).sum(1, keepdim=True))
    inflation = (particles / max(1, particles - 1)) ** (resamplings.double() + 1.0)
    return inflation * torch.zeros_like(weight).scatter_add_(1, ancestor, spread).square().sum(1)


def pareto_k(log_weight: Tensor) -> Tensor:
    """Shape of the generalized Pareto distribution that fits the largest weights of each problem.

    Moments of the weights above order 1 / k do not exist, so beyond .5 the variance of an importance sampling estimate
    is infinite; up to min(1 - 1 / log10(N), .7) estimates can still be trusted at N samples. For independent particles
    (`importance_sampling`, or one pooled population), N of a hundred and more.

    Args:
        log_weight: [B, N].

    Returns:
        [B]; NaN below 21 particles, and where a quarter of the tail ties with what lies below it, as equal weights do.

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


def split_rhat(traces: Tensor) -> Tensor:
    """Split R-hat of traces [B, steps, C], [B]: root of total over within-chain variance, halves counted as chains.

    Near 1 where chains agree; above 1.01 (long chains) or 1.1 (short ones) they do not. NaN below 4 steps, and where
    nothing moves. Source: Gelman et al. 2013, Sec. 11.4; without the rank normalisation of Vehtari et al. 2021.
    """
    half = traces.shape[1] // 2
    if half < 2:
        return torch.full_like(traces[:, 0, 0], torch.nan)
    halves = torch.cat([traces[:, :half], traces[:, -half:]], 2)
    within = halves.var(1).mean(1)
    between = halves.mean(1).var(1)
    return ((half - 1) / half + between / within).sqrt()
