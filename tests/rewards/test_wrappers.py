"""chunked, timeout and full_precision: same scores, named errors, and nothing of the reward lost on the way."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
import time

import pytest
import torch

from steer.errors import RewardError, ShapeError
from steer.rewards import Ink, Linear, chunked, full_precision, per_frame, rank, timeout

WRAPPERS = [lambda reward: chunked(reward, 2), lambda reward: timeout(reward, 30), full_precision]


def rows(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def total(samples: torch.Tensor) -> torch.Tensor:
    """Sums each sample."""
    return samples.flatten(1).sum(1)


def with_prompts(samples: torch.Tensor, *, prompts) -> list[float]:
    return [float(x.sum()) + 100 * len(prompt) for x, prompt in zip(samples, prompts, strict=True)]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_scores_prompts_and_gradients_pass_through(wrap):
    x = rows(5, 3)
    torch.testing.assert_close(wrap(total)(x), total(x))
    prompts = ["a" * n for n in range(5)]
    expected = torch.tensor(with_prompts(x, prompts=prompts), dtype=torch.float64)
    torch.testing.assert_close(wrap(with_prompts)(x, prompts=prompts), expected)
    assert torch.autograd.gradcheck(wrap(lambda x: x.square().sum(1)), x.requires_grad_())
    with torch.no_grad():
        assert not wrap(total)(x).requires_grad


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("count", [3, 5])
def test_prompts_are_one_per_sample(wrap, count):
    with pytest.raises(RewardError, match=f"needs 4 prompts, one per sample, got {count}"):
        wrap(with_prompts)(rows(4, 3), prompts=["a"] * count)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_what_a_reward_declares_is_kept(wrap):
    linear = wrap(Linear([1.0, 2.0]))
    assert linear.spec.unit == "nat"
    assert linear.quadratic_form(2).vector.tolist() == [1.0, 2.0]
    assert wrap(Ink()).spec == Ink.spec
    assert not hasattr(wrap(total), "spec")
    assert not hasattr(wrap(Ink()), "quadratic_form")
    assert "total" in wrap(total).__name__
    assert wrap(total).__doc__ == "Sums each sample."
    assert "prompts" in inspect.signature(wrap(with_prompts)).parameters
    assert "prompts" not in inspect.signature(wrap(total)).parameters


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_errors_name_the_reward_inside(wrap):
    def broken(samples: torch.Tensor) -> torch.Tensor:
        raise OSError("no such file")

    with pytest.raises(RewardError, match="the reward broken raised OSError: no such file on samples") as caught:
        wrap(broken)(rows(2, 3))
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_chunks_keep_the_order_and_the_size(size: int):
    seen = []

    def first(samples: torch.Tensor) -> torch.Tensor:
        seen.append(len(samples))
        return samples[:, 0]

    x = torch.arange(5.0).unsqueeze(1)
    assert chunked(first, size)(x).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert sum(seen) == 5
    assert max(seen) == min(size, 5)


def test_every_chunk_is_checked():
    # Without a check by chunk, five one-element answers would pass for five scores.
    with pytest.raises(ShapeError, match=r"must return shape \(2,\), .* got \(1,\)"):
        chunked(lambda samples: samples.sum().reshape(1), 2)(rows(6, 3))
    assert chunked(total, 4)(rows(0, 3)).shape == (0,)


@pytest.mark.parametrize(
    "make", [lambda: chunked(total, 0), lambda: timeout(total, 0.0), lambda: timeout(total, float("inf"))]
)
def test_settings_that_mean_nothing_are_refused(make):
    with pytest.raises(RewardError, match=r"needs (rows >= 1|a positive, finite number of seconds), got"):
        make()


@pytest.fixture
def stuck():
    """A reward that waits until the test is over."""
    release = threading.Event()

    def stuck(samples: torch.Tensor) -> torch.Tensor:
        release.wait(30)
        return total(samples)

    yield stuck
    release.set()


def test_a_late_reward_is_an_error_at_the_deadline(stuck):
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"the reward stuck gave no answer within 0\.2 s on .* \(4, 2\); allow"):
        timeout(stuck, 0.2)(rows(4, 2))
    assert 0.2 <= time.monotonic() - start < 2.0


def test_deadlines_hold_off_the_main_thread_too(stuck):
    caught = []

    def work() -> None:
        try:
            timeout(stuck, 0.1)(rows(1, 2))
        except RewardError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(5.0)
    assert len(caught) == 1


def test_an_interrupt_inside_the_reward_reaches_the_caller():
    def interrupted(samples: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timeout(interrupted, 30)(rows(1, 2))


@pytest.mark.slow
def test_an_abandoned_call_does_not_hold_the_program_open():
    program = """
import time, torch
from steer import rewards
def stuck(samples):
    time.sleep(60)
try:
    rewards.timeout(stuck, 0.05)(torch.zeros(1, 1))
except rewards.wrappers.RewardError:
    print("late", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=40, check=False)
    assert (done.returncode, done.stdout) == (0, "late\n"), done.stderr


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_only_half_precision_is_cast(given: torch.dtype):
    seen = []

    def reward(samples: torch.Tensor) -> torch.Tensor:
        seen.append(samples.dtype)
        return total(samples)

    full_precision(reward)(torch.ones(2, 2, dtype=given))
    assert seen == [torch.float32 if given in (torch.float16, torch.bfloat16) else given]


def test_a_video_is_scored_frame_by_frame():
    videos = torch.rand(3, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    def brightness(images, *, prompts):
        seen.append(prompts)
        return images.mean((1, 2, 3))

    reward = per_frame(brightness, every=2)
    torch.testing.assert_close(reward(videos, prompts=["a", "b", "c"]), videos[:, [0, 2, 4]].mean((1, 2, 3, 4)))
    assert seen == [["a"] * 3 + ["b"] * 3 + ["c"] * 3]
    with pytest.raises(ShapeError, match=r"videos \(M, F, C, H, W\)"):
        reward(videos[:, 0], prompts=["a", "b", "c"])
    with pytest.raises(RewardError, match="every >= 1"):
        per_frame(brightness, every=0)
    with pytest.raises(RewardError, match="inside it"):
        per_frame(rank(Ink()))
