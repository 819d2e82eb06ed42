"""Probability of a digit in an image, by the embedded digit classifiers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.torch_modes import lasting, scores_in_full
from steer.types import RewardSpec

from .image_checks import check_images

if TYPE_CHECKING:
    from .digits import DigitNet


@dataclass(frozen=True)
class DigitLogProb:
    """log p(label | image) in nats, by an embedded digit classifier.

    Called with images `[M, 1, 8, 8]` in [0, 1].

    Args:
        label: a digit 0 to 9, or a collection of digits for "any of these" (the log of the summed probability); kept
            as a sorted tuple.
        net: "digits-classifier" or "digits-judge". Steer by the first, and report with `judge`, which uses the second.

    Returns:
        Scores `[M]`, at most 0, differentiable: float64 for float64 images, else float32.

    Raises:
        RewardError: for a label that is no digit, or an unknown net.
        ShapeError: for other images.
    """

    label: int | Collection[int]
    net: str = "digits-classifier"
    spec: ClassVar[RewardSpec] = RewardSpec("nat", bounds=(-inf, 0.0), gradient="exact")

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", _sorted_digits(self.label))

    @property
    def __name__(self) -> str:
        return f"DigitLogProb({_comma_separated(self.label)})"

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        images = check_images(samples, self.__name__, channels=(1,), side=8)
        log_prob = torch.log_softmax(_network(self.net, images.device, images.dtype)(images), 1)
        return log_prob[:, list(_sorted_digits(self.label))].logsumexp(1)


@dataclass(frozen=True)
class DigitProb:
    """p(label | image), by an embedded digit classifier. Made by `judge`.

    Called with images `[M, 1, 8, 8]` in [0, 1].

    Args:
        label: as in `DigitLogProb`.
        net: as in `DigitLogProb`.

    Returns:
        Scores `[M]` in [0, 1], differentiable.

    Raises:
        RewardError: as `DigitLogProb`.
        ShapeError: for other images.
    """

    label: int | Collection[int]
    net: str = "digits-judge"
    spec: ClassVar[RewardSpec] = RewardSpec("1", bounds=(0.0, 1.0), gradient="exact")

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", _sorted_digits(self.label))

    @property
    def __name__(self) -> str:
        return f"DigitProb({_comma_separated(self.label)})"

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        return DigitLogProb(self.label, self.net)(samples).exp()


def judge(label: int | Collection[int]) -> DigitProb:
    """The probability of a label by the held-out network, for reports: never steer by it.

    The judge has another architecture than the classifier and was trained on disjoint data. A sample that the
    classifier likes and the judge does not has been optimised against the classifier's mistakes.

    Args:
        label: a digit 0 to 9, or a collection of digits for "any of these".

    Returns:
        A reward of images `[M, 1, 8, 8]` with scores `[M]` in [0, 1].

    Raises:
        RewardError: for a label that is no digit.
    """
    return DigitProb(label, "digits-judge")


def _sorted_digits(label: int | Collection[int]) -> tuple[int, ...]:
    """The digits of a label; RewardError where it has others than 0 to 9, or none."""
    labels = set(label) if isinstance(label, Collection) else {label}
    if not labels or not all(isinstance(digit, int) and 0 <= digit <= 9 for digit in labels):
        raise RewardError(f"label must be a digit 0 to 9 or a non-empty collection of digits, got {label!r}")
    return tuple(sorted(labels))


def _comma_separated(label: int | Collection[int]) -> str:
    return ",".join(map(str, _sorted_digits(label)))


@cache
@lasting()
def _network(name: str, device: torch.device, dtype: torch.dtype) -> DigitNet:
    """The stored network, loaded once per device and dtype."""
    from .digits import load_digit_net

    try:
        return load_digit_net(name).to(device, dtype)
    except ValueError as error:
        raise RewardError(str(error)) from error
