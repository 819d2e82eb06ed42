"""Rarity that several feature spaces agree on, as a reward: what one of them mistakes, the others see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import ShapeError, SteerError
from ..torch_modes import lasting
from ..types import RewardSpec
from .metrics import knn_distance

Features = Callable[[Tensor], Tensor]
"""Samples [M, ...] -> features [M, F], in which distances are taken."""


class Space(NamedTuple):
    """Real points of one space [R, F], the radii of their balls [R], and the distance of a rare one by group [G]."""

    points: Tensor
    radius: Tensor
    limit: Tensor


@dataclass(frozen=True, eq=False)
class AgreedRarity:
    """The reward of `agreed_rarity`, which says what the fields mean."""

    reference: Tensor
    spaces: tuple[Features, ...]
    groups: Tensor
    k: int
    ball_k: int
    quantile: float
    least: float
    spec: ClassVar[RewardSpec] = RewardSpec(unit="1", bounds=(-float("inf"), 1.0))

    @cached_property
    @lasting()
    def known(self) -> tuple[Space, ...]:
        """What is to be known of the reference in every space."""
        return tuple(self._known(self._at(features, self.reference)) for features in self.spaces)

    def __call__(self, samples: Tensor) -> Tensor:
        votes = [self._votes(space, self._at(f, samples)) for f, space in zip(self.spaces, self.known, strict=True)]
        on, rare = (torch.stack(found).double().mean(0) for found in zip(*votes, strict=True))
        return torch.where(on >= self.least - 1e-9, rare, -torch.inf)

    def _votes(self, space: Space, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whether samples are on the manifold in this space, [M], and whether rare besides."""
        distance = torch.cdist(x, space.points)
        near = distance.topk(self.k, largest=False).indices
        group, own = self.groups[near].mode(1).values, torch.zeros_like(distance[:, 0])
        for g in group.unique().tolist():
            own[group == g] = knn_distance(x[group == g], space.points[self.groups == g], self.k)
        on = (distance <= space.radius).any(1)
        return on, on & (own > space.limit[group])

    def _known(self, points: Tensor) -> Space:
        between = torch.cdist(points, points).fill_diagonal_(torch.inf)
        limit = points.new_zeros(int(self.groups.max()) + 1)
        for g in self.groups.unique().tolist():
            own = between[self.groups == g][:, self.groups == g]
            limit[g] = own.topk(self.k, largest=False).values.mean(1).quantile(self.quantile)
        return Space(points, between.topk(self.ball_k, largest=False).values[:, -1], limit)

    @staticmethod
    def _at(features: Features, samples: Tensor) -> Tensor:
        with torch.no_grad():
            return features(samples).flatten(1).double()


def agreed_rarity(
    reference: Tensor,
    spaces: Sequence[Features],
    *,
    groups: Tensor | None = None,
    k: int = 5,
    ball_k: int = 3,
    quantile: float = 0.9,
    least: float = 1.0,
) -> AgreedRarity:
    """Share of feature spaces in which a sample is a rare one of its kind, -inf unless they agree that it is real.

    Args:
        reference: real samples [R, ...] as the reward sees them, with more than k in every group.
        spaces: features of samples, for instance of a few small classifiers of different seeds, and the samples
            themselves (`lambda x: x.flatten(1)`). The votes of nine decide much better than any of them.
        groups: classes [R], among whose members distances are taken: rare among its like, as in `quantile_labels`. A
            sample is of the class of most of its k neighbours. None: one group, rare among all.
        k, quantile: rare is farther (mean distance to k neighbours) than that quantile of the group's own.
        ball_k: real is within some reference point's ball, which reaches its ball_k-th neighbour.
        least: share of spaces that must find a sample real, 1 for all.

    Returns:
        Scores [M], float64. A reward for finished samples (`search.best_of_n`, `steer.importance_sampling`, or
        weight=steer.final_only()): predictions at noisy levels are blurred, and off every manifold. Not differentiable.

    Raises:
        ShapeError, SteerError: where groups do not fit the reference or are too small.

    Cost: features, and distances to R points, per space.
    """
    labels = torch.zeros(len(reference), dtype=torch.long, device=reference.device) if groups is None else groups
    if labels.shape != reference.shape[:1] or not spaces:
        raise ShapeError(
            f"groups must be (R,) = ({len(reference)},) and spaces one function or more, got {tuple(labels.shape)} and "
            f"{len(spaces)}"
        )
    least_points = max(k, ball_k) + 1
    if int(labels.unique(return_counts=True)[1].min()) < least_points:
        raise SteerError(f"every group needs at least {least_points} reference points; merge groups, or lower k")
    if not 0.0 < quantile < 1.0 or not 0.0 <= least <= 1.0:
        raise SteerError(f"quantile is in (0, 1) and least a share of spaces in [0, 1], got {quantile} and {least}")
    return AgreedRarity(
        reference=reference,
        spaces=tuple(spaces),
        groups=labels,
        k=k,
        ball_k=ball_k,
        quantile=quantile,
        least=least,
    )
