"""What CLIP sees, against torchvision on Pillow images, which is what the networks were trained on."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from steer.errors import RewardError, ShapeError
from steer.rewards.pretrained.clip_pixels import MEAN, STD, clip_pixels

transforms = pytest.importorskip("torchvision.transforms")
BICUBIC = transforms.InterpolationMode.BICUBIC


def levels(kind: str, height: int, width: int) -> torch.Tensor:
    """8-bit images (3, H, W): noise, black and white noise (the worst overshoot), or waves."""
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    if kind == "binary":
        return torch.randint(0, 2, (3, height, width), generator=generator, dtype=torch.uint8) * 255
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((torch.stack([torch.sin(x / 9), torch.cos(y / 5), torch.sin((x + y) / 17)]) + 1) * 127.5).to(torch.uint8)


def seen(images: torch.Tensor, **options) -> torch.Tensor:
    """clip_pixels before its normalisation."""
    mean, std = (torch.tensor(constants, dtype=images.dtype).view(3, 1, 1) for constants in (MEAN, STD))
    return clip_pixels(images, "test", **options) * std + mean


@pytest.mark.parametrize("kind", ["noise", "binary", "waves"])
@pytest.mark.parametrize(
    "size", [(224, 224), (512, 512), (64, 64), (300, 517), (517, 300), (100, 60), (225, 399), (224, 227)], ids=str
)
def test_crop_is_that_of_torchvision_on_pillow_images(kind, size):
    image = levels(kind, *size)
    official = transforms.Compose([transforms.Resize(224, BICUBIC), transforms.CenterCrop(224), transforms.ToTensor()])
    expected = official(Image.fromarray(image.permute(1, 2, 0).numpy()))
    found = seen(image[None] / 255)[0]
    assert found.shape == (3, 224, 224)
    assert (found - expected).abs().max() < 0.005
    assert (found - expected).mean().abs() < 0.001  # rounding errs both ways


def test_one_pass_without_clamps_would_fail_that_test():
    """The check above can fail: the obvious implementation is an order of magnitude outside it."""
    image = levels("binary", 64, 64)
    expected = transforms.ToTensor()(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.BICUBIC))
    once = torch.nn.functional.interpolate(image[None] / 255, (224, 224), mode="bicubic", antialias=True)[0]
    assert (once.clamp(0, 1) - expected).abs().max() > 0.05
    assert (seen(image[None] / 255)[0] - expected).abs().max() < 0.005


def test_normalisation_is_that_of_openai():
    image = levels("noise", 224, 224)[None] / 255
    official = transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    torch.testing.assert_close(clip_pixels(image, "test"), official(image))


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (50, 31), (8, 8), (16, 16)], ids=str)
def test_pad_is_that_of_hpsv2(size):
    """Its ResizeMaxSize on tensors: the long edge to the side, bicubic with antialiasing, zeros around."""
    image = (levels("noise", *size)[None] / 255).double()
    height, width = size
    scale = 16 / float(max(height, width))
    new = tuple(round(dim * scale) for dim in (height, width))
    expected = transforms.functional.resize(image, list(new), BICUBIC, antialias=True)
    pad_h, pad_w = 16 - new[0], 16 - new[1]
    expected = transforms.functional.pad(expected, [pad_w // 2, pad_h // 2, pad_w - pad_w // 2, pad_h - pad_h // 2])
    torch.testing.assert_close(seen(image, side=16, fit="pad"), expected)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("size", [(5, 5), (6, 9), (20, 14)], ids=str)
def test_gradient_is_that_of_finite_differences(fit, size):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, 3, *size, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: clip_pixels(x, "test", side=8, fit=fit), images, fast_mode=True)


def test_precision_is_that_of_the_images_but_never_half():
    images = levels("noise", 16, 16)[None] / 255
    assert clip_pixels(images.bfloat16(), "test", side=8).dtype == torch.float32
    assert clip_pixels(images.double(), "test", side=8).dtype == torch.float64


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 255.0), (-0.002, 1.0), (0.0, 1.002)])
def test_images_in_another_range_are_refused(low, high):
    images = torch.linspace(low, high, 192).view(1, 3, 8, 8)
    with pytest.raises(RewardError, match=rf"test needs .* got values in \[{low:.4g}, {high:.4g}\]; map"):
        clip_pixels(images, "test", side=8)


def test_rounding_empty_batches_and_nan_pass():
    edge = torch.linspace(-0.0009, 1.0009, 192).view(1, 3, 8, 8)
    assert clip_pixels(edge, "test", side=8).isfinite().all()
    assert clip_pixels(edge[:0], "test", side=8).shape == (0, 3, 8, 8)
    assert clip_pixels(edge * torch.nan, "test", side=8).isnan().any()


def test_what_is_no_colour_image_is_refused_by_name():
    with pytest.raises(ShapeError, match=r"test reads images of shape \(M, 3, H, W\), got \(2, 1, 8, 8\)"):
        clip_pixels(torch.rand(2, 1, 8, 8), "test")
