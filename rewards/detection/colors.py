"""The color of an object by CLIP, as GenEval tells it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.errors import RewardError

from ..hub import from_hub, optional

if TYPE_CHECKING:
    from PIL.Image import Image

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")


@dataclass(frozen=True, eq=False)
class CLIPColors:
    """The likeliest of ten colors of each crop: crops (n PIL images) and their object's label, to n names.

    Zero-shot: a color's direction is the mean, normalised, of its three sentences' normalised embeddings; a crop has
    the color with the largest cosine. model, processor: a CLIPModel and its CLIPProcessor, or a hub id
    ("openai/clip-vit-large-patch14" for the official figures) and no processor. download, device: for one by id.
    Directions are kept per label. Source: Ghosh et al. 2023, GenEval (arXiv 2310.11513), `color_classification`.
    """

    model: Any = field(default="openai/clip-vit-large-patch14", repr=False)
    processor: Any = field(default=None, repr=False)
    download: bool = False
    device: torch.device | str = "cpu"
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        model, processor = self.model, self.processor
        if isinstance(model, str):
            transformers = optional("transformers", "vlm")
            processor = processor or from_hub(transformers.CLIPProcessor, model, download=self.download)
            model = from_hub(transformers.CLIPModel, model, download=self.download, use_safetensors=True)
            model = model.to(self.device)
        if processor is None:
            raise RewardError("CLIPColors(model) was given no processor; pass both, or a hub id")
        object.__setattr__(self, "model", model.eval().requires_grad_(False))
        object.__setattr__(self, "processor", processor)

    @torch.no_grad()
    def __call__(self, crops: list[Image], label: str) -> list[str]:
        """The color of each crop."""
        if not crops:
            return []
        inputs = self.processor(images=crops, return_tensors="pt").to(self.model.device)
        images = self.model.get_image_features(**inputs)
        cosines = _unit(images) @ self._directions(label).T
        return [COLORS[int(index)] for index in cosines.argmax(1)]

    def _directions(self, label: str) -> Tensor:
        if label not in self._kept:
            texts = [text.replace("{color}", c).replace("{label}", label) for c in COLORS for text in TEMPLATES]
            inputs = self.processor(text=texts, padding=True, return_tensors="pt").to(self.model.device)
            embedded = _unit(self.model.get_text_features(**inputs)).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._kept[label] = _unit(embedded.mean(1))
        return self._kept[label]


def _unit(features: Any) -> Tensor:
    """Rows of length 1. transformers 5 wraps features in an object, 4 does not."""
    features = getattr(features, "pooler_output", features)
    return features / features.norm(dim=-1, keepdim=True)
