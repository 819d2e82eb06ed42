"""Advantages: how much better a row did than the mean of its group. Pure functions of rewards and weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import NonFiniteError, SteerError
from .batch import RolloutBatch

Spread = Literal["group", "global"]


@dataclass(frozen=True, eq=False)
class Advantages:
    """Advantages with the statistics they came from.

    value: [B] of rows, or [B, S] of steps, float32, in standard deviations.
    mean:  name -> [groups] float32, mean reward of each group, in units of the reward.
    std:   name -> [groups] float32, standard deviation of each group's rewards.
    flat:  [groups] bool, True where all rewards of a group were equal: its rows have advantage 0 and no gradient, and
           trainers drop such groups or collect more. Rewards of weight 0 are left out of this.
    """

    value: Tensor
    mean: Mapping[str, Tensor]
    std: Mapping[str, Tensor]
    flat: Tensor


def advantages(
    batch: RolloutBatch,
    *,
    weights: Mapping[str, float] | None = None,
    std: Spread = "group",
    eps: float = 1e-4,
    limit: float = 5.0,
) -> Advantages:
    """(reward - mean) / (std + eps) within groups, summed over rewards by their weights, clipped to +-limit.

    Args:
        batch: rows with rewards.
        weights: name -> weight of each reward, which are normalised one by one; all equal to 1 if None. One of weight 0
            is reported, and trained on in no way.
        std: of each "group", or "global", over all rows (Flow-GRPO's default).
        eps: added to the standard deviation, in units of the reward.
        limit: largest absolute value of an advantage.

    Returns:
        `Advantages`, value [B]. Means and standard deviations are self-normalised by the weights back to the policy;
        on-policy rows all weigh the same, and a row without weight has advantage 0. Statistics that a batch brings
        along (`reward_mean`, `reward_std`, from `grpo.keep`) are used as they are.

    Raises:
        SteerError: weights for a reward that the batch does not have, not finite, or all 0.
        NotStochasticError: no weight corrects the rows.
        NonFiniteError: a reward of a row with weight is not finite.

    Source: Shao et al. 2024 (GRPO); Liu et al. 2025 (Flow-GRPO).
    """
    asked = _reward_weights(batch, weights)
    total, means, stds = torch.zeros(batch.rows, dtype=torch.float64, device=batch.x0.device), {}, {}
    row_weight = batch.weights().double()
    flat = torch.ones(batch.groups, dtype=torch.bool, device=batch.x0.device)
    for name, factor in asked.items():
        reward = finite_rewards(batch, name, row_weight)
        mean, spread = group_moments(reward, batch.group_id, row_weight)
        if name in batch.reward_mean:
            mean, spread = batch.reward_mean[name].double(), batch.reward_std[name].double()
        divisor = _global_std(reward, row_weight).expand_as(spread) if std == "global" else spread
        total += factor * (reward - mean[batch.group_id]) / (divisor + eps)[batch.group_id]
        means[name], stds[name] = mean.float(), spread.float()
        if factor:
            flat &= spread <= 1e-8 * (1.0 + mean.abs())
    total = torch.where(flat[batch.group_id] | (row_weight == 0.0), 0.0, total)
    return Advantages(total.clamp(-limit, limit).float(), means, stds, flat)


def depth_advantages(
    batch: RolloutBatch, *, weights: Mapping[str, float] | None = None, eps: float = 1e-4, limit: float = 5.0
) -> Advantages:
    """Advantages of each step of a branching rollout: mean reward of its leaves, compared with steps of equal depth.

    A step that several rows share has one value, the mean over them; steps of a group at one level are compared with
    each other. Steps before the first branching have advantage 0.

    Args:
        batch: rows with shared prefixes (`step_id`), from `branch` or from trees.
        weights: name -> weight of each reward, which are normalised one by one; all equal to 1 if None.
        eps: added to the standard deviation, in units of the reward.
        limit: largest absolute value of an advantage.

    Returns:
        `Advantages`, value [B, S], 0 at padding; mean, std and flat as those of `advantages`.

    Raises:
        SteerError: plain rows, which share no steps; or weights for a reward that the batch does not have.
        NotStochasticError, NonFiniteError: as `advantages`.

    Source: Li et al. 2025 (BranchGRPO), depth-wise advantages.
    """
    asked = _reward_weights(batch, weights)
    if batch.step_id is None:
        raise SteerError("depth-wise advantages need shared prefixes (step_id), got plain rows; use grpo.advantages")
    row_weight = batch.weights().double()
    total = torch.zeros(batch.mask.shape, dtype=torch.float64, device=batch.x0.device)
    for name, factor in asked.items():
        reward = finite_rewards(batch, name, row_weight)
        for k in torch.unique(batch.step_idx[batch.mask]).tolist():
            row, slot = (batch.mask & (batch.step_idx == k)).nonzero(as_tuple=True)
            edge = torch.unique(batch.step_id[row, slot], return_inverse=True)[1]
            value, _ = group_moments(reward[row], edge, row_weight[row])
            mean, spread = group_moments(value[edge], batch.group_id[row], row_weight[row], batch.groups)
            score = (value[edge] - mean[batch.group_id[row]]) / (spread + eps)[batch.group_id[row]]
            total[row, slot] += factor * torch.where(spread[batch.group_id[row]] > 1e-8, score, 0.0)
    whole = advantages(batch, weights=weights, eps=eps, limit=limit)
    return Advantages(total.clamp(-limit, limit).float(), whole.mean, whole.std, whole.flat)


def group_moments(value: Tensor, group: Tensor, weight: Tensor, groups: int | None = None) -> tuple[Tensor, Tensor]:
    """Self-normalised weighted mean and standard deviation (divided by N) of each group.

    Args:
        value: [M] float64.
        group: [M] int64, group of each value, 0 to groups - 1.
        weight: [M] float64, not negative.
        groups: their number; the largest of `group` plus one if None.

    Returns:
        Mean and standard deviation, [groups] float64 each; 0 where nothing in a group has weight.
    """
    count = int(group.max()) + 1 if groups is None else groups
    zero = torch.zeros(count, dtype=torch.float64, device=value.device)
    total = zero.index_add(0, group, weight)
    share = torch.where(weight > 0.0, weight / total[group], 0.0)
    mean = zero.index_add(0, group, share * value)
    return mean, zero.index_add(0, group, share * (value - mean[group]).square()).sqrt()


def finite_rewards(batch: RolloutBatch, name: str, weight: Tensor) -> Tensor:
    """Rewards [B] float64, 0 in rows without weight; NonFiniteError where that of a row with weight is not finite."""
    reward = torch.where(weight > 0.0, batch.rewards[name].double(), 0.0)
    if not bool(reward.isfinite().all()):
        row = int((~reward.isfinite()).nonzero()[0])
        raise NonFiniteError(
            f"advantages need finite rewards, got {reward[row].item()} from {name!r} in row {row}: a sample forbidden "
            "by -inf has no advantage; give it the lowest reward there is, or drop it (log_w_base = -inf)"
        )
    return reward


def _global_std(reward: Tensor, weight: Tensor) -> Tensor:
    """Weighted standard deviation over all rows."""
    everyone = torch.zeros_like(weight, dtype=torch.int64)
    return group_moments(reward, everyone, weight)[1][0]


def _reward_weights(batch: RolloutBatch, weights: Mapping[str, float] | None) -> Mapping[str, float]:
    """Weight of every reward by name, checked."""
    asked = dict.fromkeys(batch.rewards, 1.0) if weights is None else weights
    unknown = set(asked) - set(batch.rewards)
    if unknown:
        raise SteerError(
            f"the batch has rewards {sorted(batch.rewards)}, got weights for {sorted(unknown)}; leave those out"
        )
    if not any(asked.values()) or not all(map(math.isfinite, asked.values())):
        raise SteerError(
            f"weights of rewards are finite numbers, not all of them 0, got {dict(asked)}; give the reward to train on "
            "a weight of 1"
        )
    return asked
