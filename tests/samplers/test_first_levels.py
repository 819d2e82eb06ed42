"""Networks whose first predictions lie far out of the data's range: what the default weights make of them."""

import dataclasses
import math

import pytest
import torch

import steer

STEPS, TEMPERATURE = 40, 0.25


def first(x):
    return x[:, 0]


def process(clip=None):
    """Three Gaussians within 2.5 of the origin, by a network whose noise is wrong by up to .06: at the first level,
    where alpha is .0016, it predicts data of 38."""
    exact = steer.models.gaussian_mixture(
        [[-1.5, 0.5], [1.0, -1.0], [0.5, 1.5]], [0.1] * 3, schedule=steer.Cosine(), steps=STEPS
    )

    def eps(x, t):
        at = exact.schedule(t)
        return (x - at.alpha * exact.denoiser(x, t)) / at.sigma + 0.06 * torch.sin(3.0 * x)

    return steer.from_eps(eps, exact.schedule, exact.times, event=(2,), clip=clip)


def evidence(model, weight, key):
    """log of the mean of 48 estimates of Z by 96 particles each, and its standard error."""
    run = steer.smc(model, first, particles=96, batch=48, temperature=TEMPERATURE, weight=weight, key=key)
    log_mean = float(torch.logsumexp(run.log_evidence, 0)) - math.log(48)
    return log_mean, float((run.log_evidence - log_mean).exp().std()) / math.sqrt(48), run


@pytest.fixture(scope="module")
def truth():
    """The same by 16,000 plain chains: log E[exp(r / T)] and its standard error."""
    value = steer.rollout(process(), first, particles=16000, key=99).reward[0] / TEMPERATURE
    log_mean = float(torch.logsumexp(value, 0)) - math.log(len(value))
    return log_mean, float((value - log_mean).exp().std()) / math.sqrt(len(value))


def test_first_predictions_are_far_out_unless_clipped():
    start = process().prior(steer.Key(0), 1, 500)
    assert process().denoise(start, 0).abs().max() > 30.0
    assert process().denoise(start, 10).abs().max() < 5.0
    assert process(clip=2.5).denoise(start, 0).abs().max() <= 2.5


@pytest.mark.slow
def test_the_evidence_is_right_although_they_are(truth):
    """Within four standard errors of plain chains, and half of the single runs within a third of a nat. Mutant: weights
    at full strength from the first level on, which leave a root or two, and half of whose runs are off by a nat."""
    log_mean, error, run = evidence(process(), None, 0)
    assert abs(math.expm1(log_mean - truth[0])) < 4.0 * math.hypot(error, truth[1])
    _, _, lost = evidence(process(), steer.difference(), 0)
    off = [float((result.log_evidence - truth[0]).abs().median()) for result in (run, lost)]
    assert off[0] < 0.33
    assert off[1] > 1.0
    roots = [sum(len(root.unique()) for root in result.root) / 48 for result in (run, lost)]
    assert roots[0] > 3.0 * roots[1]


def test_values_that_pass_are_counted_in_full():
    """To the last bit as `difference()`: where the first values are alike, the exponent is never looked at again."""
    mild = steer.models.gaussian_mixture([[-1.5, 0.5], [1.0, -1.0]], [0.1] * 2, steps=10)
    default, full = (
        steer.smc(mild, first, particles=64, temperature=0.05, weight=weight, key=1)
        for weight in (None, steer.difference())
    )
    assert torch.equal(default.x, full.x)
    assert torch.equal(default.log_weight, full.log_weight)
    assert default.trajectory.path.exponent is None


def test_each_problem_by_itself():
    """A problem whose first values pass, with an ESS above an eighth and below half, keeps exponent 1 beside one whose
    values do not."""
    seen = []

    def reward(x, prompts):
        return x[:, 0] * torch.tensor([1.0 if prompt == "wild" else 0.02 for prompt in prompts])

    two = dataclasses.replace(process(), problems=2, prompts=("wild", "mild"))
    steer.smc(two, reward, particles=64, temperature=TEMPERATURE, key=2, on_step=lambda e: seen.append(e.state.path))
    exponents = torch.stack([path.exponent[:, 0] for path in seen if path.exponent is not None])
    assert (exponents[:, 1] == 1.0).all()
    assert exponents[0, 0] < 0.1
    assert (exponents[:, 0].diff() >= 0.0).all()
    assert exponents[-1, 0] == 1.0


def test_a_prediction_that_is_forbidden_kills_no_seed():
    """-inf of a prediction says nothing of its sample, so it does not count as killed: at first it is all of them."""
    mild = steer.models.gaussian([0.0, 0.0], 1.0, steps=6)
    result = steer.smc(mild, lambda x: torch.where(x[:, 0] > 0.5, 0.0, -torch.inf), particles=32, key=1)
    assert result.trajectory.path.exponent is None


def test_a_run_that_goes_on_keeps_its_exponent():
    events = []
    whole = steer.smc(process(), first, particles=32, temperature=TEMPERATURE, key=3, on_step=events.append)
    on = steer.smc(process(), first, temperature=TEMPERATURE, key=3, start=events[4].state)
    assert torch.equal(on.x, whole.x)
    assert torch.equal(on.log_weight, whole.log_weight)
