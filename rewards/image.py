"""Rewards of an image alone: how much ink it has, how symmetric it is, how well it compresses."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steer.errors import RewardError, ShapeError

_TOLERANCE = 1e-3
"""How far outside [0, 1] rounding may leave a pixel."""


@dataclass(frozen=True)
class Ink:
    """Mean brightness of images (M, C, H, W): in [0, 1] for images in [0, 1], differentiable.

    The embedded digits are 1 where there is ink. Higher is more ink; weigh it by -1 for less.
    """

    unit: ClassVar[str] = "1"

    def __call__(self, samples: Tensor) -> Tensor:
        return pixels(samples, "Ink").mean((1, 2, 3))


@dataclass(frozen=True)
class Symmetry:
    """Minus the mean absolute difference of images (M, C, H, W) and their mirror images, differentiable.

    0 is symmetric, and -1 the least possible for images in [0, 1].
    axis: "horizontal" swaps left and right, "vertical" swaps top and bottom.
    """

    axis: Literal["horizontal", "vertical"] = "horizontal"
    unit: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        if self.axis not in ("horizontal", "vertical"):
            raise RewardError(f"Symmetry(axis=...) is 'horizontal' or 'vertical', got {self.axis!r}")

    def __call__(self, samples: Tensor) -> Tensor:
        images = pixels(samples, "Symmetry")
        mirrored = images.flip(3 if self.axis == "horizontal" else 2)
        return -(images - mirrored).abs().mean((1, 2, 3))


@dataclass(frozen=True)
class JPEGSize:
    """sign times the size in kB (1000 bytes) of each image as a JPEG file. Not differentiable.

    Images are (M, 1 or 3, H, W) in [0, 1]. They are rounded to 8 bits, and those whose short side has fewer than
    `size` pixels are enlarged by the smallest sufficient whole factor with bicubic interpolation: an 8x8 file is 85%
    header, and enlarging by nearest neighbour makes every 8x8 block of the file constant, which hides texture (at
    64x64 the embedded digits take 1349 ± 82 bytes bicubic, 448 ± 7 nearest).

    quality: 1 to 100, as in Pillow. sign: -1 rewards compressible images (small files), +1 incompressible ones.
    Scores are float32 on the images' device and never carry a gradient. A NaN pixel gives NaN. Raises RewardError for
    pixels outside [0, 1]: nothing is clamped, as an image in another range has another file.
    Source: the compressibility reward of Black et al. 2024 (DDPO); Pillow at quality 95, as in SVDD and DAS.
    """

    quality: int = 95
    size: int = 64
    sign: int = -1
    unit: ClassVar[str] = "kB"

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100 or self.size < 1 or self.sign not in (-1, 1):
            raise RewardError(
                "JPEGSize takes quality 1 to 100, size of at least 1 pixel, and sign -1 (small files) or 1, got "
                f"quality={self.quality}, size={self.size}, sign={self.sign}"
            )

    def __call__(self, samples: Tensor) -> Tensor:
        images = pixels(samples, "JPEGSize", channels=(1, 3)).detach().cpu()
        kilobytes = [self._bytes(image) / 1000 for image in images]
        return self.sign * torch.tensor(kilobytes, dtype=torch.float32, device=samples.device)

    def _bytes(self, image: Tensor) -> float:
        from PIL import Image

        if bool(image.isnan().any()):
            return float("nan")
        low, high = image.min().item(), image.max().item()
        if low < -_TOLERANCE or high > 1 + _TOLERANCE:
            raise RewardError(
                f"JPEGSize needs images in [0, 1], got values in [{low:.4g}, {high:.4g}]; map and clamp them in the "
                "process's decoder"
            )
        levels = image.mul(255).round().clamp(0, 255).to(torch.uint8)
        picture = Image.fromarray((levels[0] if len(levels) == 1 else levels.permute(1, 2, 0)).numpy())
        factor = -(-self.size // min(picture.size))
        if factor > 1:
            picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=self.quality)
        return file.tell()


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
