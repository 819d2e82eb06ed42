"""Rarity as a reward: far from the data's crowd, and not off the data; and the second half alone, as a gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.types import RewardSpec

from .analytic import flat


def apart(x: Tensor, y: Tensor) -> Tensor:
    """Distances (M, R) between rows. By differences: by products, points far from 0 and near each other are blurred."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


class NeighbourDistance:
    """A tent over the distance to the data: up to 1 at the rarest real points, and falling beyond them.

    With d the mean distance of a sample to its k nearest reference points (AvgkNN), and m and c the median and the
    `ceiling` quantile of the same distance of reference points among themselves,

        r = (d - m) / (c - m)  up to d = c,       1 - fall (d - c) / (c - m)  beyond.

    A distance alone is highest for garbage, and so is what a search finds with it; the tent is highest where the rarest
    few percent of the data are. Differentiable. Scores (M,): float64 for float64 samples, else float32.

    reference: real samples (R, *event) as the reward sees them (images in [0, 1]), more than k.
    features:  samples to what distances are taken in, (M, F); None for the samples themselves.
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
        if not 1 <= k < len(reference):
            raise RewardError(f"k neighbours need more than k reference points, got k={k} of {len(reference)}")
        if not 0.5 < ceiling < 1.0 or not fall > 0.0:
            raise RewardError(f"ceiling is a quantile in (.5, 1) and fall is positive, got {ceiling} and {fall}")
        self.reference, self.k, self.ceiling, self.fall, self.features = reference, k, ceiling, fall, features

    @cached_property
    def points(self) -> Tensor:
        """The reference in the space of distances, (R, F)."""
        with torch.no_grad():
            return self._features(self.reference)

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Median and ceiling of the reference's own distances."""
        between = apart(self.points, self.points).fill_diagonal_(inf)
        own = between.topk(self.k, dim=1, largest=False).values.mean(1).double()
        middle, top = own.quantile(0.5).item(), own.quantile(self.ceiling).item()
        if not top > middle:
            raise RewardError("the reference's distances have no spread (copies of few points?): no sample is rarer")
        return middle, top

    def __call__(self, samples: Tensor) -> Tensor:
        x = flat(self._features(samples), self.points.shape[1], self.__name__)
        distance = apart(x, self.points.to(x)).topk(self.k, dim=1, largest=False).values.mean(1)
        middle, top = self.scale
        height = (distance - middle) / (top - middle)
        return torch.where(height <= 1.0, height, 1.0 - self.fall * (height - 1.0))

    def _features(self, samples: Tensor) -> Tensor:
        return flat(samples if self.features is None else self.features(samples))


class OnManifold:
    """0 for samples inside the ball of a reference point that reaches its k-th neighbour, -inf for all others.

    What improved precision (Kynkäänniemi et al. 2019) counts, as a reward: it forbids the garbage that guidance towards
    rare samples also makes. Predictions at noisy levels are blurred, and off the manifold too: weight finished samples
    by it (`steer.importance_sampling`, or weight=steer.final_only()).

    reference, features: as `NeighbourDistance`. k: 3, as precision is mostly reported; 1 is stricter.
    radius: factor on every ball's radius. Below 1 with k = 1, samples must be closer to a reference point than that is
    to any other, which memorised ones are: look at distances to training data when a gate is this strict.
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
        if not 1 <= k < len(reference) or not radius > 0.0:
            raise RewardError(
                f"k neighbours need more than k reference points and a positive radius, got k={k} of {len(reference)} "
                f"and radius={radius}"
            )
        self.reference, self.k, self.radius, self.features = reference, k, radius, features

    @cached_property
    def balls(self) -> tuple[Tensor, Tensor]:
        """Centres (R, F) and radii (R,)."""
        with torch.no_grad():
            points = flat(self.reference if self.features is None else self.features(self.reference))
            between = apart(points, points).fill_diagonal_(inf)
            return points, self.radius * between.topk(self.k, dim=1, largest=False).values[:, -1]

    def __call__(self, samples: Tensor) -> Tensor:
        points, radii = self.balls
        x = flat(samples if self.features is None else self.features(samples), points.shape[1], self.__name__)
        inside = (apart(x, points.to(x)) <= radii.to(x)).any(1)
        return torch.where(inside, x.new_zeros(()), x.new_full((), -inf))
