"""Between tensors in [0, 1] and 8-bit pictures: PIL images for processors, PNG files for the network."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.errors import RewardError

from .pixel_statistics import pixels
from .scoring import refuse_gradient

if TYPE_CHECKING:
    from PIL.Image import Image

TOLERANCE = 1e-3
"""How far outside [0, 1] rounding may leave a pixel."""


def to_pictures(samples: Tensor, name: str) -> list[Image]:
    """PIL images, grey or RGB, of images (M, 1 or 3, H, W) in [0, 1], rounded to 8 bits.

    Raises ShapeError for other shapes, RewardError for pixels that are NaN or outside [0, 1] (nothing is clamped), and
    NotDifferentiableError where a gradient is recorded, which ends here.
    """
    from PIL import Image

    refuse_gradient(samples, name)
    images = pixels(samples, name, channels=(1, 3)).detach()
    if images.numel():
        low, high = images.min().item(), images.max().item()
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
            raise RewardError(
                f"{name} needs images in [0, 1], got values in [{low:.4g}, {high:.4g}]; map and clamp them in the "
                "process's decoder"
            )
    levels = images.mul(255).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(level.squeeze(2).numpy()) for level in levels]


def to_rgb(samples: Tensor, name: str) -> list[Image]:
    """As `to_pictures`, always RGB."""
    return [picture.convert("RGB") for picture in to_pictures(samples, name)]


def to_png(picture: Image) -> bytes:
    """The picture as a PNG file, which loses nothing. Compressed a little: the network is rarely the bottleneck."""
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def png_shape(data: bytes) -> tuple[int, int, int]:
    """(channels, height, width) of an 8-bit grey or RGB PNG file, read off its header alone: nothing is decoded."""
    kinds = {(8, 0): 1, (8, 2): 3}
    if len(data) < 33 or data[:16] != b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR":
        raise RewardError(f"expected a PNG file, got {len(data)} bytes that do not begin like one")
    width, height, depth, color = struct.unpack(">IIBB", data[16:26])
    if (depth, color) not in kinds or not width or not height:
        raise RewardError(
            f"expected an 8-bit grey or RGB PNG file, got {width} x {height} pixels, bit depth {depth} and color "
            f"type {color}"
        )
    return kinds[depth, color], height, width


def from_png(data: bytes) -> Tensor:
    """The image (C, H, W) in [0, 1], float32, of a PNG file. Ask `png_shape` first whether it is small enough."""
    from PIL import Image

    channels, height, width = png_shape(data)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            raw = picture.tobytes()
    except Exception as error:  # whatever a broken file makes the decoder raise
        raise RewardError(f"expected a PNG file, got one that cannot be decoded: {error}") from error
    if len(raw) != channels * height * width:
        raise RewardError(f"expected {channels * height * width} bytes of pixels in a PNG file, got {len(raw)}")
    levels = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(height, width, channels)
    return levels.permute(2, 0, 1).float().div(255).contiguous()


def crop(picture: Image, box: Any) -> Image:
    """The part of a picture inside a box (x1, y1, x2, y2) in pixels, at least one pixel wide and high."""
    left, top, right, bottom = (round(float(side)) for side in box)
    left, top = min(max(left, 0), picture.width - 1), min(max(top, 0), picture.height - 1)
    return picture.crop(
        (left, top, max(min(right, picture.width), left + 1), max(min(bottom, picture.height), top + 1))
    )
