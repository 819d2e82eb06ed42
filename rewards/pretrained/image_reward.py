"""ImageReward: BLIP reads the prompt while attending to the image, and a linear head rates the result."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import RewardError
from steer.torch_modes import lasting, scores_in_full
from steer.types import RewardSpec

from ..hub import from_hub, optional_package
from ..scoring import check_prompts
from .clip_pixels import clip_pixels
from .weights import freeze, load_into, move_to, rating_head, read_weights, weights_file

REPOSITORY, FILE, TOKENIZER = "THUDM/ImageReward", "ImageReward.pt", "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of raw scores on the authors' data."""

# Official names of the vision tower, and those of transformers; the text tower's are the same in both.
NAMES_IN_TRANSFORMERS = [
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
    """How well an image fits its prompt and pleases, by ImageReward v1: (raw - 0.167) / 1.033.

    Called with images `[M, 3, H, W]` in [0, 1] and M prompts. Weights are read at the first call. Prompts are padded
    and cut to 35 tokens, [SEP] kept: some 25 words are read, no more. Image and text attend to each other, so no prompt
    embedding is cached, only its token ids (256 prompts).

    Args:
        weights: the path of `ImageReward.pt` or of a copy in safetensors, or a state dict with its names; None for the
            hub's cache (THUDM/ImageReward).
        download: whether to fetch what is not in the hub's cache.
        tokenizer: a hub id or folder of BERT's, or a function from a list of strings to `input_ids` and
            `attention_mask`.

    Returns:
        Scores `[M]`, float32, of mean 0 and standard deviation 1 on the authors' data. The gradient is exact.

    Raises:
        RewardError: for absent packages, weights or prompts, and values outside [0, 1].
        ShapeError: for samples of another shape.

    Cost: one ViT-L/16 pass (123 GFLOP) and one BERT-base pass of 35 tokens an image, 1.8 GB of weights.
    Source: Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation",
        NeurIPS; github.com/THUDM/ImageReward (Apache-2.0).
    Differs: runs on the BLIP of transformers (Li et al. 2022).
    """

    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None
    download: bool = False
    tokenizer: str | Callable[[list[str]], Any] = TOKENIZER

    @property
    def spec(self) -> RewardSpec:
        """Unit, gradient and version of the scores."""
        version = "" if isinstance(self.weights, Mapping) else f"ImageReward-v1 {self.weights or REPOSITORY}"
        return RewardSpec("ImageReward", gradient="exact", prompts=True, version=version)

    @cached_property
    @lasting()
    def network(self) -> tuple[nn.Module, Tensor, float]:
        """The towers {vision, text} and the head as w `[768]` and b, read when first needed."""
        weights = self.weights
        if not isinstance(weights, Mapping):
            weights = read_weights(weights_file(weights, REPOSITORY, FILE, download=self.download))
        towers = _towers(weights)
        layers = rating_head(_with_prefix("mlp.layers.", weights)).layers
        if len(layers) > 1:
            raise RewardError(
                "ImageReward's head has no ReLU, and these weights are numbered as if; pass the official file"
            )
        return towers, layers[0][0][0], float(layers[0][1])

    @cached_property
    def tokens(self) -> Callable[[str], dict[str, Tensor]]:
        """A function from a prompt to its token ids and mask `[35]`, cached for the 256 most recent prompts."""
        tokenizer = self.tokenizer
        if isinstance(tokenizer, str):
            bert = optional_package("transformers", "clip").BertTokenizerFast
            loaded = from_hub(bert, tokenizer, download=self.download)
            tokenizer = partial(loaded, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        return lru_cache(256)(lambda prompt: {key: ids[0] for key, ids in tokenizer([prompt]).items()})

    @scores_in_full
    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        check_prompts(prompts, len(samples), "ImageReward")
        towers, weight, offset = self.network
        towers, dtype = move_to(towers, samples.device)
        side = towers["vision"].config.image_size
        pixels = clip_pixels(samples, "ImageReward", side=side).to(dtype)
        if not len(samples):  # networks cannot reshape an empty batch
            return pixels.sum((1, 2, 3))
        image_states = towers["vision"](pixel_values=pixels).last_hidden_state
        device = image_states.device
        tokens = [self.tokens(prompt) for prompt in prompts]
        text_states = towers["text"](
            input_ids=torch.stack([each["input_ids"] for each in tokens]).to(device),
            attention_mask=torch.stack([each["attention_mask"] for each in tokens]).to(device),
            encoder_hidden_states=image_states,
            encoder_attention_mask=torch.ones(image_states.shape[:2], dtype=torch.long, device=device),
            is_decoder=False,
        ).last_hidden_state
        of_first_token = text_states[:, 0]
        return (torch.mv(of_first_token, weight.to(of_first_token)) + offset - MEAN) / STD


def _towers(weights: Mapping[str, Tensor]) -> nn.Module:
    """BLIP's vision and text towers with these weights. Their sizes follow from the weights' shapes."""
    blip = optional_package("transformers.models.blip", "clip")
    vision, text = _with_prefix("blip.visual_encoder.", weights), _with_prefix("blip.text_encoder.", weights)
    text.pop("embeddings.position_ids", None)
    try:
        vision_config = _vision_config(blip, vision)
        text_config = _text_config(blip, text, vision_config.hidden_size)
    except KeyError as error:
        raise RewardError(
            f"these are no weights of ImageReward: {error} is missing; pass the official ImageReward.pt or a copy"
        ) from error
    towers = nn.ModuleDict(
        {
            "vision": blip.BlipVisionModel(vision_config),
            "text": blip.BlipTextModel(text_config, add_pooling_layer=False),
        }
    ).to(next(iter(vision.values())).dtype)
    vision = {_name_in_transformers(key): value for key, value in vision.items()}
    load_into(towers["vision"], vision, "ImageReward's image tower")
    load_into(towers["text"], text, "ImageReward's text tower")
    return freeze(towers)


def _vision_config(blip: Any, weights: Mapping[str, Tensor]) -> Any:
    """Sizes of the vision tower. Attention heads have 64 channels."""
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    patches_a_side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)  # one position is the class token's
    return blip.BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
        image_size=patch * patches_a_side,
        patch_size=patch,
        num_hidden_layers=_number_of_layers("blocks.", weights),
        num_attention_heads=width // 64,
        layer_norm_eps=1e-6,
    )


def _text_config(blip: Any, weights: Mapping[str, Tensor], vision_width: int) -> Any:
    """Sizes of the text tower. Attention heads have 64 channels."""
    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    return blip.BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=vision_width,
        num_attention_heads=width // 64,
        intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_number_of_layers("encoder.layer.", weights),
        layer_norm_eps=1e-12,
        max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        is_decoder=True,
    )


def _with_prefix(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights whose names have the prefix, by the rest of the name."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _number_of_layers(prefix: str, weights: Mapping[str, Tensor]) -> int:
    """One more than the highest number that follows the prefix in a name."""
    return 1 + max(int(key.removeprefix(prefix).partition(".")[0]) for key in weights if key.startswith(prefix))


def _name_in_transformers(key: str) -> str:
    """The name in transformers of an official weight of the vision tower."""
    key = f"post_layernorm.{key.removeprefix('norm.')}" if key.startswith("norm.") else key
    for official, ours in NAMES_IN_TRANSFORMERS:
        key = key.replace(official, ours)
    return key
