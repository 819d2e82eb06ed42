"""What the embedded digit classifiers think of an image."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.types import RewardSpec

from .pixel_statistics import pixels

if TYPE_CHECKING:
    from .digits import DigitNet


@dataclass(frozen=True)
class DigitLogProb:
    """log p(label | image) in nats, by an embedded classifier, of images (M, 1, 8, 8) in [0, 1]. Differentiable.

    label: a digit 0 to 9, or a collection of them for "any of these" (the log of the summed probability); kept as a
    sorted tuple. net: "digits-classifier" or "digits-judge"; steer by the first and report with `judge`.
    Scores (M,) are at most 0: float64 for float64 images, else float32. Raises ShapeError for other images.
    """

    label: int | Collection[int]
    net: str = "digits-classifier"
    spec: ClassVar[RewardSpec] = RewardSpec("nat", bounds=(-inf, 0.0), gradient="exact")

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", _labels(self.label))

    @property
    def __name__(self) -> str:
        return f"DigitLogProb({_spell(self.label)})"

    def __call__(self, samples: Tensor) -> Tensor:
        images = pixels(samples, self.__name__, channels=(1,), side=8)
        log_prob = torch.log_softmax(_network(self.net, images.device, images.dtype)(images), 1)
        return log_prob[:, list(_labels(self.label))].logsumexp(1)


@dataclass(frozen=True)
class DigitProb:
    """p(label | image) in [0, 1]; arguments as `DigitLogProb`. Made by `judge`."""

    label: int | Collection[int]
    net: str = "digits-judge"
    spec: ClassVar[RewardSpec] = RewardSpec("1", bounds=(0.0, 1.0), gradient="exact")

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", _labels(self.label))

    @property
    def __name__(self) -> str:
        return f"DigitProb({_spell(self.label)})"

    def __call__(self, samples: Tensor) -> Tensor:
        return DigitLogProb(self.label, self.net)(samples).exp()


def judge(label: int | Collection[int]) -> DigitProb:
    """The probability of a label in the eyes of the held-out network, for reports: never steer by it.

    The judge has another architecture than the classifier and was trained on disjoint data. A sample that the
    classifier likes and the judge does not has been optimised against the classifier's mistakes.
    """
    return DigitProb(label, "digits-judge")


def _labels(label: int | Collection[int]) -> tuple[int, ...]:
    labels = set(label) if isinstance(label, Collection) else {label}
    if not labels or not all(isinstance(digit, int) and 0 <= digit <= 9 for digit in labels):
        raise RewardError(f"label must be a digit 0 to 9 or a non-empty collection of digits, got {label!r}")
    return tuple(sorted(labels))


def _spell(label: int | Collection[int]) -> str:
    return ",".join(map(str, _labels(label)))


@cache
def _network(name: str, device: torch.device, dtype: torch.dtype) -> DigitNet:
    from .digits import load_digit_net

    try:
        return load_digit_net(name).to(device, dtype)
    except ValueError as error:
        raise RewardError(str(error)) from error
