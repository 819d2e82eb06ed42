"""Autocast, inference mode and the default dtype around rewards and models leave no trace in scores and caches."""

import pytest
import torch

import steer
from steer import rewards
from steer.rewards import digit_probability
from steer.rewards.digits import load_digit_net
from steer.torch_modes import autocast_of, lasting, without_autocast

DIGITS = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
MADE = {
    "DigitLogProb": lambda: rewards.DigitLogProb(3),
    "judge": lambda: rewards.judge(3),
    "Linear": lambda: rewards.Linear(torch.linspace(0, 1, 64)),
    "Quadratic": lambda: rewards.Quadratic(torch.zeros(64), torch.eye(64)),
    "Sharpness": rewards.Sharpness,
    "NeighbourDistance": lambda: rewards.NeighbourDistance(torch.rand(20, 1, 8, 8)),
    "chunked": lambda: rewards.chunked(lambda x: x.flatten(1) @ torch.linspace(0, 1, 64), 4),
    "weighted": lambda: rewards.weighted((1.0, lambda x: x.flatten(1) @ torch.linspace(0, 1, 64)), (2.0, plain)),
}


def plain(x):
    return x.flatten(1) @ torch.linspace(0, 1, 64)


@pytest.fixture
def fresh():
    """No network of an earlier test is kept."""
    digit_probability._network.cache_clear()
    yield
    digit_probability._network.cache_clear()


@pytest.mark.parametrize("name", MADE)
def test_rewards_run_outside_autocast(name):
    reward = MADE[name]()
    expected = reward(DIGITS)
    with torch.autocast("cpu", torch.bfloat16):
        got = reward(DIGITS)
    assert torch.equal(got, expected)
    assert got.dtype == expected.dtype


def test_samplers_call_rewards_outside_autocast():
    seen = []

    def reward(x):
        seen.append((x @ torch.ones(2)).dtype)
        return x[:, 0]

    process = steer.models.gaussian_mixture([[1.0, 0.0]], [0.1], [1.0], steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        steer.smc(process, reward, particles=4)
        assert set(seen) == {torch.float32}
        assert autocast_of("cpu") == "bfloat16"
        with without_autocast(torch.device("cpu")):
            assert autocast_of("cpu") == "off"


@pytest.mark.parametrize("name", MADE)
def test_a_first_use_in_inference_mode_leaves_gradients_possible(name, fresh):
    reward = MADE[name]()
    with torch.inference_mode():
        reward(DIGITS)
    images = DIGITS.clone().requires_grad_()
    reward(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_network_that_was_loaded_in_inference_mode_can_be_differentiated():
    with torch.inference_mode():
        net = load_digit_net("digits-judge")
    images = DIGITS.clone().requires_grad_()
    net(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_models_first_run_in_inference_mode_can_be_guided_later(fresh):
    digits = steer.load("digits", steps=3)
    mixture = steer.models.gaussian_mixture([[1.0, 0.0], [-1.0, 0.0]], [0.1, 0.1], [0.5, 0.5], steps=3)
    with torch.inference_mode():
        opened = steer.load("digits", steps=3)
    for process, reward in (
        (digits, rewards.DigitLogProb(3)),
        (opened, rewards.Ink()),
        (mixture, rewards.Linear([1.0, 1.0])),
    ):
        with torch.inference_mode():
            steer.smc(process, reward, particles=3)
        steer.smc(process, reward, particles=3, proposal=steer.guided(0.5))


def test_a_first_use_under_another_default_dtype_leaves_weights_as_they_are_stored(fresh):
    expected = rewards.DigitLogProb(3)(DIGITS), steer.smc(steer.load("digits", steps=3), rewards.Ink(), particles=3).x
    digit_probability._network.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        rewards.DigitLogProb(3)(DIGITS)
        opened = steer.load("digits", steps=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rewards.DigitLogProb(3)(DIGITS), expected[0])
    assert torch.equal(steer.smc(opened, rewards.Ink(), particles=3).x, expected[1])


def test_the_callers_modes_come_back():
    @lasting()
    def inside():
        assert torch.get_default_dtype() == torch.float32
        assert not torch.is_inference_mode_enabled()
        raise ZeroDivisionError

    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            with pytest.raises(ZeroDivisionError):
                inside()
            assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
