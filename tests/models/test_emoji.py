"""The embedded text-to-image pipeline and its reward: small, whole, and following its prompts."""

from importlib.resources import files

import pytest
import torch

import steer
from steer import rewards

FOLDERS = [files("steer") / "assets" / "emoji", files("steer.rewards") / "assets" / "clip-emoji"]


def contents(folder):
    for entry in folder.iterdir():
        yield from contents(entry) if entry.is_dir() else [entry]


def test_it_is_small():
    sizes = [len(file.read_bytes()) for folder in FOLDERS for file in contents(folder)]
    assert sum(sizes) < 12e6
    assert max(sizes) < 5e6


@pytest.fixture(scope="module")
def drawn():
    """Eight pictures of a fox and of a heart, at ten steps."""
    process = steer.load("emoji", prompt=["fox", "blue heart"], steps=10)
    return steer.rollout(process, rewards.clip_emoji(), particles=4, key=0)


def test_pictures_follow_their_prompts(drawn):
    pictures = drawn.decoded
    assert pictures.shape == (8, 3, 64, 64)
    reward = rewards.clip_emoji()
    own = reward(pictures, prompts=["fox"] * 4 + ["blue heart"] * 4)
    other = reward(pictures, prompts=["blue heart"] * 4 + ["fox"] * 4)
    assert bool((own > other + 0.5).all())
    red, _, blue = pictures.mean((2, 3)).unbind(1)
    assert bool((red[:4] > blue[:4]).all())  # foxes are orange
    assert bool((blue[4:] > red[4:]).all())


def test_the_reward_has_a_gradient():
    pictures = torch.full((2, 3, 64, 64), 0.5, requires_grad=True)
    rewards.clip_emoji()(pictures, prompts=["fox", "fox"]).sum().backward()
    assert bool(pictures.grad.isfinite().all())


def test_what_it_does_not_take_is_refused():
    with pytest.raises(steer.ModelError, match="takes a prompt"):
        steer.load("emoji")
    with pytest.raises(steer.ModelError, match="takes no prompt"):
        steer.load("digits", prompt="a fox")
