"""Going on from a state with another weight, reward, temperature or tempering: the target is that of the new run.

N(0, 1) and the reward .8 x, whose normalizing constant exp(.32 / T^2) is closed form; every case is 600 independent
problems, |z| < 4, and the mutants value what was spent by the new run's reward.
"""

import math

import pytest
import torch
from exact import LIMIT

import steer

STEPS, LEVEL = 40, 20
MODEL = steer.models.gaussian([0.0], 1.0, steps=STEPS, dtype=torch.float64)
HALF = {"weight": steer.FeynmanKac(), "transport": steer.half_transport}
RATIO = {"weight": steer.KernelRatio()}


def reward(x):
    return 0.8 * x[:, 0]


def quarter(x):
    return 0.2 * x[:, 0]


def states_of(sampler, **options):
    """Level -> the state that a run passed through."""
    at = {}
    sampler(MODEL, reward, on_step=lambda event: at.__setitem__(event.level, event.state), **options)
    return at


@pytest.fixture(scope="module")
def begun():
    return {
        "feynman-kac": states_of(steer.fkc, batch=600, particles=8, **HALF)[LEVEL],
        "driftlite": states_of(steer.driftlite, batch=600, particles=8, probes=None)[LEVEL],
    }


def z_of_evidence(state, reward, slope, temperature=1.0, **options):
    result = steer.fkc(MODEL, reward, start=state, key=1, temperature=temperature, **options)
    ratio = (result.log_evidence - 0.5 * (slope / temperature) ** 2).exp() - 1.0
    return float(ratio.mean() / ratio.std() * math.sqrt(len(ratio)))


GOES_ON = {
    "kernel ratios": ((reward, 0.8, 1.0, RATIO), 1.0),
    "another reward": ((quarter, 0.2, 1.0, HALF), 0.25),
    "another temperature": ((reward, 0.8, 2.0, HALF), 0.5),
    "another reward, kernel ratios": ((quarter, 0.2, 1.0, RATIO), 0.25),
}


@pytest.mark.parametrize("name", GOES_ON)
@pytest.mark.parametrize("made_by", ["feynman-kac", "driftlite"])
def test_the_target_is_that_of_the_run_that_goes_on(begun, made_by, name):
    (value, slope, temperature, options), share = GOES_ON[name]
    assert abs(z_of_evidence(begun[made_by], value, slope, temperature, **options)) < LIMIT
    if share < 1.0 and made_by == "driftlite":
        spent = begun[made_by].path.log_potential
        revalued = begun[made_by].with_path_state(log_potential=share * spent)
        assert abs(z_of_evidence(revalued, value, slope, temperature, **options)) > LIMIT


@pytest.mark.parametrize("tempering", [None, steer.geometric_tempering(0.01)], ids=["plain", "tempered"])
@pytest.mark.parametrize("sampler", ["fkc", "driftlite"])
def test_what_was_spent_is_the_value_of_the_state_reached(sampler, tempering):
    """At every level, to rounding: the number by which a later run corrects."""
    run = {"fkc": steer.fkc, "driftlite": steer.driftlite}[sampler]
    options = {**HALF} if sampler == "fkc" else {"probes": None}
    for k, state in states_of(run, particles=8, temperature=0.5, tempering=tempering, **options).items():
        if k < STEPS:
            value = 0.8 * MODEL.denoise(state.x, k)[..., 0] / 0.5
            exponent = 1.0 if tempering is None else tempering.at(k - 1)
            torch.testing.assert_close(state.path.log_potential, exponent * value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", [steer.smc, steer.fkc], ids=["smc", "fkc"])
def test_tempering_ends_with_the_run_that_had_it(sampler):
    """Gone on from with another tempering or none, values count as the new run says."""
    slow = steer.geometric_tempering(0.001)
    tempered = {"weight": steer.difference(tempering=slow)} if sampler is steer.smc else {"tempering": slow}
    state = states_of(sampler, particles=8, **tempered)[10]
    assert float(state.path.exponent.max()) < 0.02
    at = {}
    plain = {"selection": steer.resample(threshold=0.0), "on_step": lambda event: at.__setitem__(event.level, event)}
    plain |= {"weight": steer.difference()} if sampler is steer.smc else {}  # its default may temper
    result = sampler(MODEL, reward, start=state, **plain)
    spent = at[LEVEL].state.path.log_potential  # no resampling, no forgetting: that of level 19
    torch.testing.assert_close(spent, at[LEVEL].scores, rtol=1e-12, atol=1e-12)
    assert all(event.state.path.exponent is None for event in at.values())
    assert bool(result.log_weight.isfinite().all())


def test_weights_of_one_product_are_not_those_of_another():
    annealed = states_of(steer.fkc, particles=4, exponent=2.0)[LEVEL]
    plain = states_of(steer.smc, particles=4)[LEVEL]
    for run in (
        lambda: steer.smc(MODEL, reward, start=annealed),
        lambda: steer.fkc(MODEL, reward, start=annealed),
        lambda: steer.fkc(MODEL, reward, start=plain, exponent=2.0),
    ):
        with pytest.raises(steer.SteerError, match="go on by the method, models and exponents that made it"):
            run()
    steer.fkc(MODEL, reward, start=annealed, exponent=2.0)
    steer.fkc(MODEL, reward, start=plain)
