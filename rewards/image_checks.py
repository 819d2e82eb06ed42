"""Checks of images: their layout, their shape, and that their values lie in [0, 1]."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from steer.errors import RewardError, ShapeError

TOLERANCE = 1e-3
"""How far outside [0, 1] rounding may leave a pixel."""


def check_images(samples: Tensor, name: str, *, channels: tuple[int, ...] = (), side: int | None = None) -> Tensor:
    """Images in at least float32, their shape checked.

    Values are not checked: reading them would stall the device, and predictions of x_0 may overshoot [0, 1] where a
    decoder does not clamp. Integers are refused: they count levels up to 255.

    Args:
        samples: `[M, C, H, W]`.
        name: of the reward, for the message.
        channels: the allowed C; any if empty.
        side: the required H and W; any if None.

    Returns:
        `[M, C, H, W]`, float32 or float64.

    Raises:
        ShapeError: where the shape is not what the reward reads.
        RewardError: for integers.
    """
    if not samples.is_floating_point():
        raise RewardError(
            f"{name} reads images in [0, 1], got {samples.dtype}; divide 8-bit levels by 255: images.float() / 255"
        )
    shape = tuple(samples.shape)
    if (
        len(shape) != 4
        or 0 in shape[1:]
        or (channels and shape[1] not in channels)
        or (side and shape[2:] != (side, side))
    ):
        wanted = f"(M, {' or '.join(map(str, channels)) or 'C'}, {side or 'H'}, {side or 'W'})"
        cure = "give the process a decoder that makes such images"
        if len(shape) == 5:
            cure = "score the frames of a video by rewards.per_frame(reward), on the command line frames:NAME"
        raise ShapeError(f"{name} reads images of shape {wanted}, got {shape}; {cure}")
    return samples.to(torch.promote_types(samples.dtype, torch.float32))


def from_any_layout(images: Any, name: str) -> Tensor:
    """Images as trainers have them, in the form that rewards read.

    Args:
        images: M images of 1 or 3 channels, channels first or last: a float tensor in [0, 1], or a tensor or array of
            uint8. Where both axes could be channels, they are first in a tensor and last in an array.
        name: of the reward, for the message.

    Returns:
        `[M, 1 or 3, H, W]` in [0, 1], at least float32; memory of its own where anything was converted.

    Raises:
        ShapeError: for another shape, such as RGBA, and for arrays of other numbers.
        RewardError: for values that are NaN or outside [0, 1], and for tensors of other integers.
    """
    try:
        pixels = (images if isinstance(images, Tensor) else torch.as_tensor(images)).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            f"{name} takes a tensor (M, C, H, W) in [0, 1] or an array (M, H, W, C) of uint8, got a "
            f"{type(images).__name__}; rewards of PIL images are made by rewards.from_pil"
        ) from error
    if pixels.dtype != torch.uint8 and not isinstance(images, Tensor):
        raise ShapeError(
            f"{name} takes a tensor in [0, 1] or an array of uint8, got an array of {pixels.dtype}; make it a tensor "
            "(M, C, H, W)"
        )
    first, last = (pixels.ndim == 4 and pixels.shape[axis] in (1, 3) for axis in (1, 3))
    if not first and not last:
        raise ShapeError(
            f"{name} takes images (M, C, H, W) or (M, H, W, C) of 1 or 3 channels, got {tuple(pixels.shape)}; add a "
            "leading axis to a single image, and drop an alpha channel"
        )
    if last and not (first and isinstance(images, Tensor)):
        pixels = pixels.movedim(-1, 1)
    pixels = pixels.float().div(255) if pixels.dtype == torch.uint8 else check_images(pixels, name)
    check_range(pixels, name, nan_passes=False)
    return pixels


def check_range(images: Tensor, name: str, *, nan_passes: bool = True) -> None:
    """RewardError where a value lies further outside [0, 1] than rounding leaves it.

    This reads the values from the device. It is meant for rewards beside whose cost that is nothing: files and
    pretrained networks.

    Args:
        images: `[M, C, H, W]`.
        name: of the reward, for the message.
        nan_passes: whether NaN is accepted.

    Raises:
        RewardError: giving the range of the values.
    """
    if not images.numel():
        return
    low, high = torch.stack(images.detach().aminmax()).tolist()  # both NaN where any value is
    outside = low < -TOLERANCE or high > 1 + TOLERANCE
    if outside or (math.isnan(low) and not nan_passes):
        raise RewardError(
            f"{name} needs images in [0, 1], got values in [{low:.4g}, {high:.4g}]; map and clamp them in the "
            "process's decoder"
        )
