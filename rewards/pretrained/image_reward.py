"""ImageReward: BLIP reads the prompt while looking at the image, and a linear head rates what it understood."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import RewardError
from steer.types import RewardSpec

from ..hub import from_hub, optional
from .clip_pixels import clip_pixels
from .weights import affine, frozen, load_into, on_device, read_weights, weights_file

REPOSITORY, FILE, TOKENIZER = "THUDM/ImageReward", "ImageReward.pt", "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072

# Official names of the vision tower, and those of transformers; the text tower's are the same in both.
RENAMED = [
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
]


@dataclass(frozen=True, eq=False)
class ImageReward:
    """How well an image fits its prompt and pleases, by ImageReward v1, of images (M, 3, H, W) in [0, 1], prompts (M).

    weights: the path of `ImageReward.pt` or of a copy in safetensors, or a state dict with its names; None for the
        hub's cache (THUDM/ImageReward). tokenizer: a hub id or folder of BERT's, or a function from a list of strings
        to `input_ids` and `attention_mask`. Read at the first call; nothing is downloaded unless download=True.

    (raw - 0.167) / 1.033, so that scores (M,) have mean 0 and standard deviation 1 on the authors' data; float32.
    The gradient is exact. Prompts are padded and cut to 35 tokens, [SEP] kept: some 25 words are read, no more.
    Image and text attend to each other, so no prompt embedding is kept, only its token ids (256).
    Cost: one ViT-L/16 pass (123 GFLOP) and one BERT-base pass of 35 tokens an image, 1.8 GB of weights.
    Errors as in `CLIPScore`.

    Source: Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation",
    NeurIPS; github.com/THUDM/ImageReward (Apache-2.0). Here on the BLIP of transformers (Li et al. 2022).
    """

    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None
    download: bool = False
    tokenizer: str | Callable[[list[str]], Any] = TOKENIZER

    @property
    def spec(self) -> RewardSpec:
        version = "" if isinstance(self.weights, Mapping) else f"ImageReward-v1 {self.weights or REPOSITORY}"
        return RewardSpec("ImageReward", gradient="exact", prompts=True, version=version)

    @cached_property
    def network(self) -> tuple[nn.Module, Tensor, float]:
        """The towers {vision, text} and the head as w (768,) and b, read when first needed."""
        weights = self.weights
        if not isinstance(weights, Mapping):
            weights = read_weights(weights_file(weights, REPOSITORY, FILE, download=self.download))
        return _towers(weights), *affine(_under("mlp.layers.", weights))

    @cached_property
    def tokens(self) -> Callable[[str], dict[str, Tensor]]:
        """Token ids and mask (35,) of a prompt, kept for the 256 most recent prompts."""
        tokenizer = self.tokenizer
        if isinstance(tokenizer, str):
            loaded = from_hub(optional("transformers", "clip").BertTokenizerFast, tokenizer, download=self.download)
            tokenizer = partial(loaded, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        return lru_cache(256)(lambda prompt: {key: ids[0] for key, ids in tokenizer([prompt]).items()})

    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        if isinstance(prompts, str) or len(prompts) != len(samples):
            raise RewardError(f"ImageReward needs a list of one prompt per image, {len(samples)}, got {prompts!r:.200}")
        towers, weight, offset = self.network
        towers, dtype = on_device(towers, samples.device)
        side = towers["vision"].config.image_size
        pixels = clip_pixels(samples, "ImageReward", side=side).to(dtype)
        if not len(samples):  # which the networks cannot reshape
            return pixels.sum((1, 2, 3))
        seen = towers["vision"](pixel_values=pixels).last_hidden_state
        texts = [self.tokens(prompt) for prompt in prompts]
        ids, mask = (torch.stack([t[key] for t in texts]).to(seen.device) for key in ("input_ids", "attention_mask"))
        read = towers["text"](
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device), is_decoder=False,
        ).last_hidden_state[:, 0]  # fmt: skip
        return (torch.mv(read, weight.to(read)) + offset - MEAN) / STD


def _towers(weights: Mapping[str, Tensor]) -> nn.Module:
    """BLIP's vision and text towers with these weights, their sizes read off them: heads have 64 channels."""
    blip = optional("transformers.models.blip", "clip")
    vision, text = _under("blip.visual_encoder.", weights), _under("blip.text_encoder.", weights)
    text.pop("embeddings.position_ids", None)
    try:
        width, _, patch, _ = vision["patch_embed.proj.weight"].shape
        vocabulary, hidden = text["embeddings.word_embeddings.weight"].shape
        side = patch * round((vision["pos_embed"].shape[1] - 1) ** 0.5)
        eyes = blip.BlipVisionConfig(
            hidden_size=width, intermediate_size=vision["blocks.0.mlp.fc1.weight"].shape[0], image_size=side,
            patch_size=patch, num_hidden_layers=_depth("blocks.", vision), num_attention_heads=width // 64,
            layer_norm_eps=1e-6,
        )  # fmt: skip
        reader = blip.BlipTextConfig(
            vocab_size=vocabulary, hidden_size=hidden, encoder_hidden_size=width, num_attention_heads=hidden // 64,
            intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_depth("encoder.layer.", text), layer_norm_eps=1e-12,
            max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0], is_decoder=True,
        )  # fmt: skip
    except KeyError as error:
        raise RewardError(f"these are no weights of ImageReward: {error} is missing") from error
    towers = nn.ModuleDict({
        "vision": blip.BlipVisionModel(eyes),
        "text": blip.BlipTextModel(reader, add_pooling_layer=False),
    }).to(next(iter(vision.values())).dtype)  # fmt: skip
    load_into(towers["vision"], {_renamed(key): value for key, value in vision.items()}, "ImageReward's image tower")
    load_into(towers["text"], text, "ImageReward's text tower")
    return frozen(towers)


def _under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _depth(prefix: str, weights: Mapping[str, Tensor]) -> int:
    return 1 + max(int(key.removeprefix(prefix).partition(".")[0]) for key in weights if key.startswith(prefix))


def _renamed(key: str) -> str:
    key = f"post_layernorm.{key.removeprefix('norm.')}" if key.startswith("norm.") else key
    for official, ours in RENAMED:
        key = key.replace(official, ours)
    return key
