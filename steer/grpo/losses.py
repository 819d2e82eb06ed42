"""The clipped policy loss and the divergence from a reference, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NotStochasticError


def clipped_loss(
    new: Tensor,
    old: Tensor,
    advantage: Tensor,
    *,
    clip: float = 1e-4,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean of -w min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) with ratio = exp(new - old).

    All tensors have one shape, or broadcast to it: [P, M] for one level of `by_level`, or [B, S].

    Args:
        new: log-probs under the policy being trained, with gradients.
        old: log-probs under the policy that collected, `batch.logp(reduction)`, of the same reduction. With "mean" the
            ratio is the D-th root of the true one, and clips are small (Flow-GRPO: 1e-4).
        advantage: of rows or steps.
        clip: largest distance of the ratio from 1.
        weight: `batch.weights()` or `batch.step_weights()`, never both; None for on-policy rows.
        mask: bool, True for steps that count; None: all.

    Returns:
        The loss, a scalar.

    Raises:
        NotStochasticError: the loss is NaN.

    Source: Schulman et al. 2017 (PPO), Eq. 7.
    """
    ratio = (new - old.detach().to(new.dtype)).exp()
    value = -torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)
    value = value if weight is None else value * weight
    if mask is None:
        return _not_nan(value.mean())
    mask = mask.expand_as(value)
    return _not_nan(torch.where(mask, value, 0.0).sum() / mask.sum())


def kl(mean: Tensor, reference: Tensor, std: Tensor | float, *, reduction: str = "mean") -> Tensor:
    """Kullback-Leibler divergence of two Gaussian steps of equal std, |mean - reference|^2 / (2 std^2).

    Args:
        mean: of the policy's step, [P, M, *event].
        reference: mean of the reference model's step, [P, M, *event].
        std: of both, sqrt(dt) included: a float or [P, M].
        reduction: over coordinates: their "mean", as Flow-GRPO, or "sum", the divergence itself.

    Returns:
        [P, M], in nats.
    """
    squared = (mean - reference).flatten(2).square()
    squared = squared.mean(2) if reduction == "mean" else squared.sum(2)
    return squared / (2.0 * std**2)


def clip_fraction(new: Tensor, old: Tensor, *, clip: float = 1e-4) -> float:
    """Fraction of ratios exp(new - old) outside [1 - clip, 1 + clip]; 0 at the first update if densities are right.

    Args:
        new: log-probs under the policy being trained, any shape. Where rows are padded, pass new[batch.mask].
        old: log-probs under the policy that collected, of the same shape and reduction.
        clip: as in `clipped_loss`.
    """
    return float(((new - old).exp() - 1.0).abs().gt(clip).double().mean())


def _not_nan(loss: Tensor) -> Tensor:
    """The loss; NotStochasticError where it is NaN."""
    if bool(loss.isnan()):
        raise NotStochasticError(
            "the loss is NaN: these rows have no log-probs to take a ratio of (a greedy search's), or the policy's "
            "predictions are not finite; use rows of grpo.collect with method=None or a weighted sampler such as "
            "steer.smc, and check the network's output"
        )
    return loss
