"""A frozen CLIP network, of open_clip or of transformers: unit embeddings of images and of prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from steer.errors import RewardError
from steer.torch_modes import lasting

from ..hub import from_hub, optional_package, refuse_lfs_pointer
from ..scoring import check_prompts
from .clip_pixels import clip_pixels
from .weights import freeze, move_to, weights_file

PROMPTS_KEPT = 256
"""Prompt embeddings that a network caches, the most recently used: 1 MB at most, however many particles share one."""


@dataclass(frozen=True, eq=False)
class CLIPNetwork:
    """Embeddings by a CLIP network, which is frozen in place and moves to the device of the images.

    Args:
        network: one of open_clip (`encode_image`, `encode_text`) or of transformers (`get_image_features`,
            `get_text_features`). Half-precision weights are raised to float32; float64 stays.
        tokenizer: from a list of n strings to token ids `[n, 77]`, or to keyword arguments of the text tower.
        name: of the reward, for messages.
        fit: as in `clip_pixels`.
    """

    network: nn.Module
    tokenizer: Callable[[list[str]], Any]
    name: str
    fit: Literal["crop", "pad"] = "crop"

    def __post_init__(self) -> None:
        freeze(self.network)
        object.__setattr__(self, "_cached_embedding", lru_cache(PROMPTS_KEPT)(self._embed))

    def images(self, samples: Tensor) -> Tensor:
        """Unit embeddings of images, differentiable.

        Args:
            samples: `[M, 3, H, W]` in [0, 1].

        Returns:
            `[M, D]`; `[0, 1]` of no images.

        Raises:
            ShapeError: for samples of another shape.
            RewardError: for values outside [0, 1].
        """
        network, dtype = move_to(self.network, samples.device)
        pixels = clip_pixels(samples, self.name, side=self._side(), fit=self.fit).to(dtype)
        if not len(pixels):  # networks cannot reshape an empty batch
            return pixels.sum((2, 3))[:, :1]
        if hasattr(network, "encode_image"):
            return normalize(network.encode_image(pixels), dim=1)
        return normalize(feature_tensor(network.get_image_features(pixel_values=pixels)), dim=1)

    def prompts(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Unit embeddings of prompts, without gradients. Each distinct prompt is encoded once, alone.

        Args:
            prompts: M strings.
            device: of the result.

        Returns:
            `[M, D]`.
        """
        return torch.stack([self._cached_embedding(prompt).to(device) for prompt in prompts])  # pyright: ignore

    def similarity(self, samples: Tensor, prompts: Sequence[str], prefix: str = "") -> Tensor:
        """Cosines of images and prompts.

        Args:
            samples: `[M, 3, H, W]` in [0, 1].
            prompts: M strings.
            prefix: put before each prompt.

        Returns:
            `[M]`, differentiable.

        Raises:
            RewardError: unless there is one prompt per image, and for values outside [0, 1].
            ShapeError: for samples of another shape.
        """
        check_prompts(prompts, len(samples), self.name)
        images = self.images(samples)
        if not len(samples):
            return images.sum(1)
        return (images * self.prompts([prefix + prompt for prompt in prompts], samples.device)).sum(1)

    @lasting()
    def _embed(self, prompt: str) -> Tensor:
        """Unit embedding [D] of a prompt."""
        network: Any = self.network
        device = next(network.parameters()).device
        tokens = self.tokenizer([prompt])
        if hasattr(network, "encode_text"):
            features = network.encode_text(tokens.to(device))
        else:
            inputs = {key: ids.to(device) for key, ids in tokens.items()}
            features = feature_tensor(network.get_text_features(**inputs))
        return normalize(features[0], dim=0)

    def _side(self) -> int:
        """Pixels of the network's input."""
        network: Any = self.network
        side = network.visual.image_size if hasattr(network, "visual") else network.config.vision_config.image_size
        return side if isinstance(side, int) else side[0]


def from_open_clip(
    model: str | nn.Module,
    weights: str | os.PathLike[str],
    tokenizer: Callable[[list[str]], Any] | None,
    name: str,
    *,
    download: bool = False,
    fit: Literal["crop", "pad"] = "crop",
) -> CLIPNetwork:
    """A CLIP network of open_clip.

    Args:
        model: a module, which is used as it is, or a name of open_clip's.
        weights: for a model by name: a path, or a tag such as "openai".
        tokenizer: None for open_clip's own, which cuts a prompt to 77 tokens and keeps the end token, at which CLIP
            reads the text: what is beyond 75 tokens of text is not seen.
        name: of the reward, for messages.
        download: whether to fetch weights that are not in the hub's cache.
        fit: as in `clip_pixels`.

    Returns:
        The network, frozen.

    Raises:
        RewardError: for a missing package, unknown names and absent weights.
    """
    if isinstance(model, nn.Module):
        return CLIPNetwork(model, tokenizer or optional_package("open_clip", "clip").tokenize, name, fit)
    open_clip = optional_package("open_clip", "clip")
    config = open_clip.get_model_config(model)
    if config is None:
        raise RewardError(f"open_clip has no model {model!r}; open_clip.list_models() lists those it has")
    path = Path(weights) if Path(weights).is_file() else _file_of_tag(open_clip, model, str(weights), config, download)
    refuse_lfs_pointer(path)
    _check_activation(open_clip, model, path, config)
    try:
        network = open_clip.create_model(model, pretrained=str(path), pretrained_text=False, weights_only=True)
    except Exception as error:
        raise RewardError(
            f"{path} holds no weights of {model} ({type(error).__name__}: {str(error)[:300]}); name the model that the "
            "file is of"
        ) from error
    return CLIPNetwork(network, tokenizer or open_clip.get_tokenizer(model), name, fit)


def from_transformers(
    model: str | nn.Module,
    tokenizer: str | Callable[[list[str]], Any],
    name: str,
    *,
    download: bool = False,
) -> CLIPNetwork:
    """A CLIP network of transformers. Prompts are cut to 77 tokens with the end token kept.

    Args:
        model: a module, which is used as it is, or a hub id or folder.
        tokenizer: from a list of n strings to keyword arguments of the text tower, or a hub id or folder.
        name: of the reward, for messages.
        download: whether to fetch what is not in the hub's cache.

    Returns:
        The network, frozen.

    Raises:
        RewardError: for a missing package and absent weights.
    """
    if not isinstance(model, nn.Module):
        clip_model = optional_package("transformers", "clip").CLIPModel
        model = from_hub(clip_model, model, download=download, use_safetensors=True)
    if isinstance(tokenizer, str):
        loaded = from_hub(optional_package("transformers", "clip").CLIPTokenizer, tokenizer, download=download)
        tokenizer = partial(loaded, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    return CLIPNetwork(model, tokenizer, name)  # pyright: ignore[reportArgumentType]


def feature_tensor(features: Any) -> Tensor:
    """Features as a tensor: transformers 5 returns an object that holds them, 4 the tensor itself.

    Args:
        features: what `get_image_features` or `get_text_features` returned.

    Returns:
        `[M, D]`.
    """
    return features if isinstance(features, Tensor) else features.pooler_output


def _file_of_tag(open_clip: Any, model: str, tag: str, config: dict[str, Any], download: bool) -> Path:
    """The weights file of one of open_clip's tags, whose activation must be the model's."""
    known = open_clip.get_pretrained_cfg(model, tag)
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise RewardError(f"{tag!r} is neither a file nor weights that open_clip knows for {model}; it knows: {tags}")
    _same_activation(model, config, bool(known.get("quick_gelu")), repr(tag))
    repository, name = os.path.split(known.get("hf_hub", ""))
    if not repository:
        raise RewardError(f"the weights {tag!r} of {model} are not on the Hugging Face hub; pass the path of a copy")
    return weights_file(None, repository, name or "open_clip_model.safetensors", download=download)


def _check_activation(open_clip: Any, model: str, path: Path, config: dict[str, Any]) -> None:
    """Refuses a file whose activation is known and is not the model's.

    The weights do not tell. The configuration of open_clip that lies beside a file does, and so does the repository of
    a file in the hub's cache.
    """
    beside = path.parent / "open_clip_config.json"
    if beside.is_file():
        try:
            quick_gelu = bool(json.loads(beside.read_text())["model_cfg"].get("quick_gelu"))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RewardError(f"{beside} is no configuration of open_clip ({error}); fetch it again") from error
        _same_activation(model, config, quick_gelu, f"in {path}")
        return
    repositories = {part for part in path.parts if part.startswith("models--")}
    for tag in open_clip.list_pretrained_tags_by_model(model.removesuffix("-quickgelu")):
        known = open_clip.get_pretrained_cfg(model.removesuffix("-quickgelu"), tag) or {}
        repository = os.path.split(known.get("hf_hub", ""))[0]
        if repository and f"models--{repository.replace('/', '--')}" in repositories:
            _same_activation(model, config, bool(known.get("quick_gelu")), f"in {path}")


def _same_activation(model: str, config: dict[str, Any], quick_gelu: bool, weights: str) -> None:
    """Weights of the other activation load without an error, and score badly."""
    if quick_gelu != bool(config.get("quick_gelu")):
        other = model.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{model}-quickgelu"
        raise RewardError(
            f"the weights {weights} were trained with another activation than {model} has; name {other!r}"
        )
