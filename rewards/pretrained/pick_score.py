"""PickScore: a CLIP trained on what users of Pick-a-Pic chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from steer.types import RewardSpec

from .clip_network import CLIPNetwork, from_transformers

MODEL, TOKENIZER = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass(frozen=True, eq=False)
class PickScore:
    """exp(logit_scale) cos(image, prompt) by PickScore v1, of images (M, 3, H, W) in [0, 1] and their prompts (M).

    model, tokenizer: hub ids or folders, or a transformers CLIPModel (then frozen in place) and a function from a list
        of strings to `input_ids` and `attention_mask`. Read at the first call, safetensors only; nothing is
        downloaded unless download=True.

    Scores (M,) are logits, usually 18 to 24, in float32; the probability that a is preferred to b, of one prompt, is
    the sigmoid of the difference. Some code divides by 26 to be near 1: weigh it by 1/26 here. The gradient is exact.
    Prompts are cut to 77 tokens, end token kept.
    Cost: one ViT-H/14 pass an image (335 GFLOP), 4 GB of weights; one text pass a distinct prompt, 256 are kept.
    Errors as in `CLIPScore`.

    Source: Kirstain et al. 2023, "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation",
    NeurIPS; github.com/yuvalkirstain/PickScore (MIT).
    """

    model: str | nn.Module = MODEL
    tokenizer: str | Callable[[list[str]], Any] = TOKENIZER
    download: bool = False

    @property
    def spec(self) -> RewardSpec:
        version = f"PickScore {self.model}" if isinstance(self.model, str) else ""
        return RewardSpec("logit", (-100.0, 100.0), "exact", prompts=True, version=version)

    @cached_property
    def network(self) -> CLIPNetwork:
        """The network, read when first needed."""
        return from_transformers(self.model, self.tokenizer, "PickScore", download=self.download)

    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        cosines = self.network.similarity(samples, prompts)
        scale: Any = self.network.network.logit_scale
        return scale.exp() * cosines
