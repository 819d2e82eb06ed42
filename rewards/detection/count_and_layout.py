"""Objects counted, and objects in their places: rewards of what a detector finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.types import RewardSpec

from ..pil_images import to_rgb
from .detector import Detection, Detector, detect, iou

Box = tuple[float, float, float, float]
_Wanted = TypeVar("_Wanted")


@dataclass(frozen=True, eq=False)
class Count:
    """Minus the sum over labels of (found - wanted)^2: at most 0, of images (M, 1 or 3, H, W) in [0, 1].

    detector: a `rewards.detect.Detector`. wanted: for each prompt, {label: number}. above: confidence that an object
    counts from. No gradient; scores float32. Raises RewardError for a prompt without numbers.
    Source: the counting reward of Kim et al. 2025 (RBF, arXiv 2503.19385), there with Grounding DINO and SAM.
    """

    detector: Detector = field(repr=False)
    wanted: Mapping[str, Mapping[str, int]]
    above: float = 0.3
    spec: ClassVar[RewardSpec] = RewardSpec("objects^2", (-inf, 0.0), "none", prompts=True)

    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        wanted = [_of(self.wanted, prompt, "Count", "numbers") for prompt in prompts]
        found = _find(self.detector, samples, [list(numbers) for numbers in wanted], "Count")
        scores = [
            -sum((len(each.of(label, self.above, len(each.labels))) - number) ** 2 for label, number in numbers.items())
            for each, numbers in zip(found, wanted, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32, device=samples.device)


@dataclass(frozen=True, eq=False)
class Layout:
    """Mean intersection over union of wanted boxes with found ones: in [0, 1], of images (M, 1 or 3, H, W) in [0, 1].

    detector: a `rewards.detect.Detector`. wanted: for each prompt, (label, (left, top, right, bottom)) with sides as
    shares of the image, 0 to 1. above: confidence that an object counts from. A found box serves one wanted box of its
    label: pairs are taken by falling overlap, and what finds no partner counts 0.
    No gradient; scores float32. Raises RewardError for a prompt without boxes and for boxes outside the image.
    Source: the layout reward of Yoon et al. 2025 (Psi-Sampler, arXiv 2506.01320), there with Grounding DINO.
    """

    detector: Detector = field(repr=False)
    wanted: Mapping[str, Sequence[tuple[str, Box]]]
    above: float = 0.3
    spec: ClassVar[RewardSpec] = RewardSpec("1", (0.0, 1.0), "none", prompts=True)

    def __post_init__(self) -> None:
        for prompt, places in self.wanted.items():
            for label, (left, top, right, bottom) in places:
                if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                    raise RewardError(
                        f"the box of {label!r} for {prompt!r} must have 0 <= left < right <= 1 and 0 <= top < bottom "
                        f"<= 1, shares of the image, got {(left, top, right, bottom)}"
                    )
            if not places:
                raise RewardError(f"Layout needs at least one box for the prompt {prompt!r}, got none")

    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        wanted = [_of(self.wanted, prompt, "Layout", "boxes") for prompt in prompts]
        found = _find(self.detector, samples, [[label for label, _ in places] for places in wanted], "Layout")
        size = torch.tensor([samples.shape[-1], samples.shape[-2]] * 2, dtype=torch.float32)
        scores = [self._overlap(each, places, size) for each, places in zip(found, wanted, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=samples.device)

    def _overlap(self, found: Detection, places: Sequence[tuple[str, Box]], size: Tensor) -> float:
        pairs = sorted(
            (
                (iou(torch.tensor(box) * size, found.boxes[i].float().cpu()), wish, i)
                for wish, (label, box) in enumerate(places)
                for i in found.of(label, self.above, len(found.labels))
            ),
            reverse=True,
        )
        served: dict[int, float] = {}
        used: set[int] = set()
        for overlap, wish, i in pairs:
            if wish not in served and i not in used:
                served[wish] = overlap
                used.add(i)
        return sum(served.values()) / len(places)


def _of(wanted: Mapping[str, _Wanted], prompt: str, name: str, what: str) -> _Wanted:
    if prompt not in wanted:
        raise RewardError(f"{name} has no {what} for the prompt {prompt!r}; add them to wanted")
    return wanted[prompt]


def _find(detector: Detector, samples: Tensor, labels: list[list[str]], name: str) -> list[Detection]:
    pictures = to_rgb(samples, name)
    if len(labels) != len(pictures):
        raise RewardError(f"{name} needs {len(pictures)} prompts, one per sample, got {len(labels)}")
    return detect(detector, pictures, labels)
