"""Rewards for images that compress well, or badly: the size of the image as a file."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.types import RewardSpec

from .image_checks import check_images, check_range
from .pil_images import eight_bit_pictures
from .scoring import refuse_gradient

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class JPEGSize:
    """The size in kB (1000 bytes) of an image as a JPEG file, times sign.

    Called with images `[M, 1 or 3, H, W]` in [0, 1]. They are rounded to 8 bits. Nothing is clamped, as an image in
    another range has another file.

    Args:
        quality: 1 to 100, as in Pillow.
        size: images whose short side has fewer pixels are enlarged by the smallest sufficient whole factor, with
            bicubic interpolation. An 8x8 file is 85% header, and enlarging by nearest neighbour makes every 8x8 block
            of the file constant, which hides texture (at 64x64 the embedded digits take 1349 ± 82 bytes bicubic,
            448 ± 7 nearest).
        sign: -1 rewards compressible images (small files), +1 incompressible ones.

    Returns:
        Scores `[M]` in kB, float32, on the images' device, without a gradient. A NaN pixel gives NaN.

    Raises:
        RewardError: for pixels outside [0, 1], and other arguments.
        ShapeError: for samples of another shape.
        NotDifferentiableError: where a gradient is requested.

    Source: the compressibility reward of Black et al. 2024 (DDPO); Pillow at quality 95, as in SVDD and DAS.
    """

    quality: int = 95
    size: int = 64
    sign: int = -1
    spec: ClassVar[RewardSpec] = RewardSpec("kB", gradient="none")

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100 or self.size < 1 or self.sign not in (-1, 1):
            raise RewardError(
                "JPEGSize takes quality 1 to 100, size of at least 1 pixel, and sign -1 (small files) or 1, got "
                f"quality={self.quality}, size={self.size}, sign={self.sign}"
            )

    def __call__(self, samples: Tensor) -> Tensor:
        pictures = _pictures_or_none(samples, "JPEGSize")
        enlarged = [None if picture is None else _enlarged(picture, self.size) for picture in pictures]
        return self.sign * _kilobytes(enlarged, samples.device, format="JPEG", quality=self.quality)


@dataclass(frozen=True)
class PNGSize:
    """The size in kB (1000 bytes) of an image as a PNG file, times sign.

    Called with images `[M, 1 or 3, H, W]` in [0, 1], rounded to 8 bits. PNG is lossless, so that every grey level of
    noise counts, where JPEG discards the faintest. Nothing is enlarged: the header takes 57 bytes only.

    Args:
        level: 0 to 9, how hard zlib tries. Scores depend on the zlib that Pillow was built with, by a few bytes.
        sign: -1 rewards small files, +1 large ones.

    Returns:
        Scores `[M]` in kB, float32, on the images' device, without a gradient. A NaN pixel gives NaN.

    Raises:
        RewardError: for pixels outside [0, 1], and other arguments.
        ShapeError: for samples of another shape.
        NotDifferentiableError: where a gradient is requested.
    """

    level: int = 9
    sign: int = -1
    spec: ClassVar[RewardSpec] = RewardSpec("kB", gradient="none")

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 9 or self.sign not in (-1, 1):
            raise RewardError(
                f"PNGSize takes level 0 to 9 and sign -1 (small files) or 1, got level={self.level}, sign={self.sign}"
            )

    def __call__(self, samples: Tensor) -> Tensor:
        pictures = _pictures_or_none(samples, "PNGSize")
        return self.sign * _kilobytes(pictures, samples.device, format="PNG", compress_level=self.level)


def _pictures_or_none(samples: Tensor, name: str) -> list[Image | None]:
    """8-bit pictures of images [M, 1 or 3, H, W] in [0, 1]; None for one with a NaN."""
    refuse_gradient(samples, name)
    images = check_images(samples, name, channels=(1, 3)).cpu()
    without_nan = ~images.isnan().flatten(1).any(1)
    check_range(images[without_nan], name)
    pictures = eight_bit_pictures(images)
    return [picture if ok else None for picture, ok in zip(pictures, without_nan.tolist(), strict=True)]


def _enlarged(picture: Image, size: int) -> Image:
    """The picture enlarged by a whole factor, until its short side has at least `size` pixels."""
    from PIL.Image import Resampling

    factor = -(-size // min(picture.size))  # rounded up
    return picture.resize((picture.width * factor, picture.height * factor), Resampling.BICUBIC)


def _kilobytes(pictures: list[Image | None], device: torch.device, **options: str | int) -> Tensor:
    """Sizes [M] of the pictures as files; NaN for None. options: for Pillow's `save`."""

    def kilobytes(picture: Image) -> float:
        file = io.BytesIO()
        picture.save(file, **options)  # pyright: ignore[reportArgumentType]
        return file.getbuffer().nbytes / 1000

    sizes = [float("nan") if picture is None else kilobytes(picture) for picture in pictures]
    return torch.tensor(sizes, dtype=torch.float32, device=device)
