"""The clipped policy loss and the divergence from a reference, as pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from ..errors import NonFiniteError, NotStochasticError, SteerError


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
        mask: bool, True for steps that count; None: all. What it leaves out may be NaN.

    Returns:
        The loss, a scalar.

    Raises:
        SteerError: the mask leaves no step.
        NotStochasticError: `old` is NaN, as in rows that were selected greedily.
        NonFiniteError: the loss is not finite for another reason, which the message names.

    Source: Schulman et al. 2017 (PPO), Eq. 7.
    """
    if mask is not None:
        if not bool(mask.any()):
            raise SteerError("the loss is a mean over steps, and the mask is False for all; leave this batch out")
        # Before anything is computed: 0 times the derivative of what is NaN or overflows would be NaN again.
        new, old, advantage = (torch.where(mask, each, 0.0) for each in (new, old, advantage))
        weight = None if weight is None else torch.where(mask, weight, 0.0)
    log_ratio = new - old.detach().to(new.dtype)
    idle = advantage == 0.0 if weight is None else (advantage == 0.0) | (weight == 0.0)
    ratio = torch.where(idle & ~log_ratio.isnan(), 0.0, log_ratio).exp()  # 0 times a ratio that overflows is 0
    value = -torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)
    value = value if weight is None else value * weight
    loss = value.mean() if mask is None else value.sum() / mask.expand_as(value).sum()
    if not bool(loss.isfinite()):
        _explain(new, old, {"advantages": advantage} | ({} if weight is None else {"weights": weight}))
    return loss


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


def _explain(new: Tensor, old: Tensor, factors: Mapping[str, Tensor]) -> NoReturn:
    """Raises for a loss that is not finite, by what made it so."""
    if bool(old.isnan().any()):
        raise NotStochasticError(
            "the loss is NaN: these rows have no log-probs to take a ratio of (a greedy search's); use rows of "
            "grpo.collect with method=None or a weighted sampler such as steer.smc"
        )
    for name, tensor in {"log-probs under the policy being trained": new, **factors}.items():
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(
                f"the loss needs finite {name}, got {int((~tensor.isfinite()).sum())} of {tensor.numel()} that are "
                "not; check the network's output and the rewards, and pass mask=... for steps that do not count"
            )
    raise NonFiniteError(
        f"an importance ratio overflows: log-probs rise by up to {(new - old).max().item():.4g} nats from those that "
        'were stored; check that both have the same reduction ("mean" for many coordinates), or update the policy less '
        "between rollouts"
    )
