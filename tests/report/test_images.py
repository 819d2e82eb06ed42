import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

import steer
from steer.report.images import SEPARATOR, enlarged, grid, is_images, to_images, to_png


def pictures(process_size=8, particles=6):
    process = steer.from_denoiser(
        lambda x, t: torch.zeros_like(x), steer.VP(), 2, event=(1, process_size, process_size),
        decoder=lambda x: (x / 2.0 + 0.5).clamp(0.0, 1.0),
    )  # fmt: skip
    return steer.rollout(process, lambda x: x.mean((1, 2, 3)), particles=particles)


def pixels(image):
    return torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, -1)


def test_grid_is_exact_to_the_pixel():
    decoded = torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    sheet = pixels(grid(decoded, columns=2, least=4, gap=1))[..., 0]
    line = torch.tensor([SEPARATOR])
    black, white, grey, none = (torch.full((4, 4), v) for v in (0, 255, 128, SEPARATOR))
    across = torch.full((1, 11), SEPARATOR)

    def row(left, right):
        bar = line.expand(4, 1)
        return torch.cat([bar, left, bar, right, bar], 1)

    expected = torch.cat([across, row(black, white), across, row(grey, none), across])
    assert torch.equal(sheet.long(), expected)


def test_channels_stay_in_their_places():
    decoded = torch.stack([torch.full((2, 3), v) for v in (0.0, 0.2, 1.0)])[None]
    (image,) = to_images(decoded)
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert image.getpixel((2, 1)) == (0, 51, 255)


def test_enlarging_repeats_pixels_and_never_blurs():
    image = Image.new("L", (8, 8))
    image.putpixel((3, 5), 200)
    big = enlarged(image, 48)
    assert big.size == (48, 48)
    assert pixels(big)[30:36, 18:24].unique().tolist() == [200]
    assert pixels(big).long().sum() == 200 * 36
    assert enlarged(Image.new("L", (64, 64)), 48).size == (64, 64)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(2, 5, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.long)])
def test_what_is_no_picture_is_refused(bad):
    assert not is_images(bad)
    with pytest.raises(steer.ShapeError, match="decoder"):
        to_images(bad)


def test_images_of_a_result_are_its_decoded_samples():
    result = pictures()
    assert len(result.images) == 6
    assert torch.equal(pixels(result.images[4])[..., 0], (result.decoded[4, 0] * 255).round().byte())


def test_notebook_shows_what_has_weight_and_nothing_for_other_processes():
    result = pictures()
    weight = torch.full_like(result.reward, -torch.inf)
    weight[0, 3] = 0.0
    shown = Image.open(io.BytesIO(replace(result, log_weight=weight)._repr_png_() or b""))
    assert pixels(shown).equal(pixels(grid([result.images[3]])))
    mixture = steer.models.gaussian_mixture([[0.0, 0.0]], [1.0], steps=2)
    assert steer.rollout(mixture, lambda x: x[:, 0], particles=3)._repr_png_() is None


def test_png_round_trip():
    image = grid(torch.rand(5, 3, 4, 4))
    assert pixels(Image.open(io.BytesIO(to_png(image)))).equal(pixels(image))
