"""PickScore: a CLIP trained on what users of Pick-a-Pic chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from steer.torch_modes import lasting, scores_in_full
from steer.types import RewardSpec

from .clip_network import CLIPNetwork, from_transformers

MODEL, TOKENIZER = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass(frozen=True, eq=False)
class PickScore:
    """exp(logit_scale) cos(image, prompt) by PickScore v1.

    Called with images `[M, 3, H, W]` in [0, 1] and M prompts. Weights are read at the first call, from safetensors
    only. Prompts are cut to 77 tokens, end token kept.

    Args:
        model: a hub id or folder, or a transformers CLIPModel, which is then frozen in place.
        tokenizer: a hub id or folder, or a function from a list of strings to `input_ids` and `attention_mask`.
        download: whether to fetch what is not in the hub's cache.

    Returns:
        Scores `[M]`, logits, usually 18 to 24, float32. The probability that a is preferred to b, of one prompt, is
        the sigmoid of the difference of their scores. Some code divides by 26 to be near 1: weigh it by 1/26 here. The
        gradient is exact.

    Raises:
        RewardError: for absent packages, weights or prompts, and values outside [0, 1].
        ShapeError: for samples of another shape.

    Cost: one ViT-H/14 pass an image (335 GFLOP), 4 GB of weights; one text pass a distinct prompt, 256 are cached.
    Source: Kirstain et al. 2023, "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation",
        NeurIPS; github.com/yuvalkirstain/PickScore (MIT).
    """

    model: str | nn.Module = MODEL
    tokenizer: str | Callable[[list[str]], Any] = TOKENIZER
    download: bool = False

    @property
    def spec(self) -> RewardSpec:
        """Unit, bounds, gradient and version of the scores."""
        version = f"PickScore {self.model}" if isinstance(self.model, str) else ""
        return RewardSpec("logit", (-100.0, 100.0), "exact", prompts=True, version=version)

    @cached_property
    @lasting()
    def network(self) -> CLIPNetwork:
        """The network, read when first needed."""
        return from_transformers(self.model, self.tokenizer, "PickScore", download=self.download)

    @scores_in_full
    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        cosines = self.network.similarity(samples, prompts)
        scale: Any = self.network.network.logit_scale
        return scale.exp() * cosines
