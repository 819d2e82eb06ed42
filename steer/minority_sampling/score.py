"""The minority score of samples, and the quantile labels that a classifier of it learns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ShapeError, SteerError
from ..key import Key, as_key
from ..processes.gaussian import need_levels
from ..types import NoiseLevels
from .signal_level import level_near

_CURE = "score by the process without own_solver; of tokens, take the log-probability"
Distance = Callable[[Tensor, Tensor], Tensor]
"""[M, *event], [M, *event] -> [M]: how different two clean states are; differentiable in both for guidance."""


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| of every pair, [M]. Its gradient at a = b is zero, and finite."""
    squares = (a - b).flatten(1).square().sum(1)
    return torch.where(squares > 0.0, squares, 1.0).sqrt() * (squares > 0.0)


def minority_score(
    process: NoiseLevels,
    x: Tensor,
    *,
    signal: float = 0.5,
    draws: int = 5,
    distance: Distance = euclidean,
    key: Key | int = 0,
    seed: int | None = None,
) -> Tensor:
    """How badly the model restores clean states from noise, [B, N] for x of shape [B, N, *event]: high for rare ones.

        ms(x_0) = E d(x_0, E[x_0 | x_s]),   x_s = alpha_s x_0 + sigma_s eps.

    Args:
        process: whose states are alpha x_0 + sigma eps.
        x: clean states [B, N, *event].
        signal: share of signal alpha^2 / (alpha^2 + sigma^2) at s, to the nearest level of the grid. It matters: on the
            digits the rank correlation with the distance to 5 neighbours is .36 at .9, .61 at .7, .64 at .5, .51 at .3,
            .19 at .1 and .04 at .04.
        draws: of eps per state. Samples of one key share no noise, and calls of one key repeat theirs.
        distance: between [M, *event] tensors; Euclidean here, LPIPS in the paper.
        key: names the draws.
        seed: the same as `key`; give one of them.

    Returns:
        Scores [B, N], float64.

    Cost: `draws` network rows per state; nothing is differentiated.

    Raises:
        ShapeError: where x is not made of states of the process.
        StateSpaceError: for tokens, and under a pipeline's own solver.

    Source: Um et al. 2023 (Minority Guidance, 2301.12334), the minority score.
    Differs: the level is a share of signal, not an index; the paper's, .6 T of a linear schedule, is a share of about
    .03.
    """
    process = need_levels(process, "the minority score", cure=_CURE)
    if draws < 1:
        raise SteerError(f"draws must be at least 1, got {draws}")
    if tuple(x.shape[2:]) != tuple(process.event) or x.ndim < 3:
        raise ShapeError(f"x must be clean states (B, N, *event), event {tuple(process.event)}, got {tuple(x.shape)}")
    level, key, flat = level_near(process, signal), as_key(key, seed).fold("minority"), x.flatten(0, 1)
    total = torch.zeros(len(flat), dtype=torch.float64, device=x.device)
    with torch.no_grad():
        for i in range(draws):
            noisy = process.noise(x, process.steps, level, key.fold(i))
            restored = process.complete(noisy, process.denoise(noisy, level, key.fold(i)))
            total = total + distance(flat, restored.flatten(0, 1)).double()
    return (total / draws).view(x.shape[:2])


def quantile_labels(score: Tensor, bins: int, groups: Tensor | None = None) -> Tensor:
    """The quantile of every score [M], 0 the lowest of `bins` bins of equal count: integer labels [M].

    Ranks decide, so ties are broken by place and bins differ in count by at most one.

    Args:
        score: [M], of any unit.
        bins: number of bins, at most as many as there are scores in a class.
        groups: classes [M], within each of which quantiles are taken: rare among its like, not of a rare class. None:
            one class.

    Returns:
        Labels [M] int64, in [0, bins).

    Raises:
        ShapeError: score or groups that are not [M].
        SteerError: a class with fewer scores than bins.
    """
    if groups is None:
        groups = torch.zeros_like(score, dtype=torch.long)
    if score.ndim != 1 or groups.shape != score.shape:
        raise ShapeError(f"scores and groups must be (M,), got {tuple(score.shape)} and {tuple(groups.shape)}")
    labels = torch.empty_like(score, dtype=torch.long)
    for group in groups.unique():
        own = (groups == group).nonzero()[:, 0]
        if len(own) < bins:
            raise SteerError(f"class {int(group)} has {len(own)} scores, too few for {bins} bins; take fewer bins")
        rank = score[own].argsort(stable=True).argsort()
        labels[own] = rank * bins // len(own)
    return labels
