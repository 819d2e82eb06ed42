"""The live preview: the best prediction, at every k-th step, of every method; and the run is the same without it."""

import functools

import diffusers
import pytest
import tiny_pipelines
import torch
from PIL import Image
from test_contract import METHODS

import steer
from steer import rewards, search
from steer.errors import ShapeError
from steer.report.images import to_images

STEPS = 4


def grey(x):
    return (0.5 * x + 0.5).clamp(0.0, 1.0)


def pictures(**options):
    return steer.from_denoiser(lambda x, t: 0.5 * x, steer.VP(), STEPS, event=(1, 8, 8), decoder=grey, **options)


def brightness(images):
    return images.flatten(1).mean(1)


@pytest.mark.parametrize("name", METHODS)
def test_a_preview_of_every_method_changes_nothing(name):
    run = functools.partial(METHODS[name], pictures(), brightness, particles=4, key=3)
    plain, shown, events = run(), [], []
    watched = run(on_step=[steer.preview(shown.append, every=2), events.append])
    for field in ("x", "reward", "log_weight", "root"):
        assert torch.equal(getattr(watched, field), getattr(plain, field))
    for count in ("nfe", "grads", "rewards", "decodes"):
        assert getattr(watched.cost, count) == getattr(plain.cost, count)
    assert 0 < len(shown) <= len(events) // 2
    assert all(event.clean.shape == event.state.x.shape for event in events if event.x0 is not None)
    assert {(picture.size, picture.mode) for picture in shown} == {((8, 8), "L")}


def test_it_is_the_best_prediction_of_each_problem():
    shown, events = [], []
    on_step = [steer.preview(shown.append, every=1), events.append]
    steer.smc(pictures(), brightness, particles=5, batch=2, key=1, on_step=on_step)
    assert sum(event.scores is not None for event in events) == len(shown) - 1 == STEPS - 1
    for picture, event in zip(shown, events, strict=True):
        best = (event.state.log_weight if event.scores is None else event.scores).argmax(1)
        for problem, image in enumerate(to_images(grey(event.live_x0[torch.arange(2), best]))):
            left = 2 + problem * (48 + 2)  # eight pixels, enlarged to 48, between separators of two
            tile = picture.crop((left, 2, left + 48, 50)).resize((8, 8), Image.Resampling.NEAREST)
            assert tile.tobytes() == image.tobytes()


def test_a_file_is_replaced_at_every_kth_step(tmp_path):
    path, seen = tmp_path / "live.png", []

    def look(event):
        seen.append(path.read_bytes() if path.exists() else None)

    steer.smc(pictures(), brightness, particles=4, on_step=[steer.preview(path, every=2), look])
    assert seen[0] is None
    assert seen[1] == seen[2] != seen[3]
    assert Image.open(path).size == (8, 8)
    assert [entry.name for entry in tmp_path.iterdir()] == ["live.png"]
    with pytest.raises(steer.SteerError, match=r"name it \.png"):
        steer.preview("live.jpg")
    with pytest.raises(steer.SteerError, match="every"):
        steer.preview("live.png", every=0)


def taesd(channels=4):
    """A small AutoencoderTiny of diffusers: latents to pictures in [-1, 1] of twice the size."""
    small = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return diffusers.AutoencoderTiny(latent_channels=channels, **small, **blocks).double()


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return tiny_pipelines.sd15()


def test_of_a_pipeline(pipe):
    process, shown = steer.from_pipeline(pipe, prompt="a fox", steps=3), []
    run = functools.partial(steer.smc, process, rewards.JPEGSize(), particles=3, key=2)
    plain, watched = run(), run(on_step=steer.preview(shown.append, every=1))
    assert torch.equal(watched.x, plain.x)
    assert torch.equal(watched.log_weight, plain.log_weight)
    assert watched.cost.decodes == plain.cost.decodes
    assert [picture.size for picture in shown] == 3 * [(16, 16)]


def test_by_a_quick_decoder(pipe):
    process, decoder = steer.from_pipeline(pipe, prompt="a fox", steps=3), taesd()
    shown, by_function, events = [], [], []
    on_step = [
        steer.preview(shown.append, every=1, decoder=decoder),
        steer.preview(by_function.append, every=1, decoder=lambda x: 0.5 * decoder.decode(x.double()).sample + 0.5),
        events.append,
    ]
    steer.smc(process, rewards.JPEGSize(), particles=3, key=2, on_step=on_step)
    assert [picture.size for picture in shown] == 3 * [(2 * events[0].x0.shape[-1], 2 * events[0].x0.shape[-2])]
    assert [one.tobytes() for one in shown] == [other.tobytes() for other in by_function]


def test_a_solver_with_a_memory_is_decoded_by_its_latents(pipe):
    """Its states carry earlier predictions beside the latents."""
    solver = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe = type(pipe)(**{**pipe.components, "scheduler": solver})
    process, shown = steer.own_solver(steer.from_pipeline(pipe, prompt="a fox", steps=3)), []
    result = search.best_of_n(process, rewards.JPEGSize(), particles=1, on_step=steer.preview(shown.append, every=1))
    assert shown[-1].tobytes() == result.images[0].tobytes()


@pytest.mark.parametrize("method", [steer.smc, search.svdd, search.rbf, search.depth_first, search.dts])
def test_what_predictions_stand_for_are_clean_states(method):
    """Also of tokens, whose predictions are log-probabilities, and of chains, which hand out clean states."""
    events, process = [], steer.load("letters", steps=3)
    method(process, lambda x: (x == 4).double().sum(1), budget=30, on_step=events.append)
    assert all(event.clean.shape == event.state.x.shape for event in events)
    assert all((event.clean != process.mask).all() for event in events)


def test_what_cannot_be_shown_is_refused(pipe):
    points = steer.models.gaussian_mixture([[0.0, 0.0]], [1.0], steps=3)
    with pytest.raises(ShapeError, match="pictures need floats") as raised:
        steer.smc(points, lambda x: x[:, 0], particles=2, on_step=steer.preview(print, every=1))
    assert raised.value.partial is not None
    process = steer.from_pipeline(pipe, prompt="a fox", steps=2)
    with pytest.raises(ShapeError, match=r"decodes latents \(M, 16, h, w\)"):
        steer.rollout(
            process, rewards.JPEGSize(), particles=1, on_step=steer.preview(print, every=1, decoder=taesd(16))
        )
