"""Rewards of an image alone: how much ink it has, how symmetric, how sharp, how colourful it is."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steer.errors import RewardError, ShapeError
from steer.types import RewardSpec


@dataclass(frozen=True)
class Ink:
    """Mean brightness of images (M, C, H, W): in [0, 1] for images in [0, 1], differentiable.

    The embedded digits are 1 where there is ink. Higher is more ink; weigh it by -1 for less.
    """

    spec: ClassVar[RewardSpec] = RewardSpec("1", bounds=(0.0, 1.0), gradient="exact")

    def __call__(self, samples: Tensor) -> Tensor:
        return pixels(samples, "Ink").mean((1, 2, 3))


@dataclass(frozen=True)
class Symmetry:
    """Minus the mean absolute difference of images (M, C, H, W) and their mirror images, differentiable.

    0 is symmetric, and -1 the least possible for images in [0, 1].
    axis: "horizontal" swaps left and right, "vertical" swaps top and bottom.
    """

    axis: Literal["horizontal", "vertical"] = "horizontal"
    spec: ClassVar[RewardSpec] = RewardSpec("1", bounds=(-1.0, 0.0), gradient="exact")

    def __post_init__(self) -> None:
        if self.axis not in ("horizontal", "vertical"):
            raise RewardError(f"Symmetry(axis=...) is 'horizontal' or 'vertical', got {self.axis!r}")

    def __call__(self, samples: Tensor) -> Tensor:
        images = pixels(samples, "Symmetry")
        mirrored = images.flip(3 if self.axis == "horizontal" else 2)
        return -(images - mirrored).abs().mean((1, 2, 3))


@dataclass(frozen=True)
class Sharpness:
    """Variance of the Laplacian of the luminance of images (M, 1 or 3, H, W), H and W at least 2, differentiable.

    Higher is sharper, and noisier: the oldest measure of focus, meant for comparing pictures of one scene. Scores are
    at least 0 (an 8-bit image's is 1/255^2 of `cv2.Laplacian(grey, cv2.CV_64F).var()`, which has the same kernel,
    0 1 0 / 1 -4 1 / 0 1 0, and mirrors the border without repeating it).
    Source: Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy", LAPV in Pertuz et al. 2013.
    """

    spec: ClassVar[RewardSpec] = RewardSpec("1", bounds=(0.0, inf), gradient="exact")

    def __call__(self, samples: Tensor) -> Tensor:
        images = pixels(samples, "Sharpness", channels=(1, 3))
        if min(images.shape[2:]) < 2:
            raise ShapeError(f"Sharpness needs at least 2x2 pixels, got {tuple(images.shape)}")
        weight = images.new_tensor([0.299, 0.587, 0.114]) if images.shape[1] == 3 else images.new_ones(1)
        grey = torch.einsum("mchw,c->mhw", images, weight)
        grey = torch.nn.functional.pad(grey.unsqueeze(1), (1, 1, 1, 1), mode="reflect").squeeze(1)
        middle = grey[:, 1:-1, 1:-1]
        around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
        return (around - 4 * middle).var((1, 2), correction=0)


@dataclass(frozen=True)
class Saturation:
    """Mean saturation, (max - min) / max over the channels, of images (M, 3, H, W): in [0, 1] for images in [0, 1].

    0 is grey, 1 has a channel at 0 in every pixel. Differentiable but where two channels are equal; a black pixel
    counts as grey, and has no gradient. Source: the S of HSV (Smith 1978, "Color gamut transform pairs").
    """

    spec: ClassVar[RewardSpec] = RewardSpec("1", bounds=(0.0, 1.0), gradient="exact")

    def __call__(self, samples: Tensor) -> Tensor:
        images = pixels(samples, "Saturation", channels=(3,))
        high, low = images.amax(1), images.amin(1)
        lit = high > 0
        share = (high - low) / high.where(lit, 1.0)
        return share.where(lit, 0.0).mean((1, 2))


def pixels(samples: Tensor, name: str, *, channels: tuple[int, ...] = (), side: int | None = None) -> Tensor:
    """Images (M, C, H, W), checked, in at least float32; ShapeError where the shape is not what `name` reads.

    channels: the allowed C, any if empty. side: the required H and W, any if None. Values are not looked at: reading
    them would stall the device, and predictions of x_0 may overshoot [0, 1] where a decoder does not clamp.
    """
    shape = tuple(samples.shape)
    if (
        len(shape) != 4
        or 0 in shape[1:]
        or (channels and shape[1] not in channels)
        or (side and shape[2:] != (side, side))
    ):
        wanted = f"(M, {' or '.join(map(str, channels)) or 'C'}, {side or 'H'}, {side or 'W'})"
        raise ShapeError(
            f"{name} reads images of shape {wanted}, got {shape}; give the process a decoder that makes such images"
        )
    return samples.to(torch.promote_types(samples.dtype, torch.float32))


def check_range(images: Tensor, name: str, tolerance: float = 1e-3) -> None:
    """RewardError where a value lies further outside [0, 1] than rounding leaves it. NaN passes. Reads the values.

    Meant for rewards beside whose cost one read from the device is nothing: files and pretrained networks.
    """
    if not images.numel():
        return
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if low < -tolerance or high > 1 + tolerance:
        raise RewardError(
            f"{name} needs images in [0, 1], got values in [{low:.4g}, {high:.4g}]; map and clamp them in the "
            "process's decoder"
        )
