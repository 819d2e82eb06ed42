"""Ink, Symmetry and JPEGSize against pixel-by-pixel definitions and files written by Pillow."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from steer.errors import NotDifferentiableError, RewardError, ShapeError
from steer.rewards import Ink, JPEGSize, PNGSize, Saturation, Sharpness, Symmetry


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SMALL = [Ink(), Symmetry("horizontal"), Symmetry("vertical")]
EVERY = [*SMALL, Sharpness(), JPEGSize(size=16), PNGSize()]


def test_ink_is_the_mean_pixel():
    images = pictures(3, 1, 4, 5)
    expected = [sum(image.flatten().tolist()) / 20 for image in images]
    assert Ink()(images).tolist() == pytest.approx(expected, abs=1e-12)
    assert Ink()(torch.ones(1, 3, 2, 2)).item() == 1.0


def test_symmetry_compares_with_the_mirror_image():
    images = pictures(2, 3, 4, 5)
    for m, image in enumerate(images.tolist()):
        sides = sum(abs(plane[i][j] - plane[i][4 - j]) for plane in image for i in range(4) for j in range(5)) / 60
        ends = sum(abs(plane[i][j] - plane[3 - i][j]) for plane in image for i in range(4) for j in range(5)) / 60
        assert Symmetry()(images)[m].item() == pytest.approx(-sides)
        assert Symmetry("vertical")(images)[m].item() == pytest.approx(-ends)


def test_symmetry_of_a_symmetric_image_is_zero_along_its_axis_only():
    columns = torch.tensor([0.1, 0.9, 0.9, 0.1]).expand(1, 1, 4, 4)  # the same read from left and right
    rows = columns.transpose(2, 3).clone()
    rows[:, :, 0] = 0.5  # top and bottom differ
    assert Symmetry("horizontal")(columns).item() == 0.0
    assert Symmetry("horizontal")(rows).item() == 0.0
    assert Symmetry("vertical")(rows).item() == pytest.approx(-0.2)  # two of four rows differ by 0.4
    with pytest.raises(RewardError, match="'horizontal' or 'vertical', got 'diagonal'"):
        Symmetry("diagonal")  # type: ignore[arg-type]


@pytest.mark.parametrize("reward", SMALL, ids=repr)
def test_gradient_is_that_of_finite_differences(reward):
    assert torch.autograd.gradcheck(reward, pictures(2, 1, 4, 4).requires_grad_())


@pytest.mark.parametrize("reward", EVERY, ids=repr)
def test_scores_do_not_depend_on_batch_or_order(reward):
    images, order = pictures(5, 1, 8, 8), torch.tensor([4, 2, 0, 3, 1])
    images[1] = images[1].round()  # any two noises make PNG files of one size
    whole = reward(images)
    torch.testing.assert_close(torch.cat([reward(image[None]) for image in images]), whole)
    torch.testing.assert_close(reward(images[order]), whole[order])
    assert len(set(whole.tolist())) > 1


@pytest.mark.parametrize("reward", EVERY, ids=repr)
def test_half_precision_images_score_in_float32(reward):
    images = pictures(3, 1, 8, 8).to(torch.bfloat16)
    scores = reward(images)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(images.double()).float())


@pytest.mark.parametrize("reward", EVERY, ids=repr)
def test_what_is_no_image_is_refused_by_name(reward):
    with pytest.raises(ShapeError, match=rf"{type(reward).__name__} reads images of .* got \(3, 4\); give .* decod"):
        reward(torch.rand(3, 4))


def test_sharpness_is_the_variance_of_the_laplacian():
    images = pictures(2, 3, 5, 6)
    grey = (images * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)).sum(1).tolist()

    def mirrored(i: int, size: int) -> int:
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    for m in range(2):
        at = lambda i, j: grey[m][mirrored(i, 5)][mirrored(j, 6)]  # noqa: B023, E731
        around = [
            at(i - 1, j) + at(i + 1, j) + at(i, j - 1) + at(i, j + 1) - 4 * at(i, j) for i in range(5) for j in range(6)
        ]
        mean = sum(around) / 30
        expected = sum((a - mean) ** 2 for a in around) / 30
        assert Sharpness()(images)[m].item() == pytest.approx(expected)
    flat, noise = torch.full((1, 1, 8, 8), 0.5), pictures(1, 1, 8, 8).float()
    assert Sharpness()(torch.cat([flat, noise]))[0] == 0.0 < Sharpness()(noise).item()
    with pytest.raises(ShapeError, match="at least 2x2 pixels"):
        Sharpness()(torch.rand(1, 1, 1, 8))


def test_saturation_is_that_of_hsv():
    import colorsys

    images = pictures(2, 3, 4, 4)
    images[0, :, 0, 0] = 0.0  # black is grey
    for m in range(2):
        pixels = images[m].flatten(1).T.tolist()
        expected = sum(colorsys.rgb_to_hsv(*pixel)[1] for pixel in pixels) / 16
        assert Saturation()(images)[m].item() == pytest.approx(expected)
    assert Saturation()(torch.full((1, 3, 2, 2), 0.3)).item() == 0.0
    with pytest.raises(ShapeError, match=r"Saturation reads images of shape \(M, 3, H, W\)"):
        Saturation()(torch.rand(1, 1, 4, 4))


def test_gradients_of_colour_rewards():
    for reward in (Sharpness(), Saturation()):
        assert torch.autograd.gradcheck(reward, pictures(2, 3, 4, 4).requires_grad_())
    black = torch.zeros(1, 3, 2, 2, requires_grad=True)
    assert torch.autograd.grad(Saturation()(black).sum(), black)[0].isfinite().all()


def test_png_size_is_that_of_the_file_pillow_writes():
    levels = torch.randint(0, 256, (3, 20, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for image, picture in (
        (levels, Image.fromarray(levels.permute(1, 2, 0).numpy())),
        (levels[:1], Image.fromarray(levels[0].numpy())),
    ):
        file = io.BytesIO()
        picture.save(file, format="PNG", compress_level=9)
        assert PNGSize()(image[None] / 255.0).item() == pytest.approx(-len(file.getvalue()) / 1000)
    flat, noise = torch.full((1, 1, 8, 8), 0.5), pictures(1, 1, 8, 8).float()
    small = PNGSize()(torch.cat([flat, noise]))
    assert small[0] > small[1]
    assert torch.equal(PNGSize(sign=1)(torch.cat([flat, noise])), -small)
    for wrong in ({"level": 10}, {"level": -1}, {"sign": 0}):
        with pytest.raises(RewardError, match="level 0 to 9 and sign -1"):
            PNGSize(**wrong)


def test_bounds_hold():
    images = pictures(20, 3, 8, 8)
    for reward in (*SMALL, Sharpness(), Saturation()):
        low, high = reward.spec.bounds
        assert low <= reward(images).min() <= reward(images).max() <= high


def kilobytes(picture: Image.Image, quality: int) -> float:
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=quality)
    return len(file.getvalue()) / 1000


def test_jpeg_size_is_that_of_the_file_pillow_writes():
    levels = torch.randint(0, 256, (3, 20, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(levels.permute(1, 2, 0).numpy())
    reward = JPEGSize(quality=90, size=20)  # large enough as it is
    assert reward(levels[None] / 255.0).item() == pytest.approx(-kilobytes(picture, 90))
    grey = Image.fromarray(levels[0].numpy())
    assert reward(levels[None, :1] / 255.0).item() == pytest.approx(-kilobytes(grey, 90))
    between = (levels[None, :1] - 0.4).clamp(0, 255) / 255.0  # rounded to the nearest of 256 levels, not down
    assert reward(between).item() == pytest.approx(-kilobytes(grey, 90))


def test_jpeg_enlarges_small_images_to_at_least_the_asked_size():
    levels = torch.randint(0, 256, (6, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    enlarged = Image.fromarray(levels.numpy()).resize((24, 18), Image.Resampling.BICUBIC)  # 3 = ceil(16 / 6)
    scores = JPEGSize(size=16, sign=1)(levels[None, None] / 255.0)
    assert scores.item() == pytest.approx(kilobytes(enlarged, 95))


def test_jpeg_prefers_flat_images_and_its_sign_the_opposite():
    flat, noise = torch.full((1, 1, 8, 8), 0.5), pictures(1, 1, 8, 8).float()
    both = torch.cat([flat, noise])
    small, large = JPEGSize()(both), JPEGSize(sign=1)(both)
    assert small[0] > small[1]
    assert torch.equal(large, -small)
    assert (large > 0).all()


@pytest.mark.parametrize("reward", [JPEGSize(size=8), PNGSize()])
def test_files_have_no_gradient_and_say_so(reward):
    images = torch.rand(2, 1, 8, 8, requires_grad=True)
    with pytest.raises(NotDifferentiableError, match=rf"{type(reward).__name__} has no gradient; .*torch.no_grad"):
        reward(images)
    with torch.no_grad():
        assert reward(images).shape == (2,)
    assert reward.spec.gradient == "none"


def test_jpeg_refuses_other_ranges_and_passes_nan_on():
    with pytest.raises(RewardError, match=r"needs images in \[0, 1\], got values in \[-1, 0.5\]; map and clamp"):
        JPEGSize()(torch.tensor([-1.0, 0.5]).expand(1, 1, 2, 2))
    with pytest.raises(RewardError, match=r"got values in \[0, 255\]"):
        JPEGSize()(torch.tensor([0.0, 255.0]).expand(1, 1, 2, 2))
    images = torch.rand(3, 1, 8, 8)
    images[1, 0, 2, 3] = torch.nan
    assert JPEGSize(size=8)(images).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("wrong", [{"quality": 0}, {"quality": 101}, {"size": 0}, {"sign": 0}, {"sign": 2}])
def test_jpeg_refuses_settings_that_mean_nothing(wrong):
    with pytest.raises(RewardError, match="quality 1 to 100, size of at least 1 pixel, and sign -1"):
        JPEGSize(**wrong)
    with pytest.raises(ShapeError, match=r"\(M, 1 or 3, H, W\), got \(1, 2, 8, 8\)"):
        JPEGSize()(torch.rand(1, 2, 8, 8))
