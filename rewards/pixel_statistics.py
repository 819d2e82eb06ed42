"""Rewards computed from the pixels of an image: how much ink, how symmetric, how sharp, how colourful it is."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steer.errors import RewardError, ShapeError
from steer.torch_modes import scores_in_full
from steer.types import RewardSpec

from .image_checks import check_images


@dataclass(frozen=True)
class Ink:
    """Mean brightness of an image. The embedded digits are 1 where there is ink; weigh it by -1 for less of it.

    Called with images `[M, 1 or 3, H, W]`.

    Returns:
        Scores `[M]`, in [0, 1] for images in [0, 1]; differentiable.

    Raises:
        ShapeError: for samples of another shape.
    """

    spec: ClassVar[RewardSpec] = RewardSpec("1", bounds=(0.0, 1.0), gradient="exact")

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        return check_images(samples, "Ink", channels=(1, 3)).mean((1, 2, 3))


@dataclass(frozen=True)
class Symmetry:
    """Minus the mean absolute difference between an image and its mirror image.

    Called with images `[M, 1 or 3, H, W]`.

    Args:
        axis: "horizontal" swaps left and right, "vertical" swaps top and bottom.

    Returns:
        Scores `[M]`: 0 for a symmetric image, and at least -1 for images in [0, 1]; differentiable.

    Raises:
        RewardError: for another axis.
        ShapeError: for samples of another shape.
    """

    axis: Literal["horizontal", "vertical"] = "horizontal"
    spec: ClassVar[RewardSpec] = RewardSpec("1", bounds=(-1.0, 0.0), gradient="exact")

    def __post_init__(self) -> None:
        if self.axis not in ("horizontal", "vertical"):
            raise RewardError(f"Symmetry(axis=...) must be 'horizontal' or 'vertical', got {self.axis!r}")

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        images = check_images(samples, "Symmetry", channels=(1, 3))
        mirrored = images.flip(3 if self.axis == "horizontal" else 2)
        return -(images - mirrored).abs().mean((1, 2, 3))


@dataclass(frozen=True)
class Sharpness:
    """Variance of the Laplacian of the luminance: higher is sharper, and noisier.

    Called with images `[M, 1 or 3, H, W]`, H and W at least 2. It is the oldest measure of focus, meant for comparing
    pictures of one scene.

    Returns:
        Scores `[M]` >= 0; differentiable.

    Raises:
        ShapeError: for samples of another shape.

    Source: Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy"; LAPV in Pertuz et al. 2013.
    Differs: nothing but the scale from `cv2.Laplacian(grey, cv2.CV_64F).var()`: it has the same kernel,
        0 1 0 / 1 -4 1 / 0 1 0, and mirrors the border without repeating it. An image in [0, 1] scores 1/255^2 of what
        the same image in 8 bits does there.
    """

    spec: ClassVar[RewardSpec] = RewardSpec("1", bounds=(0.0, inf), gradient="exact")

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        images = check_images(samples, "Sharpness", channels=(1, 3))
        if min(images.shape[2:]) < 2:
            raise ShapeError(
                f"Sharpness needs at least 2x2 pixels, got {tuple(images.shape)}; its kernel reads the four neighbours"
            )
        weight = images.new_tensor([0.299, 0.587, 0.114]) if images.shape[1] == 3 else images.new_ones(1)
        grey = torch.einsum("mchw,c->mhw", images, weight)
        grey = torch.nn.functional.pad(grey.unsqueeze(1), (1, 1, 1, 1), mode="reflect").squeeze(1)
        center = grey[:, 1:-1, 1:-1]
        neighbours = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
        return (neighbours - 4 * center).var((1, 2), correction=0)


@dataclass(frozen=True)
class Saturation:
    """Mean saturation, (max - min) / max over the channels: 0 is grey, 1 has a channel at 0 in every pixel.

    Called with images `[M, 3, H, W]`. A black pixel counts as grey.

    Returns:
        Scores `[M]`, in [0, 1] for images in [0, 1]. Differentiable except where two channels are equal; a black pixel
        has no gradient.

    Raises:
        ShapeError: for samples of another shape.

    Source: the S of HSV (Smith 1978, "Color gamut transform pairs").
    """

    spec: ClassVar[RewardSpec] = RewardSpec("1", bounds=(0.0, 1.0), gradient="exact")

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        images = check_images(samples, "Saturation", channels=(3,))
        high, low = images.amax(1), images.amin(1)
        not_black = high > 0
        saturation = (high - low) / high.where(not_black, 1.0)
        return saturation.where(not_black, 0.0).mean((1, 2))
