"""Objects counted, and objects in their places: rewards of what a detector finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.torch_modes import scores_in_full
from steer.types import RewardSpec

from ..pil_images import to_rgb
from ..scoring import check_prompts
from .detector import Detection, Detector, detect, iou

Box = tuple[float, float, float, float]
_Wanted = TypeVar("_Wanted")


@dataclass(frozen=True, eq=False)
class Count:
    """Minus the sum over labels of (found - wanted)^2, in objects squared.

    Called with images `[M, 1 or 3, H, W]` in [0, 1] and M prompts.

    Args:
        detector: a `Detector`, such as `rewards.TransformersDetector`.
        wanted: for each prompt, {label: number}.
        above: confidence that an object must exceed to count.

    Returns:
        Scores `[M]`, at most 0, float32, without a gradient.

    Raises:
        RewardError: for a prompt that `wanted` has no numbers for.
        ShapeError: for samples of another shape.

    Cost: one detector call for the batch.
    Source: the counting reward of Kim et al. 2025 (RBF, arXiv 2503.19385).
    Differs: any detector; there it is Grounding DINO with SAM.
    """

    detector: Detector = field(repr=False)
    wanted: Mapping[str, Mapping[str, int]]
    above: float = 0.3
    spec: ClassVar[RewardSpec] = RewardSpec("objects^2", (-inf, 0.0), "none", prompts=True)

    @scores_in_full
    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        wanted = [_wanted_by(prompt, self.wanted, "Count", "numbers") for prompt in prompts]
        found = _detections(self.detector, samples, prompts, [list(numbers) for numbers in wanted], "Count")
        scores = [self._score(each, numbers) for each, numbers in zip(found, wanted, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=samples.device)

    def _score(self, found: Detection, numbers: Mapping[str, int]) -> int:
        most = len(found.labels)
        return -sum((len(found.of(label, self.above, most)) - number) ** 2 for label, number in numbers.items())


@dataclass(frozen=True, eq=False)
class Layout:
    """Mean intersection over union of the wanted boxes with the found ones.

    Called with images `[M, 1 or 3, H, W]` in [0, 1] and M prompts. A found box is matched with one wanted box of its
    label: pairs are taken by decreasing overlap, and a wanted box without a partner counts 0.

    Args:
        detector: a `Detector`, such as `rewards.TransformersDetector`.
        wanted: for each prompt, (label, (left, top, right, bottom)) with sides as shares of the image, 0 to 1.
        above: confidence that an object must exceed to count.

    Returns:
        Scores `[M]` in [0, 1], float32, without a gradient.

    Raises:
        RewardError: for a prompt that `wanted` has no boxes for, and for boxes outside the image.
        ShapeError: for samples of another shape.

    Cost: one detector call for the batch.
    Source: the layout reward of Yoon et al. 2025 (Psi-Sampler, arXiv 2506.01320).
    Differs: any detector; there it is Grounding DINO.
    """

    detector: Detector = field(repr=False)
    wanted: Mapping[str, Sequence[tuple[str, Box]]]
    above: float = 0.3
    spec: ClassVar[RewardSpec] = RewardSpec("1", (0.0, 1.0), "none", prompts=True)

    def __post_init__(self) -> None:
        for prompt, boxes in self.wanted.items():
            for label, (left, top, right, bottom) in boxes:
                if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                    raise RewardError(
                        f"the box of {label!r} for {prompt!r} must have 0 <= left < right <= 1 and 0 <= top < bottom "
                        f"<= 1, shares of the image, got {(left, top, right, bottom)}"
                    )
            if not boxes:
                raise RewardError(f"Layout needs at least one box for the prompt {prompt!r}, got none")

    @scores_in_full
    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        wanted = [_wanted_by(prompt, self.wanted, "Layout", "boxes") for prompt in prompts]
        labels = [[label for label, _ in boxes] for boxes in wanted]
        found = _detections(self.detector, samples, prompts, labels, "Layout")
        size = torch.tensor([samples.shape[-1], samples.shape[-2]] * 2, dtype=torch.float32)
        scores = [self._overlap(each, boxes, size) for each, boxes in zip(found, wanted, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=samples.device)

    def _overlap(self, found: Detection, wanted: Sequence[tuple[str, Box]], size: Tensor) -> float:
        """Mean overlap of the wanted boxes of one image. size [4]: width, height, width, height in pixels."""
        pairs = [
            (iou(torch.tensor(box) * size, found.boxes[i].float().cpu()), row, i)
            for row, (label, box) in enumerate(wanted)
            for i in found.of(label, self.above, len(found.labels))
        ]
        overlap_of_row: dict[int, float] = {}
        used: set[int] = set()
        for overlap, row, i in sorted(pairs, reverse=True):
            if row not in overlap_of_row and i not in used:
                overlap_of_row[row] = overlap
                used.add(i)
        return sum(overlap_of_row.values()) / len(wanted)


def _wanted_by(prompt: str, wanted: Mapping[str, _Wanted], name: str, what: str) -> _Wanted:
    """What is wanted for a prompt; RewardError where there is nothing for it."""
    if prompt not in wanted:
        raise RewardError(f"{name} has no {what} for the prompt {prompt!r}; add them to wanted")
    return wanted[prompt]


def _detections(
    detector: Detector, samples: Tensor, prompts: Sequence[str], labels: list[list[str]], name: str
) -> list[Detection]:
    """The detections of images, one per prompt. labels: what to look for in each. name: of the reward."""
    pictures = to_rgb(samples, name)
    check_prompts(prompts, len(pictures), name)
    return detect(detector, pictures, labels)
