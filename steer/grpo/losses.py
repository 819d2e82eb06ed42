"""The clipped policy loss and the divergence from a reference, as pure functions. Trainers own the rest."""

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
    """Mean of -w min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) with ratio = exp(new - old): a scalar.

    new, old:  log-probs of the same reduction; with "mean" the ratio is the D-th root of the true one and clips are
               small (Flow-GRPO: 1e-4). old is `batch.logp(reduction)`.
    weight:    `batch.weights()` or `batch.step_weights()`, never both. mask: steps to count.
    All of one shape, or broadcastable to it. Source: Schulman et al. 2017 (PPO), Eq. 7.
    """
    ratio = (new - old.detach().to(new.dtype)).exp()
    value = -torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)
    value = value if weight is None else value * weight
    if mask is None:
        return _finite(value.mean())
    mask = mask.expand_as(value)
    return _finite(torch.where(mask, value, 0.0).sum() / mask.sum())


def kl(mean: Tensor, reference: Tensor, std: Tensor | float, *, reduction: str = "mean") -> Tensor:
    """KL of two steps of equal std, |mean - reference|^2 / (2 std^2), over the event: (P, M, *event) -> (P, M).

    std: of the step, sqrt(dt) included: a float or (P, M). reduction: "mean" over coordinates, as Flow-GRPO, or "sum".
    """
    squared = (mean - reference).flatten(2).square()
    squared = squared.mean(2) if reduction == "mean" else squared.sum(2)
    return squared / (2.0 * std**2)


def clip_fraction(new: Tensor, old: Tensor, *, clip: float = 1e-4) -> float:
    """Share of ratios outside [1 - clip, 1 + clip]; 0 at the first update of correct densities.

    Of all entries given: where rows are padded, give those of the mask, new[batch.mask] and old[batch.mask].
    """
    return float(((new - old).exp() - 1.0).abs().gt(clip).double().mean())


def _finite(loss: Tensor) -> Tensor:
    if bool(loss.isnan()):
        raise NotStochasticError(
            "the loss is NaN: a greedy selection's rows have no log-probs to take a ratio of, or the policy's "
            "predictions are not finite; use rows of grpo.collect with method=None or a sampler of a law"
        )
    return loss
