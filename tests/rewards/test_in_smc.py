"""Rewards inside a sampler, on a Gaussian process in two dimensions: every fault has its own named error."""

from __future__ import annotations

import threading

import pytest
import torch

import steer
from steer import rewards
from steer.errors import CollapsedWeightsError, NonFiniteError, NotDifferentiableError, RewardError, ShapeError
from steer.rewards import DigitLogProb, JPEGSize, Linear, Quadratic, chunked, timeout, weighted

PROCESS = steer.models.gaussian([0.0, 0.0], 1.0, steps=4)


def run(reward, **options):
    return steer.smc(PROCESS, reward, particles=8, key=1, **options)


def fails_at(call: int, value):
    """A reward that is fine until its call of that number, when it returns (or raises) something else."""
    count = iter(range(100))

    def faulty(samples: torch.Tensor):
        scores = samples.sum(1)
        if next(count) < call:
            return scores
        if isinstance(value, Exception):
            raise value
        return value(scores)

    return faulty


def with_one(number: float):
    def change(scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[5] = number
        return scores

    return change


@pytest.mark.parametrize("call", [0, 2])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (with_one(torch.nan), NonFiniteError, "gave nan for problem 0, particle 5 .* or -inf to forbid"),
        (with_one(torch.inf), NonFiniteError, "gave inf for problem 0, particle 5 .* or -inf to forbid"),
        (lambda scores: scores.mean(), ShapeError, r"faulty must return shape \(8,\), .* got \(\)"),
        (lambda scores: scores[:, None], ShapeError, r"faulty must return shape \(8,\), .* got \(8, 1\)"),
        (lambda scores: None, RewardError, "faulty must return one number per sample, got NoneType"),
        (ZeroDivisionError("no ink"), RewardError, r"faulty raised ZeroDivisionError: no ink on .* \(8, 2\)"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda reward: reward, lambda reward: timeout(chunked(reward, 100), 30)])
def test_faults_have_named_errors_and_keep_the_work(call, value, error, message, wrap):
    with pytest.raises(error, match=message) as caught:
        run(wrap(fails_at(call, value)))
    if call:
        assert caught.value.partial.x.shape == (1, 8, 2)


def test_a_late_reward_stops_the_run_with_its_name():
    release = threading.Event()

    def slow(samples: torch.Tensor) -> torch.Tensor:
        release.wait(30)
        return samples.sum(1)

    with pytest.raises(RewardError, match=r"the reward slow gave no answer within 0\.1 s"):
        run(timeout(slow, 0.1))
    release.set()


def half_plane(samples: torch.Tensor) -> torch.Tensor:
    """Forbids everything to the left of the origin."""
    return torch.where(samples[:, 0] < 0, -torch.inf, 0.0)


@pytest.mark.parametrize("reward", [half_plane, weighted((1.0, Linear([0.0, 1.0])), (1.0, half_plane, "nat"))])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_minus_infinity_forbids_a_sample(reward, threshold: float):
    result = run(reward, selection=steer.resample(threshold=threshold))
    forbidden = result.x[..., 0] < 0
    assert forbidden.any()  # so that the next line says something
    assert torch.equal(result.log_weight == -torch.inf, forbidden)
    assert result.log_weight.exp().sum().item() == pytest.approx(1.0)


def test_forbidding_everything_is_an_error():
    with pytest.raises(CollapsedWeightsError, match=r"every particle of problem 0 .* forbids .* use more particles"):
        run(lambda samples: torch.full((len(samples),), -torch.inf))


def test_guidance_by_a_reward_without_gradient_is_refused():
    squares = steer.GaussianProcess(
        PROCESS.denoiser,
        PROCESS.schedule,
        PROCESS.times,
        (2,),
        PROCESS.rule,
        decoder=lambda x: x.sigmoid()[:, :1, None, None].expand(-1, 1, 8, 8),
    )
    guided = {"particles": 2, "key": 0, "proposal": steer.guided()}
    jpeg = JPEGSize(size=8)
    with pytest.raises(NotDifferentiableError, match=r"gradient of the reward JPEGSize.*steer.smc with its default"):
        steer.smc(squares, jpeg, **guided)
    with pytest.raises(NotDifferentiableError, match=r"gradient of the reward 1\*DigitLogProb\(1\) \+ 1\*JPEGSize"):
        steer.smc(squares, weighted((1.0, DigitLogProb(1)), (1.0, jpeg, "nat/kB")), **guided)
    assert steer.smc(squares, DigitLogProb(1), **guided).reward.shape == (1, 2)
    assert steer.smc(squares, jpeg, particles=2, key=0).reward.shape == (1, 2)


def test_a_wrapped_analytic_reward_gives_the_exact_law():
    """The sampler through chunks and a deadline agrees with the law that the wrapped reward's own form implies."""
    reward = timeout(chunked(weighted((0.5, Linear([1.0, 0.0])), (1.0, Quadratic([0.5, -0.5], 0.4))), 64), 30)
    process = steer.models.gaussian([0.0, 0.0], 1.0, steps=6)
    process = process.with_rule(steer.models.mixture.ExactStep(process.reference))
    exact = process.exact(reward)
    result = steer.smc(process, reward, batch=8, particles=256, key=0)
    error = result.log_evidence.exp() / torch.tensor(exact.log_evidence).exp() - 1.0
    standard = error.std() / 8**0.5
    assert standard < 0.1
    assert abs(error.mean() / standard) < 4.0
    means = result.mean(lambda x: x.double())
    assert (abs((means.mean(0) - exact.mean) / (means.std(0) / 8**0.5)) < 5.0).all()


def aligned(samples, *, prompts):
    """A reward that cannot do without prompts."""
    return samples.sum(1) + len(prompts)


@pytest.mark.parametrize(
    "reward",
    [
        aligned,
        chunked(aligned, 3),
        timeout(aligned, 9.0),
        weighted((1.0, aligned), (1.0, lambda x: x.sum(1))),
        rewards.clip(aligned, -1.0, 1.0),
        rewards.product(aligned, aligned),
    ],
)
def test_a_process_without_prompts_is_refused_by_what_needs_them(reward):
    with pytest.raises(RewardError, match="asks for prompts, and this process has none"):
        run(reward)
