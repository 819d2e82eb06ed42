"""The digit classifiers as rewards: against the networks themselves, and against each other on real digits."""

from __future__ import annotations

import pytest
import torch

from steer.errors import RewardError, ShapeError
from steer.rewards import DigitLogProb, judge
from steer.rewards.digits import load_digit_net


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels[:200] / 16).reshape(-1, 1, 8, 8), torch.from_numpy(labels[:200]).long()


def test_score_is_the_networks_log_probability(digits):
    images = digits[0][:10].float()
    probability = load_digit_net("digits-classifier")(images).double().softmax(1)
    for label in (0, 3, 9):
        torch.testing.assert_close(DigitLogProb(label)(images).double().exp(), probability[:, label])
    even = probability[:, [0, 2, 4, 6, 8]].sum(1)
    torch.testing.assert_close(DigitLogProb((8, 0, 2, 6, 4))(images).double().exp(), even)
    torch.testing.assert_close(DigitLogProb(range(10))(images), torch.zeros(10), rtol=0, atol=1e-6)


def test_judge_gives_the_held_out_networks_probability(digits):
    images = digits[0][:10].float()
    probability = load_digit_net("digits-judge")(images).softmax(1)
    torch.testing.assert_close(judge(3)(images), probability[:, 3])
    torch.testing.assert_close(judge((1, 7))(images), probability[:, 1] + probability[:, 7])


@pytest.mark.parametrize("reward", [DigitLogProb, judge])
def test_real_digits_score_highest_under_their_own_label(reward, digits):
    images, labels = digits
    scores = torch.stack([reward(label)(images) for label in range(10)], 1)
    assert (scores.argmax(1) == labels).float().mean() > 0.95


def test_gradient_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    for reward in (DigitLogProb(3), DigitLogProb((2, 5)), judge(3)):
        assert torch.autograd.gradcheck(reward, images, fast_mode=True)


def test_precision_is_that_of_the_images_but_never_half(digits):
    images = digits[0][:4]
    assert DigitLogProb(3)(images).dtype == torch.float64
    assert DigitLogProb(3)(images.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(DigitLogProb(3)(images.float()).double(), DigitLogProb(3)(images), rtol=1e-4, atol=1e-5)


def test_scores_do_not_depend_on_batch_or_order(digits):
    images = digits[0][:6].float()
    whole, order = DigitLogProb(3)(images), torch.tensor([5, 3, 1, 0, 2, 4])
    torch.testing.assert_close(torch.cat([DigitLogProb(3)(image[None]) for image in images]), whole)
    torch.testing.assert_close(DigitLogProb(3)(images[order]), whole[order])


def test_bad_labels_networks_and_images_are_named():
    for label in (10, -1, (), (1, 12), "3", 3.0):
        with pytest.raises(RewardError, match="label must be a digit 0 to 9 or a non-empty collection"):
            DigitLogProb(label)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="digits-classifier, digits-judge"):
        DigitLogProb(3, net="resnet")(torch.rand(1, 1, 8, 8))
    with pytest.raises(ShapeError, match=r"DigitLogProb\(1,7\) reads .* \(M, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        DigitLogProb((7, 1))(torch.rand(2, 3, 8, 8))
    with pytest.raises(ShapeError, match=r"DigitLogProb\(3\) .* got \(2, 1, 16, 16\)"):
        judge(3)(torch.rand(2, 1, 16, 16))


def test_equal_rewards_are_equal():
    assert DigitLogProb(3) == DigitLogProb([3]) != DigitLogProb(4)
    assert DigitLogProb((1, 7)) == DigitLogProb({7, 1})
