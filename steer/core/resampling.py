"""Resamplers: log-weights [B, N] and a key to ancestor indices [B, count], batched over problems, no host reads.

Every one is unbiased, E[number of copies of n] = count W_n, never picks a particle of weight zero, and returns
ancestors in rising order (except `killing` and `multinomial`). Systematic, stratified, SSP and killing leave a
population with equal weights unchanged or nearly so; multinomial does not, which at N = 4 loses a root each time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import ShapeError
from ..key import Key
from ..torch_modes import lasting

Resampler = Callable[[Tensor, Key, int], Tensor]
"""(log_weight [B, N], key, count) -> ancestors [B, count], int64."""


def systematic(log_weight: Tensor, key: Key, count: int) -> Tensor:
    """Systematic resampling: one uniform per problem, `count` equally spaced points on the cumulative weights.

    Args:
        log_weight: log-weights, not necessarily normalised, [B, N]; they are summed in float64.
        key: names the draws.
        count: M, how many ancestors to return per problem.

    Returns:
        Indices of ancestors, [B, M] int64, rising.

    Cost: no host read. By offspring counts: how many points lie below each cumulative weight is a floor, so no search
    is needed.
    Source: Carpenter et al. 1999.
    """
    cumulative = torch.softmax(log_weight, 1, dtype=torch.float64).cumsum(1)
    uniform = key.uniform((log_weight.shape[0], 1), device=log_weight.device)
    below = torch.addcmul(uniform, cumulative, count / cumulative[:, -1:]).to(torch.int64)
    return _slots(below, count)


def stratified(log_weight: Tensor, key: Key, count: int) -> Tensor:
    """Stratified resampling: one uniform in each stratum of width 1 / count.

    Args, Returns: as `systematic`.

    Source: Kitagawa 1996.
    """
    problems, device = log_weight.shape[0], log_weight.device
    strata = torch.arange(count, dtype=torch.float64, device=device)
    return _pick(log_weight, (strata + key.uniform((problems, count), device=device)) / count)


def multinomial(log_weight: Tensor, key: Key, count: int) -> Tensor:
    """Multinomial resampling: independent draws. The noisiest, and the reference that theory is written for.

    Args, Returns: as `systematic`; ancestors are in no order.

    Source: Gordon et al. 1993.
    """
    return _pick(log_weight, key.uniform((log_weight.shape[0], count), device=log_weight.device))


def residual(log_weight: Tensor, key: Key, count: int) -> Tensor:
    """Residual resampling: floor(count W) copies of each particle, the rest drawn from what is left over.

    Args, Returns: as `systematic`.

    Source: Liu & Chen 1998.
    """
    share = torch.softmax(log_weight, 1, dtype=torch.float64) * count
    # A whole number less a rounding error is whole: equal weights must leave everyone in place.
    share = torch.where((share - share.round()).abs() < 1e-9, share.round(), share)
    sure = share.floor()
    left_over = share - sure
    # All `count` draws are made and the surplus masked, so that the shape does not depend on the weights. Where
    # nothing is left over every draw is masked, and what it was drawn from does not matter.
    none_left = left_over.sum(1, keepdim=True) <= 0.0
    drawn = _pick(
        torch.where(none_left, log_weight, left_over.log()),
        key.uniform((log_weight.shape[0], count), device=log_weight.device),
    )
    position = torch.arange(count, device=log_weight.device)
    used = (position < count - sure.sum(1, keepdim=True)).to(sure.dtype)
    return _slots(sure.scatter_add(1, drawn, used).cumsum(1).to(torch.int64), count)


def ssp(log_weight: Tensor, key: Key, count: int) -> Tensor:
    """Srinivasan sampling process: floor or ceiling of count W copies, pairs of fractions rounded against each other.

    Lower variance than systematic, and consistent for any order of particles.

    Args, Returns: as `systematic`.

    Cost: a loop over particles, so meant for N up to about a thousand.
    Source: Gerber, Chopin & Whiteley 2019.
    """
    problems, particles = log_weight.shape
    share = torch.softmax(log_weight, 1, dtype=torch.float64) * count
    copies = share.floor()
    fraction = share - copies
    uniforms = key.uniform((problems, particles), device=log_weight.device)
    rows = torch.arange(problems, device=log_weight.device)
    left = torch.zeros(problems, dtype=torch.int64, device=log_weight.device)
    for right in range(1, particles):
        p, q = fraction[rows, left], fraction[:, right]
        # Move mass between the pair until one of them is whole, up or down so that the expectation is kept.
        up, down = torch.minimum(1.0 - p, q), torch.minimum(p, 1.0 - q)
        moved = up + down
        raise_left = uniforms[:, right] * moved < down
        p, q = torch.where(raise_left, p + up, p - down), torch.where(raise_left, q - up, q + down)
        idle = moved <= 0.0
        p, q = torch.where(idle, fraction[rows, left], p), torch.where(idle, fraction[:, right], q)
        left_is_whole = torch.where(raise_left, up == 1.0 - fraction[rows, left], down == fraction[rows, left]) | idle
        finished, kept = torch.where(left_is_whole, p, q), torch.where(left_is_whole, q, p)
        finished_at = torch.where(left_is_whole, left, right)
        copies[rows, finished_at] += finished.round()
        left = torch.where(left_is_whole, right, left)
        fraction[rows, left] = kept
    # The fractions sum to a whole number, so rounding of the last one settles what float64 left over.
    copies[rows, left] += (count - copies.sum(1)).clamp(0.0, 1.0)
    return _slots(copies.cumsum(1).to(torch.int64), count)


def killing(log_weight: Tensor, key: Key, count: int) -> Tensor:
    """Particle n survives in place with probability W_n / max W, else is replaced by a multinomial draw.

    Args, Returns: as `systematic`; `count` must be N. Survivors keep their slots, so ancestors are in no order.

    Raises:
        ShapeError: a count other than N.

    Source: Del Moral 2004.
    """
    problems, particles = log_weight.shape
    if count != particles:
        raise ShapeError(f"killing replaces particles one for one: count must be N = {particles}, got {count}")
    survival, points = key.uniform((problems, 2, particles), device=log_weight.device).unbind(1)
    survives = survival.log() < log_weight - log_weight.amax(1, keepdim=True)
    place = torch.arange(particles, device=log_weight.device).expand(problems, particles)
    return torch.where(survives, place, _pick(log_weight, points.contiguous()))


def _cumulative(log_weight: Tensor) -> Tensor:
    """Cumulative normalised weights whose last entry is exactly 1, also at the last particle of positive weight."""
    cumulative = torch.softmax(log_weight, 1, dtype=torch.float64).cumsum(1)
    return cumulative / cumulative[:, -1:]


def _pick(log_weight: Tensor, points: Tensor) -> Tensor:
    return torch.searchsorted(_cumulative(log_weight), points, right=True)


def _slots(below: Tensor, count: int) -> Tensor:
    """Ancestors [B, count] from the cumulative numbers of copies [B, N]: slot j belongs to the first n above it."""
    ends = below.new_zeros((below.shape[0], count + 1)).scatter_add_(1, below, _one(below.device).expand_as(below))
    return ends.cumsum(1)[:, :count]


@lru_cache(maxsize=16)
@lasting()
def _one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.int64, device=device)
