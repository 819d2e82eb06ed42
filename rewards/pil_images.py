"""Conversions between image tensors in [0, 1], PIL images, and PNG files."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.errors import RewardError

from .image_checks import check_images, check_range
from .scoring import refuse_gradient

if TYPE_CHECKING:
    from PIL.Image import Image


def to_pictures(samples: Tensor, name: str) -> list[Image]:
    """PIL images, grey or RGB, rounded to 8 bits.

    Args:
        samples: images `[M, 1 or 3, H, W]` in [0, 1].
        name: of the reward, for messages.

    Returns:
        M PIL images.

    Raises:
        ShapeError: for samples of another shape.
        RewardError: for pixels that are NaN or outside [0, 1]; nothing is clamped.
        NotDifferentiableError: where a gradient is requested, since rounding has none.
    """
    refuse_gradient(samples, name)
    images = check_images(samples, name, channels=(1, 3)).detach()
    check_range(images, name, nan_passes=False)
    return eight_bit_pictures(images)


def to_rgb(samples: Tensor, name: str) -> list[Image]:
    """As `to_pictures`, always RGB.

    Args:
        samples: images `[M, 1 or 3, H, W]` in [0, 1].
        name: of the reward, for messages.

    Returns:
        M PIL images, RGB.

    Raises:
        ShapeError, RewardError, NotDifferentiableError: as `to_pictures`.
    """
    return [picture.convert("RGB") for picture in to_pictures(samples, name)]


def eight_bit_pictures(images: Tensor) -> list[Image]:
    """PIL images of images that were checked before, rounded to 8 bits.

    Args:
        images: `[M, 1 or 3, H, W]` in [0, 1].

    Returns:
        M PIL images, grey or RGB.
    """
    from PIL import Image

    levels = images.mul(255).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(level.squeeze(2).numpy()) for level in levels]


def to_png(picture: Image) -> bytes:
    """A picture as a PNG file, which is lossless.

    Args:
        picture: a PIL image.

    Returns:
        The file. It is lightly compressed: encoding time matters more than size here.
    """
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def png_shape(data: bytes) -> tuple[int, int, int]:
    """The shape of an 8-bit grey or RGB PNG file, read from its header alone: nothing is decoded.

    Args:
        data: the file.

    Returns:
        (channels, height, width).

    Raises:
        RewardError: for anything but an 8-bit grey or RGB PNG file.
    """
    channels_of = {(8, 0): 1, (8, 2): 3}  # by bit depth and color type
    if len(data) < 33 or data[:16] != b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR":
        raise RewardError(
            f"expected a PNG file, got {len(data)} bytes that do not begin like one; encode samples with rewards.Remote"
        )
    width, height, depth, color = struct.unpack(">IIBB", data[16:26])
    if (depth, color) not in channels_of or not width or not height:
        raise RewardError(
            f"expected an 8-bit grey or RGB PNG file, got {width} x {height} pixels, bit depth {depth} and color "
            f"type {color}; convert it first"
        )
    return channels_of[depth, color], height, width


def from_png(data: bytes) -> Tensor:
    """The image of a PNG file. Call `png_shape` first to see whether it is small enough.

    Args:
        data: an 8-bit grey or RGB PNG file.

    Returns:
        `[C, H, W]` in [0, 1], float32.

    Raises:
        RewardError: for a file that cannot be decoded.
    """
    from PIL import Image

    channels, height, width = png_shape(data)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            raw = picture.tobytes()
    except Exception as error:  # whatever a broken file makes the decoder raise
        raise RewardError(
            f"expected a whole PNG file, got one that cannot be decoded ({error}); send it again"
        ) from error
    if len(raw) != channels * height * width:
        raise RewardError(
            f"expected {channels * height * width} bytes of pixels in a PNG file, got {len(raw)}; save it as 8-bit "
            "grey or RGB"
        )
    levels = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(height, width, channels)
    return levels.permute(2, 0, 1).contiguous().float().div_(255)  # one copy in float32, not three


def crop(picture: Image, box: Any) -> Image:
    """The part of a picture inside a box.

    Args:
        picture: a PIL image.
        box: (left, top, right, bottom) in pixels; rounded, and cut to the picture.

    Returns:
        A PIL image, at least one pixel wide and high.
    """
    left, top, right, bottom = (round(float(side)) for side in box)
    left, top = min(max(left, 0), picture.width - 1), min(max(top, 0), picture.height - 1)
    right, bottom = max(min(right, picture.width), left + 1), max(min(bottom, picture.height), top + 1)
    return picture.crop((left, top, right, bottom))
