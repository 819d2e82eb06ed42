"""Checks of image tensors: their shape, and that their values lie in [0, 1]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steer.errors import RewardError, ShapeError

TOLERANCE = 1e-3
"""How far outside [0, 1] rounding may leave a pixel."""


def check_images(samples: Tensor, name: str, *, channels: tuple[int, ...] = (), side: int | None = None) -> Tensor:
    """Images in at least float32, their shape checked.

    Values are not checked: reading them would stall the device, and predictions of x_0 may overshoot [0, 1] where a
    decoder does not clamp.

    Args:
        samples: `[M, C, H, W]`.
        name: of the reward, for the message.
        channels: the allowed C; any if empty.
        side: the required H and W; any if None.

    Returns:
        `[M, C, H, W]`, float32 or float64.

    Raises:
        ShapeError: where the shape is not what the reward reads.
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
