"""The color of an object by CLIP, as GenEval determines it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..hub import model_and_processor
from ..pretrained.clip_network import feature_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")


@dataclass(frozen=True, eq=False)
class CLIPColors:
    """The most likely of ten colors for each crop of an object.

    Called with n crops (PIL images) and the label of their object. Zero-shot: a color's direction is the normalised
    mean of the normalised embeddings of its three sentences, and a crop has the color with the largest cosine.
    Directions are cached per label.

    Args:
        model: a CLIPModel, or a hub id ("openai/clip-vit-large-patch14" for the official figures).
        processor: the model's CLIPProcessor; None with an id.
        download: whether to fetch a model given by id that is not in the hub's cache.
        device: for a model given by id.

    Returns:
        n names of colors.

    Raises:
        RewardError: for missing packages (pip install 'steer-diffusion[vlm]') or weights, or a model without its
            processor.

    Source: Ghosh et al. 2023, GenEval (arXiv 2310.11513), `color_classification`.
    """

    model: Any = field(default="openai/clip-vit-large-patch14", repr=False)
    processor: Any = field(default=None, repr=False)
    download: bool = False
    device: torch.device | str = "cpu"
    _directions_of: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        model, processor = model_and_processor(
            "CLIPColors",
            self.model,
            self.processor,
            model_class=lambda transformers: transformers.CLIPModel,
            processor_class=lambda transformers: transformers.CLIPProcessor,
            download=self.download,
            device=self.device,
        )
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "processor", processor)

    @torch.no_grad()
    def __call__(self, crops: list[Image], label: str) -> list[str]:
        if not crops:
            return []
        inputs = self.processor(images=crops, return_tensors="pt").to(self.model.device)
        images = self.model.get_image_features(**inputs)
        cosines = _normalised(images) @ self._directions(label).T
        return [COLORS[int(index)] for index in cosines.argmax(1)]

    def _directions(self, label: str) -> Tensor:
        """The direction of each color [10, D], for an object of this label."""
        if label not in self._directions_of:
            texts = [text.replace("{color}", c).replace("{label}", label) for c in COLORS for text in TEMPLATES]
            inputs = self.processor(text=texts, padding=True, return_tensors="pt").to(self.model.device)
            embedded = _normalised(self.model.get_text_features(**inputs)).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._directions_of[label] = _normalised(embedded.mean(1))
        return self._directions_of[label]


def _normalised(features: Any) -> Tensor:
    """Rows of length 1."""
    features = feature_tensor(features)
    return features / features.norm(dim=-1, keepdim=True)
