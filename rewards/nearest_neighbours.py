"""Rewards by distance to real data: how rare a sample is among them, and whether it is like them at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.torch_modes import lasting, scores_in_full
from steer.types import RewardSpec

from .analytic import flatten_samples


class NeighbourDistance:
    """Rarity: rises with the distance to the data, up to 1 at the rarest real points, and falls beyond them.

    With d the mean distance of a sample to its k nearest reference points (AvgkNN), and m and c the median and the
    `ceiling` quantile of the same distance of reference points among themselves,

        r = (d - m) / (c - m)  up to d = c,       1 - fall (d - c) / (c - m)  beyond.

    A distance alone is highest for garbage, and so is what a search finds with it; this reward is highest where the
    rarest few percent of the data are.

    Called with samples `[M, *event]`.

    Args:
        reference: real samples `[R, *event]` as the reward sees them (images in [0, 1]), more than k.
        k: neighbours, >= 1.
        ceiling: quantile in (0.5, 1) of the reference's distances at which the reward is 1.
        fall: slope beyond the ceiling, > 0.
        features: from samples to `[M, F]`, in which distances are taken; None for the samples themselves.

    Returns:
        Scores `[M]`, at most 1, differentiable: float64 for float64 samples, else float32.

    Raises:
        RewardError: for arguments out of range; when first called, where all distances of the reference are equal.
        ShapeError: for samples of another size than the reference's.
    """

    spec: ClassVar[RewardSpec] = RewardSpec("1", bounds=(-inf, 1.0), gradient="exact")
    __name__ = "NeighbourDistance"

    def __init__(
        self,
        reference: Tensor,
        *,
        k: int = 5,
        ceiling: float = 0.95,
        fall: float = 2.0,
        features: Callable[[Tensor], Tensor] | None = None,
    ):
        _check_neighbours(k, reference)
        if not 0.5 < ceiling < 1.0 or not fall > 0.0:
            raise RewardError(
                "NeighbourDistance needs ceiling, a quantile, between 0.5 and 1 and fall > 0, got "
                f"ceiling={ceiling} and fall={fall}"
            )
        self.reference, self.k, self.ceiling, self.fall, self.features = reference, k, ceiling, fall, features

    @cached_property
    @lasting()
    def points(self) -> Tensor:
        """Features of the reference `[R, F]`."""
        with torch.no_grad():
            return _flat_features(self.features, self.reference)

    @cached_property
    @lasting()
    def scale(self) -> tuple[float, float]:
        """Median and `ceiling` quantile of the reference's distances among themselves.

        Raises:
            RewardError: where all distances are equal.
        """
        distances = _own_neighbours(self.points, self.k).mean(1).double()
        median, top = distances.quantile(0.5).item(), distances.quantile(self.ceiling).item()
        if not top > median:
            raise RewardError(
                "the distances among the reference points have no spread (copies of few points?), so no sample is "
                "rarer than another; pass more, and different, reference samples"
            )
        return median, top

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        x = flatten_samples(_features(self.features, samples), self.points.shape[1], self.__name__)
        distance = _distances(x, self.points.to(x)).topk(self.k, dim=1, largest=False).values.mean(1)
        median, top = self.scale
        height = (distance - median) / (top - median)
        return torch.where(height <= 1.0, height, 1.0 - self.fall * (height - 1.0))


class OnManifold:
    """0 for samples near the data, -inf (forbidden) for all others.

    Near is inside the ball around a reference point that reaches to its k-th neighbour, as improved precision counts
    it. It forbids the garbage that guidance towards rare samples also makes. Predictions at noisy steps are blurred,
    and off the manifold too: weight finished samples by it (`steer.importance_sampling`, or
    weight=steer.final_only()).

    Called with samples `[M, *event]`.

    Args:
        reference: as in `NeighbourDistance`.
        k: neighbours, >= 1. 3 is what precision is mostly reported with; 1 is stricter.
        radius: factor on every ball's radius, > 0. Below 1 with k = 1, samples must be closer to a reference point
            than that is to any other, which memorised samples are: look at distances to training data when the gate is
            this strict.
        features: as in `NeighbourDistance`.

    Returns:
        Scores `[M]` in nats, 0 or -inf, without a gradient.

    Raises:
        RewardError: for arguments out of range.
        ShapeError: for samples of another size than the reference's.

    Source: Kynkäänniemi et al. 2019, improved precision and recall.
    """

    spec: ClassVar[RewardSpec] = RewardSpec("nat", bounds=(0.0, 0.0), gradient="none")
    __name__ = "OnManifold"

    def __init__(
        self,
        reference: Tensor,
        *,
        k: int = 3,
        radius: float = 1.0,
        features: Callable[[Tensor], Tensor] | None = None,
    ):
        _check_neighbours(k, reference)
        if not radius > 0.0:
            raise RewardError(f"OnManifold needs radius > 0, a factor on every ball's radius, got radius={radius}")
        self.reference, self.k, self.radius, self.features = reference, k, radius, features

    @cached_property
    @lasting()
    def balls(self) -> tuple[Tensor, Tensor]:
        """Centres `[R, F]` and radii `[R]`."""
        with torch.no_grad():
            points = _flat_features(self.features, self.reference)
            return points, self.radius * _own_neighbours(points, self.k)[:, -1]

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        points, radii = self.balls
        x = flatten_samples(_features(self.features, samples), points.shape[1], self.__name__)
        inside = (_distances(x, points.to(x)) <= radii.to(x)).any(1)
        return torch.where(inside, x.new_zeros(()), x.new_full((), -inf))


def _check_neighbours(k: int, reference: Tensor) -> None:
    """RewardError unless there are more than k reference points, and k is at least 1."""
    if not 1 <= k < len(reference):
        raise RewardError(
            f"k neighbours need k >= 1 and more than k reference points, got k={k} and {len(reference)} points; pass "
            "more reference samples, or a smaller k"
        )


def _features(features: Callable[[Tensor], Tensor] | None, samples: Tensor) -> Tensor:
    return samples if features is None else features(samples)


def _flat_features(features: Callable[[Tensor], Tensor] | None, samples: Tensor) -> Tensor:
    return flatten_samples(_features(features, samples))


def _own_neighbours(points: Tensor, k: int) -> Tensor:
    """Distances [R, k] from each point to its k nearest others, ascending."""
    return _distances(points, points).fill_diagonal_(inf).topk(k, dim=1, largest=False).values


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Distances [M, R] between rows, computed from differences.

    By matrix products they would lose precision for points far from 0 and near each other.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
