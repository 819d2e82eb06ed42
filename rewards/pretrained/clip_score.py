"""CLIPScore: how well an image fits its prompt, by the cosine of CLIP embeddings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from steer.torch_modes import lasting, scores_in_full
from steer.types import RewardSpec

from .clip_network import CLIPNetwork, from_open_clip


@dataclass(frozen=True, eq=False)
class CLIPScore:
    """2.5 max(cos(image, "A photo depicts " + prompt), 0).

    Called with images `[M, 3, H, W]` in [0, 1] and M prompts. Weights are read at the first call. Prompts are cut to
    77 tokens, end token kept.

    Args:
        model: a name of open_clip's, or a network of it, which is then frozen in place.
        weights: a tag of open_clip's or the path of a file.
        download: whether to fetch what is not in the hub's cache.
        tokenizer: for a network whose vocabulary is not CLIP's: from a list of n strings to token ids `[n, 77]`.
        prefix: put before each prompt, as published.
        scale: factor on the cosine, as published.

    Returns:
        Scores `[M]` in [0, 2.5], usually 0.5 to 0.9, float32 (float64 for a float64 network). The gradient is exact,
        and 0 where the cosine is negative.

    Raises:
        RewardError: for absent packages, weights or prompts, and values outside [0, 1].
        ShapeError: for samples of another shape.

    Cost: one ViT-B/32 pass an image (8.8 GFLOP), 0.6 GB of weights; one text pass a distinct prompt, 256 are cached.
    Source: Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", EMNLP, eq. 1;
        github.com/jmhessel/clipscore (MIT). Network: Radford et al. 2021; github.com/openai/CLIP (MIT).
    Differs: from torchmetrics, which reports 100 max(cos, 0) of ViT-L/14 without a prefix.
    """

    model: str | nn.Module = "ViT-B-32-quickgelu"
    weights: str | os.PathLike[str] = "openai"
    download: bool = False
    tokenizer: Callable[[list[str]], Any] | None = None
    prefix: str = "A photo depicts "
    scale: float = 2.5

    @property
    def spec(self) -> RewardSpec:
        """Unit, bounds, gradient and version of the scores."""
        version = f"CLIPScore {self.model} {self.weights}" if isinstance(self.model, str) else ""
        return RewardSpec("CLIPScore", (0.0, self.scale), "exact", prompts=True, version=version)

    @cached_property
    @lasting()
    def network(self) -> CLIPNetwork:
        """The network, read when first needed."""
        return from_open_clip(self.model, self.weights, self.tokenizer, "CLIPScore", download=self.download)

    @scores_in_full
    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        return self.scale * self.network.similarity(samples, prompts, self.prefix).clamp(min=0.0)
