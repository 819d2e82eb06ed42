"""Samples as pictures: PIL images, grids of them, PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ShapeError
from .run_result import RunResult

if TYPE_CHECKING:
    from PIL.Image import Image


SEPARATOR = 128  # a grey that shows on dark and on light pictures
_SEPARATORS = {
    "L": SEPARATOR,
    "RGB": (SEPARATOR, SEPARATOR, SEPARATOR),
    "RGBA": (SEPARATOR, SEPARATOR, SEPARATOR, 255),
}
_CHANNELS = (1, 3, 4)


def is_images(decoded: Tensor) -> bool:
    """Whether decoded samples are images: floats [M, C, H, W] with 1, 3 or 4 channels."""
    return decoded.ndim == 4 and decoded.shape[1] in _CHANNELS and decoded.is_floating_point()


def to_images(decoded: Tensor) -> list[Image]:
    """Samples as PIL images.

    Args:
        decoded: [M, C, H, W] in [0, 1], C = 1, 3 or 4. Values outside, which networks do produce, are shown as 0 or 1.

    Returns:
        M images: grey, RGB or RGBA.

    Raises:
        ShapeError: The samples are no images.
    """
    from PIL import Image

    if not is_images(decoded):
        raise ShapeError(
            f"pictures need floats of shape (M, C, H, W) with C = 1, 3 or 4, got {decoded.dtype} of shape "
            f"{tuple(decoded.shape)}; give the process a decoder that returns images in [0, 1]"
        )
    levels = decoded.detach().float().clamp(0.0, 1.0).mul(255.0).round().to("cpu", torch.uint8)
    # Pillow reads the mode from the shape: (H, W) is grey, (H, W, 3) RGB, (H, W, 4) RGBA.
    return [Image.fromarray(level.permute(1, 2, 0).squeeze(2).numpy()) for level in levels]


def enlarged(image: Image, least: int = 48) -> Image:
    """The image with every pixel repeated, by the smallest whole factor that makes its short side `least` pixels."""
    from PIL import Image as pillow

    factor = math.ceil(least / min(image.size))
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), pillow.Resampling.NEAREST)


def grid(pictures: Tensor | Sequence[Image], columns: int | None = None, *, least: int = 48, gap: int = 2) -> Image:
    """One picture of many, row by row.

    Args:
        pictures: Samples [M, C, H, W] in [0, 1], or PIL images of one size.
        columns: Pictures per row; None for a grid as square as possible.
        least: Small images are enlarged, pixels kept sharp, until their short side has this many pixels.
        gap: Width of the separators, in pixels.

    Raises:
        ShapeError: There are no pictures, or samples that are no images.
    """
    from PIL import Image

    tiles = [enlarged(image, least) for image in (to_images(pictures) if isinstance(pictures, Tensor) else pictures)]
    if not tiles:
        raise ShapeError("a grid needs at least one picture, got none")
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    columns = min(columns, len(tiles))
    width, height = tiles[0].size
    colour = _SEPARATORS[tiles[0].mode]
    sheet = Image.new(tiles[0].mode, (columns * (width + gap) + gap, rows * (height + gap) + gap), colour)
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet


def to_png(image: Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def preview(result: RunResult, most: int = 16) -> bytes | None:
    """A PNG of the samples of largest weight, for notebooks.

    Args:
        result: The run.
        most: How many samples of each problem at most. Those of weight zero, which a search did not choose, are left
            out.

    Returns:
        A PNG file; None where samples are no images.
    """
    weighted = int((result.log_weight > -torch.inf).sum(1).min())
    order = result.log_weight.argsort(dim=1, descending=True, stable=True)
    chosen = result.take(order[:, : min(most, max(1, weighted))])
    if not is_images(chosen.decoded):
        return None
    problems, count = chosen.reward.shape
    return to_png(grid(chosen.decoded, columns=None if problems == 1 else count))
