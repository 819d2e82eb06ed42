"""A reward that corrects a generator by resampling: what it leaves out of its pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import RewardError, SteerError
from ..types import RewardSpec

Detector = Callable[[Tensor], Tensor]
"""Images [M, ...] -> probability [M, O] that each of O objects is in the picture."""


@dataclass(frozen=True)
class MissingObjects:
    """log-ratio in nats of how likely an image shows what it should, given how often the generator forgets it.

        r(x) = sum_o log p_o - log(p_o + (1 - p_o) q_o),   q_o = h_o (1 - c_o) / (c_o + h_o (1 - c_o))

    p_o: the detector's probability of object o in x. h_o: share of the generator's images that miss it. c_o: share of
    real images that miss it nevertheless.

    A sample that shows everything scores 0, one where the detector is certain of a gap -inf. In the paper h is the
    share among the particles of the moment, which makes weights depend on the population; a distribution to tilt needs
    a fixed h, from `calibrated`.
    Source: Liu et al. 2023 (Correcting diffusion generation through resampling, 2312.06038), the object term of their
    weight, as released (c = .2). Differs: h fixed; their other term, log D / (1 - D), is a discriminator's logit: add
    it as a reward.
    """

    detector: Detector
    missing: tuple[float, ...]
    miss_in_data: float = 0.2
    spec: ClassVar[RewardSpec] = RewardSpec(unit="nat", bounds=(-float("inf"), 0.0))

    def __post_init__(self) -> None:
        if not all(0.0 < h <= 1.0 for h in self.missing) or not 0.0 < self.miss_in_data < 1.0:
            raise SteerError(
                f"shares of missing objects lie in (0, 1] and that of real images in (0, 1), got {self.missing} and "
                f"{self.miss_in_data}"
            )

    def __call__(self, samples: Tensor) -> Tensor:
        found = self.detector(samples).double()
        if found.shape != (len(samples), len(self.missing)):
            raise RewardError(
                f"the detector must return (M, objects) = ({len(samples)}, {len(self.missing)}), got "
                f"{tuple(found.shape)}"
            )
        if bool(((found < 0.0) | (found > 1.0)).any()):
            raise RewardError(
                f"a detector gives probabilities in [0, 1], got {float(found.min()):.3g} to {float(found.max()):.3g}; "
                "take the sigmoid of logits"
            )
        share = found.new_tensor(self.missing)
        q = share * (1.0 - self.miss_in_data) / (self.miss_in_data + share * (1.0 - self.miss_in_data))
        return (found.log() - (found + (1.0 - found) * q).log()).sum(1)

    def calibrated(self, samples: Tensor, *, threshold: float = 0.5) -> MissingObjects:
        """With h the shares of given samples of the generator whose detection is below a threshold.

        Laplace's rule, (misses + 1) / (M + 2), so that no share is 0.
        """
        with torch.no_grad():
            misses = (self.detector(samples) < threshold).double().sum(0)
        return replace(self, missing=tuple(((misses + 1.0) / (len(samples) + 2.0)).tolist()))


def missing_objects(detector: Detector, missing: Sequence[float] | int, *, miss_in_data: float = 0.2) -> MissingObjects:
    """The reward `MissingObjects`: whether an image shows what it should, given how often the generator forgets it.

    Args:
        detector: images [M, ...] to the probability [M, O] that each of O objects is in the picture.
        missing: h of every object, the share of the generator's images that miss it, in (0, 1]; or O, how many objects
            (h = 1/2 until `calibrated`).
        miss_in_data: c, the share of real images that miss an object nevertheless, in (0, 1).

    Returns:
        The reward, in nats, at most 0.

    Raises:
        SteerError: shares out of range.
    """
    shares = (0.5,) * missing if isinstance(missing, int) else tuple(float(h) for h in missing)
    return MissingObjects(detector, shares, miss_in_data)
