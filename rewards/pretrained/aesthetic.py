"""The LAION aesthetic predictor, version 2: a linear map of an image's CLIP embedding to a rating of its beauty."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from steer.torch_modes import lasting, scores_in_full
from steer.types import RewardSpec

from .clip_network import CLIPNetwork, from_open_clip
from .weights import RatingHead, rating_head, read_weights, weights_file

REPOSITORY, FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"


@dataclass(frozen=True, eq=False)
class Aesthetic:
    """The rating, about 1 to 10, that the LAION predictor v2 gives an image.

    Called with images `[M, 3, H, W]` in [0, 1]. Weights are read at the first call.

    Args:
        head: the path of `sac+logos+ava1-l14-linearMSE.pth` or a state dict of it ("layers.0.weight" ...); None for a
            copy in the hub's cache (trl-lib/ddpo-aesthetic-predictor). Five linear layers with dropout and no
            activations between: in evaluation mode one affine map of the unit embedding, and kept as that. The same
            repository's heads with ReLU (`ava+logos-l14-reluMSE.pth`) are known by the numbers of their layers.
        download: whether to fetch what is not in the hub's cache.
        model: the CLIP it was trained on: a name of open_clip's, or a network, which is then frozen in place.
        weights: of that CLIP: a tag of open_clip's, or the path of a file.

    Returns:
        Scores `[M]`, float32, of no unit that other rewards share. The gradient is exact; followed far it leads to
        saturated painterly textures, so report a second reward beside it.

    Raises:
        RewardError: for absent packages or weights, a head of another kind or width, and values outside [0, 1].
        ShapeError: for samples of another shape.

    Cost: one ViT-L/14 pass an image (162 GFLOP), 1.7 GB of weights.
    Source: Schuhmann 2022, github.com/christophschuhmann/improved-aesthetic-predictor (Apache-2.0); used in Schuhmann
        et al. 2022, "LAION-5B", NeurIPS.
    """

    head: str | os.PathLike[str] | Mapping[str, Tensor] | None = None
    download: bool = False
    model: str | nn.Module = "ViT-L-14-quickgelu"
    weights: str | os.PathLike[str] = "openai"

    @property
    def spec(self) -> RewardSpec:
        """Unit, gradient and version of the scores."""
        by_name = isinstance(self.model, str) and not isinstance(self.head, Mapping)
        version = f"aesthetic-v2 {self.head or REPOSITORY} {self.model} {self.weights}" if by_name else ""
        return RewardSpec("aesthetic", gradient="exact", version=version)

    @cached_property
    @lasting()
    def network(self) -> CLIPNetwork:
        """The CLIP network, read when first needed."""
        return from_open_clip(self.model, self.weights, None, "Aesthetic", download=self.download)

    @cached_property
    @lasting()
    def rating(self) -> RatingHead:
        """The head, read when first needed."""
        layers = self.head
        if not isinstance(layers, Mapping):
            layers = read_weights(weights_file(layers, REPOSITORY, FILE, download=self.download))
        return rating_head({key.removeprefix("layers."): value for key, value in layers.items()})

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        rating = self.rating
        return rating(self.network.images(samples), "Aesthetic")
