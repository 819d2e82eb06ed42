"""HPSv2.1: a CLIP trained on which of two images of a prompt people prefer."""

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
from .weights import weights_file

REPOSITORY, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"


@dataclass(frozen=True, eq=False)
class HPS:
    """cos(image, prompt) by the network of HPSv2.1.

    Called with images `[M, 3, H, W]` in [0, 1] and M prompts. Weights are read at the first call. Prompts are cut to
    77 tokens, end token kept. Compare images of one prompt only, and never v2.0 with v2.1: their means differ by more
    than methods do.

    Args:
        weights: the path of the official file or of a copy in safetensors, read as tensors only; None for the hub's
            cache (xswu/HPSv2).
        download: whether to fetch what is not in the hub's cache.
        model: a name of open_clip's, or a network of it, which is then frozen in place.
        tokenizer: as in `CLIPScore`.

    Returns:
        Scores `[M]`, cosines, usually 0.2 to 0.35 (tables print them times 100), float32. The gradient is exact.

    Raises:
        RewardError: for absent packages, weights or prompts, and values outside [0, 1].
        ShapeError: for samples of another shape.

    Cost: one ViT-H/14 pass an image (335 GFLOP), 4 GB of weights; one text pass a distinct prompt, 256 are cached.
    Source: Wu et al. 2023, "Human Preference Score v2", arXiv 2306.09341; github.com/tgxs002/HPSv2 (Apache-2.0).
        Images that are not square are fitted whole between black bars, as the official package does, whose resizing of
        tensors this repeats (antialiased, as torchvision does since 0.17).
    Differs: the official package gives no gradient, and computes under float16 autocast, where cosines near 0.3 are
        0.0002 apart: ours has no ties.
    """

    weights: str | os.PathLike[str] | None = None
    download: bool = False
    model: str | nn.Module = "ViT-H-14"
    tokenizer: Callable[[list[str]], Any] | None = None

    @property
    def spec(self) -> RewardSpec:
        """Unit, bounds, gradient and version of the scores."""
        version = f"HPSv2.1 {self.weights or REPOSITORY}" if isinstance(self.model, str) else ""
        return RewardSpec("cos", (-1.0, 1.0), "exact", prompts=True, version=version)

    @cached_property
    @lasting()
    def network(self) -> CLIPNetwork:
        """The network, read when first needed."""
        if isinstance(self.model, nn.Module):
            return from_open_clip(self.model, "", self.tokenizer, "HPS", fit="pad")
        path = weights_file(self.weights, REPOSITORY, FILE, download=self.download)
        return from_open_clip(self.model, path, self.tokenizer, "HPS", fit="pad")

    @scores_in_full
    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        return self.network.similarity(samples, prompts)
