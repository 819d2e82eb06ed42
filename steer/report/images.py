"""Samples as pictures: PIL images, grids one can read, PNG bytes."""

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
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def is_images(decoded: Tensor) -> bool:
    """Whether decoded samples are images: floats (M, C, H, W) with 1, 3 or 4 channels."""
    return decoded.ndim == 4 and decoded.shape[1] in _MODES and decoded.is_floating_point()


def to_images(decoded: Tensor) -> list[Image]:
    """PIL images of samples (M, C, H, W) in [0, 1]; what lies outside, as networks produce, is shown as 0 or 1."""
    from PIL import Image

    if not is_images(decoded):
        raise ShapeError(
            f"pictures are made from floats of shape (M, C, H, W) with C = 1, 3 or 4, got {decoded.dtype} of shape "
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

    pictures: samples (M, C, H, W) in [0, 1], or PIL images of one size.
    columns:  per row; None: as square as possible.
    least:    small images are enlarged, pixels kept sharp, until their short side has this many pixels.
    gap:      width of the separators.
    """
    from PIL import Image

    tiles = [enlarged(image, least) for image in (to_images(pictures) if isinstance(pictures, Tensor) else pictures)]
    if not tiles:
        raise ShapeError("a grid needs at least one picture, got none")
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    columns = min(columns, len(tiles))
    width, height = tiles[0].size
    colour = SEPARATOR if tiles[0].mode == "L" else (SEPARATOR,) * 3 + (255,) * (tiles[0].mode == "RGBA")
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
    """A PNG of the samples of largest weight, at most `most` per problem; None where samples are no images.

    Samples of weight zero (what a search did not choose) are left out.
    """
    weighted = int((result.log_weight > -torch.inf).sum(1).min())
    order = result.log_weight.argsort(dim=1, descending=True, stable=True)
    chosen = result.take(order[:, : min(most, max(1, weighted))])
    if not is_images(chosen.decoded):
        return None
    problems, count = chosen.reward.shape
    return to_png(grid(chosen.decoded, columns=None if problems == 1 else count))
