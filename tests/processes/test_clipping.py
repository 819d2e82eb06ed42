"""`clip=`: predictions of x_0 within the range of the data."""

import pytest
import torch

import steer
from steer.errors import SteerError


def network(x, t):
    """Predicts noise badly where there is most of it: x_0 of about 40."""
    return x * (1.0 - 0.5 * t)


OPENERS = {
    "from_eps": lambda **o: steer.from_eps(network, steer.Cosine(), 10, event=(3,), **o),
    "from_v": lambda **o: steer.from_v(lambda x, t: -30.0 * x, steer.VP(), 10, event=(3,), **o),
    "from_velocity": lambda **o: steer.from_velocity(
        lambda x, t: -30.0 * x, steer.RectifiedFlow(), 10, event=(3,), **o
    ),
    "from_score": lambda **o: steer.from_score(lambda x, t: 9.0 * x, steer.VP(), 10, event=(3,), **o),
    "from_edm": lambda **o: steer.from_edm(lambda x, s: 30.0 * x, 10, event=(3,), **o),
    "from_denoiser": lambda **o: steer.from_denoiser(lambda x, t: 30.0 * x, steer.VP(), 10, event=(3,), **o),
}


@pytest.mark.parametrize("name", OPENERS)
def test_every_opener_clips(name):
    free, bound, uneven, dynamic = (
        OPENERS[name](**options)
        for options in ({}, {"clip": 2.2}, {"clip": (-1.0, 3.0)}, {"clip": steer.dynamic_clip(0.6, limit=2.0)})
    )
    x = free.prior(steer.Key(0), 2, 50)
    raw = free.denoise(x, 0)
    assert raw.abs().max() > 10.0
    assert torch.equal(bound.denoise(x, 0), raw.clamp(-2.2, 2.2))
    assert torch.equal(uneven.denoise(x, 0), raw.clamp(-1.0, 3.0))
    size = raw.abs().sort(2).values[..., 1:2].clamp(min=2.0)  # rank 2 of 3 is the quantile .6
    torch.testing.assert_close(dynamic.denoise(x, 0), torch.maximum(torch.minimum(raw, size), -size) * 2.0 / size)
    assert dynamic.denoise(x, 0).abs().max() <= 2.0 + 1e-6


def test_what_is_in_range_is_left_alone():
    process = steer.from_denoiser(lambda x, t: 0.1 * x, steer.VP(), 10, event=(3,))
    x = process.prior(steer.Key(0), 1, 20)
    for clip in (1.0, steer.dynamic_clip()):
        clipped = steer.from_denoiser(lambda x, t: 0.1 * x, steer.VP(), 10, event=(3,), clip=clip)
        assert torch.equal(clipped.denoise(x, 3), process.denoise(x, 3))


def test_gradients_pass_where_nothing_is_clipped():
    process = OPENERS["from_denoiser"](clip=2.0)
    x = torch.tensor([[[0.01, 5.0, 0.02]]], requires_grad=True)
    process.denoise(x, 5).sum().backward()
    assert x.grad.flatten().tolist() == [30.0, 0.0, 30.0]


@pytest.mark.parametrize("clip", [0.0, -1.0, (1.0, 1.0), (2.0, -2.0), (1.0, 2.0, 3.0), "static", float("nan")])
def test_bounds_that_are_none(clip):
    with pytest.raises(SteerError, match="clip is a bound c > 0"):
        OPENERS["from_denoiser"](clip=clip)


@pytest.mark.parametrize("options", [{"quantile": 0.0}, {"quantile": 1.1}, {"limit": 0.0}])
def test_quantiles_that_are_none(options):
    with pytest.raises(SteerError, match="a quantile is in"):
        steer.dynamic_clip(**options)


def test_it_goes_along_with_the_process_and_its_record(tmp_path):
    process = OPENERS["from_velocity"](clip=2.2)
    moved = steer.convert(process, steer.VP())
    assert moved.denoise(moved.prior(steer.Key(0), 1, 9), 0).abs().max() <= 2.2
    run = steer.rollout(process, lambda x: x[:, 0], particles=4)
    run.save(tmp_path)
    assert steer.load_run(tmp_path).result(process).reward.equal(run.reward)
    with pytest.raises(SteerError, match="clip"):
        steer.load_run(tmp_path).result(OPENERS["from_velocity"]())
