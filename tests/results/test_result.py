"""What a result hands out: the best of each problem, one problem's result, a table."""

import pytest
import torch
from test_contract import REWARD, mixture_process

import steer
from steer import rewards


@pytest.fixture(scope="module")
def digits():
    process = steer.load("digits", steps=4, labels=[3, 8])
    return steer.smc(process, rewards.Ink(), particles=5, key=2)


def test_one_problem_is_that_problem_alone(digits):
    assert len(digits) == 2
    alone = steer.smc(
        steer.load("digits", steps=4, labels=[8]), rewards.Ink(), particles=5, key=steer.Key(2).shifted(problem=1)
    )
    second = digits[1]
    torch.testing.assert_close(second.x, alone.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.log_weight, alone.log_weight, rtol=1e-4, atol=1e-4)
    assert [entry.score.shape for entry in second.seen] == [entry.score.shape for entry in alone.seen]
    torch.testing.assert_close(second.decoded, digits.decoded[5:], rtol=1e-5, atol=1e-5)
    assert torch.equal(digits[-1].x, second.x)
    assert [one.reward.max() for one in digits] == [digits.reward[0].max(), digits.reward[1].max()]


def test_the_best_picture_of_each_problem(digits):
    best = digits.best_images
    assert len(best) == 2
    place = int(digits.reward[1].argmax())
    assert best[1].tobytes() == digits[1].images[place].tobytes()


def test_a_table_of_samples():
    pytest.importorskip("pandas")
    result = steer.smc(mixture_process(), REWARD, particles=4, batch=2, key=1)
    table = result.to_dataframe()
    assert list(table.columns) == ["problem", "prompt", "particle", "reward", "weight", "root"]
    assert table.groupby("problem").weight.sum().tolist() == pytest.approx([1.0, 1.0])
    assert table.reward[5] == result.reward[1, 1].item()
