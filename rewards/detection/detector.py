"""Object detectors as rewards use them: pictures and the labels to look for, to boxes, labels and confidences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.errors import RewardError

from ..hub import from_hub, model_and_processor

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Detection:
    """The objects found in one picture.

    Args:
        boxes: `[n, 4]`, left, top, right, bottom in pixels.
        labels: n texts.
        scores: `[n]`, confidences in [0, 1].
        masks: `[n, H, W]`, which pixels are the object's, or None.

    Raises:
        RewardError: where the lengths differ.
    """

    boxes: Tensor
    labels: Sequence[str]
    scores: Tensor
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.labels)
        masks = count if self.masks is None else len(self.masks)
        if tuple(self.boxes.shape) != (count, 4) or tuple(self.scores.shape) != (count,) or masks != count:
            raise RewardError(
                f"a detection of {count} labels needs boxes ({count}, 4), scores ({count},) and as many masks, got "
                f"boxes {tuple(self.boxes.shape)}, scores {tuple(self.scores.shape)} and {masks} masks"
            )

    def of(self, label: str, above: float, most: int) -> list[int]:
        """Indices of the objects with a label, the surest first.

        Args:
            label: the wanted label.
            above: the confidence that an object must exceed.
            most: indices to return at most.

        Returns:
            Indices into boxes, labels, scores and masks.
        """
        found = [i for i, name in enumerate(self.labels) if name == label and float(self.scores[i]) > above]
        return sorted(found, key=lambda i: -float(self.scores[i]))[:most]


Detector = Callable[["list[Image]", Sequence[Sequence[str]]], "list[Detection]"]
"""From pictures and, for each, the labels to look for (detectors of fixed classes may ignore them), to detections."""


def detect(detector: Detector, pictures: list[Image], labels: Sequence[Sequence[str]]) -> list[Detection]:
    """The detections of any detector, checked.

    Args:
        detector: from pictures and labels to one `Detection` per picture.
        pictures: M PIL images, RGB.
        labels: the labels to look for in each.

    Returns:
        M detections.

    Raises:
        RewardError: where the detector does not return one `Detection` per picture.
    """
    found = list(detector(pictures, labels))
    if len(found) != len(pictures) or not all(isinstance(each, Detection) for each in found):
        raise RewardError(
            f"a detector must return one rewards.Detection for each of {len(pictures)} pictures, got {len(found)} of "
            f"{sorted({type(each).__name__ for each in found})}; return a list of them"
        )
    return found


@dataclass(frozen=True, eq=False)
class TransformersDetector:
    """A detector from a model of transformers.

    Called with M pictures (PIL, RGB) and the labels to look for in each.

    Args:
        model: for object detection (DETR, RT-DETR, ...), instance segmentation (Mask2Former: gives masks, and boxes
            around them) or zero-shot detection (Grounding DINO: looks for the labels it is given). A model, or a hub
            id or folder.
        processor: the model's processor; None with an id.
        least: confidence below which nothing is reported. Grounding DINO's text threshold is set to it too.
        names: other names for labels of the model, {"mouse": "computer mouse"}: detectors of one set of classes write
            them in several ways.
        download: whether to fetch a model given by id that is not in the hub's cache.
        device: for a model given by id.

    Returns:
        M detections. The labels of Grounding DINO are the phrases that were asked for.

    Raises:
        RewardError: for missing packages (pip install 'steer-diffusion[vlm]') or weights, and for a label that a model
            with fixed classes does not know, which would never be found.

    Cost: one forward pass per picture, in the model's own resolution.
    """

    model: Any = field(repr=False)
    processor: Any = field(default=None, repr=False)
    least: float = 0.05
    names: Mapping[str, str] = field(default_factory=dict, repr=False)
    download: bool = False
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        model, processor = model_and_processor(
            "TransformersDetector",
            self.model,
            self.processor,
            model_class=self._model_class,
            processor_class=lambda transformers: transformers.AutoProcessor,
            download=self.download,
            device=self.device,
        )
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "processor", processor)

    def _model_class(self, transformers: Any) -> Any:
        """The class that loads the model with this id; RewardError where it is no detector."""
        config = from_hub(transformers.AutoConfig, self.model, download=self.download)
        for name in _MODEL_CLASSES:
            model_class = getattr(transformers, name)
            if type(config) in model_class._model_mapping:
                return model_class
        raise RewardError(
            f"{self.model!r} is a {config.model_type}, which transformers has no detector of; name a model for object "
            "detection, universal segmentation or zero-shot object detection"
        )

    @torch.no_grad()
    def __call__(self, pictures: list[Image], labels: Sequence[Sequence[str]]) -> list[Detection]:
        zero_shot = hasattr(self.processor, "post_process_grounded_object_detection")
        detect_one = self._detect_phrases if zero_shot else self._detect_classes
        return [
            detect_one(picture, list(dict.fromkeys(wanted))) for picture, wanted in zip(pictures, labels, strict=True)
        ]

    def _detect_classes(self, picture: Image, wanted: list[str]) -> Detection:
        """The objects of the model's own classes; RewardError where it does not know a wanted one."""
        names = {index: self.names.get(name, name) for index, name in self.model.config.id2label.items()}
        if unknown := set(wanted) - set(names.values()):
            raise RewardError(
                f"this detector does not know {', '.join(sorted(unknown))}; it knows {', '.join(names.values())}; pass "
                'names={"its name": "yours"} where only the spelling differs, or use a zero-shot detector'
            )
        inputs = self.processor(images=picture, return_tensors="pt").to(self.model.device)
        outputs, size = self.model(**inputs), [(picture.height, picture.width)]
        if hasattr(self.processor, "post_process_object_detection") and hasattr(outputs, "pred_boxes"):
            (found,) = self.processor.post_process_object_detection(outputs, threshold=self.least, target_sizes=size)
            labels = [names[int(label)] for label in found["labels"]]
            return Detection(found["boxes"].float().cpu(), labels, found["scores"].float().cpu())
        (found,) = self.processor.post_process_instance_segmentation(
            outputs, threshold=self.least, target_sizes=size, return_binary_maps=True
        )
        segments = found["segments_info"]
        masks = found["segmentation"].bool().cpu() if segments else torch.zeros(0, *size[0], dtype=torch.bool)
        boxes = torch.stack([_box_of(mask) for mask in masks]) if segments else torch.zeros(0, 4)
        scores = torch.tensor([float(segment["score"]) for segment in segments])
        return Detection(boxes, [names[int(segment["label_id"])] for segment in segments], scores, masks)

    def _detect_phrases(self, picture: Image, wanted: list[str]) -> Detection:
        """The objects of a zero-shot detector, labelled by the phrase that each answer means."""
        if not wanted:
            return Detection(torch.zeros(0, 4), [], torch.zeros(0))
        inputs = self.processor(images=picture, text=[wanted], return_tensors="pt").to(self.model.device)
        (found,) = self.processor.post_process_grounded_object_detection(
            self.model(**inputs),
            inputs["input_ids"],
            threshold=self.least,
            text_threshold=self.least,
            target_sizes=[(picture.height, picture.width)],
        )
        phrases = [phrase_of(text, wanted) for text in found["text_labels"]]
        kept = [i for i, phrase in enumerate(phrases) if phrase]
        labels = [phrase for phrase in phrases if phrase]
        return Detection(found["boxes"][kept].float().cpu(), labels, found["scores"][kept].float().cpu())


_MODEL_CLASSES = (
    "AutoModelForZeroShotObjectDetection",
    "AutoModelForObjectDetection",
    "AutoModelForUniversalSegmentation",
)


def phrase_of(text: str, wanted: Sequence[str]) -> str | None:
    """The wanted phrase that a detector's answer means: the one with the largest share of its words in the answer.

    Grounding DINO answers with the words of the query above its text threshold, "red" for "red car" or "cat dog" for
    two queries at once.

    Args:
        text: the detector's answer.
        wanted: the phrases it was asked for.

    Returns:
        One of the phrases; None where no phrase shares a word with the answer.
    """
    answered = set(text.lower().split())

    def share(phrase: str) -> float:
        words = set(phrase.lower().split())
        return len(answered & words) / len(words)

    best = max(wanted, key=share)
    return best if share(best) > 0 else None


def _box_of(mask: Tensor) -> Tensor:
    """The box (left, top, right, bottom) around a mask's pixels."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)


def iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boxes.

    Args:
        a: `[4]`, left, top, right, bottom in pixels.
        b: the same.

    Returns:
        A number in [0, 1]; 0 where both boxes are empty.
    """
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    shared = float((high - low).clamp(min=0).prod())
    union = float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - shared
    return shared / union if union > 0 else 0.0
