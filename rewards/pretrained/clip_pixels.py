"""Images as CLIP networks read them: resized, cropped and normalised on the device, with gradients."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

from ..image_checks import check_images, check_range

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(samples: Tensor, name: str, *, side: int = 224, fit: Literal["crop", "pad"] = "crop") -> Tensor:
    """Images as a CLIP network reads them, differentiable.

    The check of the values reads two numbers from the device. Beside a network of billions of operations an image, and
    a sampler that reads every score, that costs nothing; and an image in [-1, 1] would get a plausible, wrong score.

    Args:
        samples: images `[M, 3, H, W]` in [0, 1]. Half precision is raised to float32; float64 stays.
        name: of the reward, for messages.
        side: pixels of the network's input.
        fit: "crop" is OpenAI's preprocessing, which open_clip and ImageReward share: short edge to side by antialiased
            bicubic interpolation, centre crop. "pad" is that of HPSv2: long edge to side, black bars. Square images
            differ only in that "pad" does not clamp what bicubic interpolation overshoots.

    Returns:
        `[M, 3, side, side]`, normalised.

    Raises:
        ShapeError: for samples of another shape.
        RewardError: for values more than 1e-3 outside [0, 1].

    Differs: "crop" equals torchvision on Pillow images within 0.005 in [0, 1] (measured 0.0043, at most 1.1 of 255
        levels). Pillow resizes along one axis and then the other and keeps 8 bits in between, which we do not, since
        rounding has no gradient; but it also clamps after each pass, which we do. One pass without clamps is off by up
        to 0.12 at edges. transformers crops one pixel further up or left where the excess is 3 modulo 4 pixels; square
        images agree.
    """
    images = check_images(samples, name, channels=(3,))
    check_range(images, name)
    images = _crop(images, side) if fit == "crop" else _pad(images, side)
    mean, std = (images.new_tensor(constants).view(1, 3, 1, 1) for constants in (MEAN, STD))
    return (images - mean) / std


def _crop(images: Tensor, side: int) -> Tensor:
    """Short edge to `side`, the middle kept."""
    height, width = images.shape[2:]
    short = min(height, width)
    tall, wide = side * height // short, side * width // short
    images = _resize(_resize(images, height, wide).clamp(0.0, 1.0), tall, wide).clamp(0.0, 1.0)
    top, left = round((tall - side) / 2), round((wide - side) / 2)
    return images[:, :, top : top + side, left : left + side]


def _pad(images: Tensor, side: int) -> Tensor:
    """Long edge to `side`, black bars beside the rest."""
    height, width = images.shape[2:]
    scale = side / max(height, width)
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    bars_high, bars_wide = side - tall, side - wide
    bars = (bars_wide // 2, bars_wide - bars_wide // 2, bars_high // 2, bars_high - bars_high // 2)
    return functional.pad(_resize(images, tall, wide), bars)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[2:] == (height, width):
        return images
    return functional.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)
