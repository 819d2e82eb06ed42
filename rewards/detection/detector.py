"""Object detectors as rewards use them: pictures and the labels to look for, to boxes, labels and confidences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.errors import RewardError

from ..hub import from_hub, optional

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Detection:
    """What was found in one picture.

    boxes: (n, 4), left, top, right, bottom in pixels. labels: n texts. scores: (n,), confidences in [0, 1].
    masks: (n, H, W), which pixels are the object's, or None. Raises RewardError where the lengths differ.
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
        """Indices of the objects with a label and a confidence above `above`, the surest first, at most `most`."""
        found = [i for i, name in enumerate(self.labels) if name == label and float(self.scores[i]) > above]
        return sorted(found, key=lambda i: -float(self.scores[i]))[:most]


Detector = Callable[["list[Image]", Sequence[Sequence[str]]], "list[Detection]"]
"""Pictures and, for each, the labels that matter (which closed-set detectors may ignore), to one detection each."""


def detect(detector: Detector, pictures: list[Image], labels: Sequence[Sequence[str]]) -> list[Detection]:
    """The detector's answer; RewardError where it has not one Detection per picture."""
    found = list(detector(pictures, labels))
    if len(found) != len(pictures) or not all(isinstance(each, Detection) for each in found):
        raise RewardError(
            f"a detector must return one rewards.Detection for each of {len(pictures)} pictures, got {len(found)} of "
            f"{sorted({type(each).__name__ for each in found})}"
        )
    return found


@dataclass(frozen=True, eq=False)
class TransformersDetector:
    """A detector from a model of transformers. One forward pass per picture, in the model's own resolution.

    model, processor: for object detection (DETR, RT-DETR, ...), instance segmentation (Mask2Former: gives masks, and
        boxes around them) or zero-shot detection (Grounding DINO: looks for the labels it is asked for); or a hub id
        or folder as the model, and no processor.
    least: confidence below which nothing is reported. names: other names for labels of the model, {"mouse": "computer
        mouse"}: detectors of one set of classes write them in several ways. download, device: for a model by id.
    Grounding DINO's own text threshold is set to `least` too; its labels come back as the phrases that were asked.
    Raises RewardError for missing packages (pip install 'steer-diffusion[vlm]') or weights, and for a label that a
    model with fixed classes does not know: it would never be found.
    """

    model: Any = field(repr=False)
    processor: Any = field(default=None, repr=False)
    least: float = 0.05
    names: Mapping[str, str] = field(default_factory=dict, repr=False)
    download: bool = False
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        model, processor = self.model, self.processor
        if isinstance(model, str):
            transformers = optional("transformers", "vlm")
            config = from_hub(transformers.AutoConfig, model, download=self.download)
            processor = processor or from_hub(transformers.AutoProcessor, model, download=self.download)
            loader = next(
                (
                    getattr(transformers, name)
                    for name in _LOADERS
                    if type(config) in getattr(transformers, name)._model_mapping
                ),
                None,
            )
            if loader is None:
                raise RewardError(f"{model!r} is a {config.model_type}, which transformers has no detector of")
            model = from_hub(loader, model, download=self.download, use_safetensors=True).to(self.device)
        if processor is None:
            raise RewardError("TransformersDetector(model) was given no processor; pass both, or a hub id")
        object.__setattr__(self, "model", model.eval().requires_grad_(False))
        object.__setattr__(self, "processor", processor)

    @torch.no_grad()
    def __call__(self, pictures: list[Image], labels: Sequence[Sequence[str]]) -> list[Detection]:
        """One detection per picture."""
        one = self._grounded if hasattr(self.processor, "post_process_grounded_object_detection") else self._closed
        return [one(picture, list(dict.fromkeys(asked))) for picture, asked in zip(pictures, labels, strict=True)]

    def _closed(self, picture: Image, asked: list[str]) -> Detection:
        names = {index: self.names.get(name, name) for index, name in self.model.config.id2label.items()}
        if unknown := set(asked) - set(names.values()):
            raise RewardError(
                f"this detector does not know {', '.join(sorted(unknown))}; it knows {', '.join(names.values())}; pass "
                'names={"its name": "yours"} where it only writes it in another way'
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
        boxes = torch.stack([_around(mask) for mask in masks]) if segments else torch.zeros(0, 4)
        scores = torch.tensor([float(segment["score"]) for segment in segments])
        return Detection(boxes, [names[int(segment["label_id"])] for segment in segments], scores, masks)

    def _grounded(self, picture: Image, asked: list[str]) -> Detection:
        if not asked:
            return Detection(torch.zeros(0, 4), [], torch.zeros(0))
        inputs = self.processor(images=picture, text=[asked], return_tensors="pt").to(self.model.device)
        (found,) = self.processor.post_process_grounded_object_detection(
            self.model(**inputs), inputs["input_ids"], threshold=self.least, text_threshold=self.least,
            target_sizes=[(picture.height, picture.width)],
        )  # fmt: skip
        said = [phrase_of(text, asked) for text in found["text_labels"]]
        kept = [i for i, phrase in enumerate(said) if phrase]
        return Detection(
            found["boxes"][kept].float().cpu(), [said[i] or "" for i in kept], found["scores"][kept].float().cpu()
        )


_LOADERS = (
    "AutoModelForZeroShotObjectDetection",
    "AutoModelForObjectDetection",
    "AutoModelForUniversalSegmentation",
)


def phrase_of(text: str, asked: Sequence[str]) -> str | None:
    """The phrase, of those asked for, that a detector's answer means: most words in common, None for none.

    Grounding DINO answers with the words of the query above its text threshold, "red" for "red car" or "cat dog" for
    two queries at once.
    """
    words = set(text.lower().split())
    shared = {phrase: len(words & set(phrase.lower().split())) / len(set(phrase.lower().split())) for phrase in asked}
    best = max(shared, key=lambda phrase: shared[phrase])
    return best if shared[best] > 0 else None


def _around(mask: Tensor) -> Tensor:
    """The box around a mask's pixels."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)


def iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); 0 where both are empty."""
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    shared = float((high - low).clamp(min=0).prod())
    union = float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - shared
    return shared / union if union > 0 else 0.0
