"""How many bytes an image takes: rewards for images that compress well, or badly."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.types import RewardSpec

from .pixel_statistics import check_range, pixels
from .scoring import refuse_gradient

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class JPEGSize:
    """sign times the size in kB (1000 bytes) of each image as a JPEG file. Not differentiable.

    Images are (M, 1 or 3, H, W) in [0, 1]. They are rounded to 8 bits, and those whose short side has fewer than
    `size` pixels are enlarged by the smallest sufficient whole factor with bicubic interpolation: an 8x8 file is 85%
    header, and enlarging by nearest neighbour makes every 8x8 block of the file constant, which hides texture (at
    64x64 the embedded digits take 1349 ± 82 bytes bicubic, 448 ± 7 nearest).

    quality: 1 to 100, as in Pillow. sign: -1 rewards compressible images (small files), +1 incompressible ones.
    Scores are float32 on the images' device. A NaN pixel gives NaN. Raises RewardError for pixels outside [0, 1]
    (nothing is clamped, as an image in another range has another file), NotDifferentiableError where a gradient is
    recorded.
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
        pictures = _pictures(samples, "JPEGSize")
        enlarged = [picture and _at_least(picture, self.size) for picture in pictures]
        return self.sign * _kilobytes(enlarged, samples.device, format="JPEG", quality=self.quality)


@dataclass(frozen=True)
class PNGSize:
    """sign times the size in kB (1000 bytes) of each image as a PNG file. Not differentiable.

    Lossless, so that every grey level of noise counts: JPEG throws the faintest away. Images, sign, scores and errors
    are as in `JPEGSize`; nothing is enlarged (the header of a PNG takes 57 bytes).
    level: 0 to 9, how hard zlib tries. Scores depend on the zlib that Pillow was built with, by a few bytes.
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
        pictures = _pictures(samples, "PNGSize")
        return self.sign * _kilobytes(pictures, samples.device, format="PNG", compress_level=self.level)


def _pictures(samples: Tensor, name: str) -> list[Image | None]:
    """8-bit pictures of images (M, 1 or 3, H, W) in [0, 1]; None for one with a NaN."""
    from PIL import Image

    refuse_gradient(samples, name)
    images = pixels(samples, name, channels=(1, 3)).cpu()
    known = ~images.isnan().flatten(1).any(1)
    check_range(images[known], name)
    levels = images.mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    levels = (levels.squeeze(3) if images.shape[1] == 1 else levels).numpy()
    return [Image.fromarray(level) if ok else None for level, ok in zip(levels, known.tolist(), strict=True)]


def _at_least(picture: Image, size: int) -> Image:
    from PIL.Image import Resampling

    factor = -(-size // min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Resampling.BICUBIC)


def _kilobytes(pictures: list[Image | None], device: torch.device, **options: str | int) -> Tensor:
    def kilobytes(picture: Image) -> float:
        file = io.BytesIO()
        picture.save(file, **options)  # pyright: ignore[reportArgumentType]
        return file.getbuffer().nbytes / 1000

    sizes = [float("nan") if picture is None else kilobytes(picture) for picture in pictures]
    return torch.tensor(sizes, dtype=torch.float32, device=device)
