"""Prior and density guidance: changes of log-density asked for in nats, and what was got."""

import math

import pytest
import torch
from exact import LIMIT, z

import steer
from steer import guidance
from steer.guidance import Hooks, guide
from steer.processes import schedules

SIZE, SCHEDULE = 32, steer.VP()


def grid(steps, lowest=-10.0, highest=9.0):
    """steps + 1 levels equally spaced in log(alpha^2 / sigma^2), then the data."""
    ratios = (math.exp(-0.5 * (lowest + (highest - lowest) * i / steps)) for i in range(steps + 1))
    return (*(schedules.time_at(SCHEDULE, math.atan(ratio)) for ratio in ratios), 0.0)


def mixture(steps, modes=2):
    means = steer.Key(3).fold("means").normal((1, 4, SIZE))[0, :modes]
    return steer.models.gaussian_mixture(
        means, [0.25] * modes, [0.7, 0.3, 0.6, 0.4][:modes], schedule=SCHEDULE, times=grid(steps),
        transition=steer.ode(), dtype=torch.float64,
    )  # fmt: skip


def log_densities(process, hooks, particles=192, key=0):
    guided = guide(process, guidance.prior_guidance(process) + hooks, key=key)
    result = steer.rollout(guided, lambda x: x[:, 0], particles=particles, key=key, keep_states=False)
    return process.reference.log_prob(result.x[0]), result.process.log


@pytest.mark.slow
def test_density_guidance_changes_log_density_by_the_closed_form():
    """Within half a nat from -97 to +13, on two modes in 32 dimensions; standard errors are below .08 nat."""
    process = mixture(512)
    plain, _ = log_densities(process, Hooks())
    for q in (0.1, 0.25, 0.4, 0.57):
        found, log = log_densities(process, guidance.density_guidance(process, q=q))
        change = found - plain
        assert float(change.std()) / math.sqrt(192) < 0.08
        assert float(change.mean()) == pytest.approx(guidance.delta_of(process, q), abs=0.5), q
        assert max(most for _, most in log.table("clamped").values()) == 0.0
    assert guidance.delta_of(process, 0.1) == pytest.approx(-97.4, abs=0.05)
    assert guidance.delta_of(process, 0.57) == pytest.approx(13.4, abs=0.05)


@pytest.mark.parametrize("mutant", ["half the dimensions", "eta on the wrong side"])
def test_mutants_miss_by_many_nats(monkeypatch, mutant):
    from steer.guidance import density

    process = mixture(256)
    plain, _ = log_densities(process, Hooks())
    hooks = guidance.density_guidance(process, q=0.4)
    (rescale,) = hooks.score
    inverse = rescale.inverse * (math.sqrt(0.5) if mutant.startswith("half") else -0.5)
    wrong, _ = log_densities(process, Hooks(score=(density.Rescale(inverse, 0.0, 3.0),)))
    assert abs(float((wrong - plain).mean()) - guidance.delta_of(process, 0.4)) > 5.0


def test_nats_are_solved_for_q():
    process = mixture(64)
    assert guidance.delta_of(process, guidance.quantile_of(process, -12.0)) == pytest.approx(-12.0)
    by_nats, by_q = (
        log_densities(process, hooks, 8)[0]
        for hooks in (
            guidance.density_guidance(process, -12.0),
            guidance.density_guidance(process, q=guidance.quantile_of(process, -12.0)),
        )
    )
    torch.testing.assert_close(by_nats, by_q)
    assert guidance.density_guidance(process, 0.0).score[0].inverse == 0.0


def test_more_than_the_density_has_is_an_error_or_clamped():
    """D / 2 = 16 nats lie between a typical sample and the mode: q = .6 asks for 19."""
    process = mixture(256)
    with pytest.raises(steer.SteerError, match="16 \\(headroom\\)"):
        guidance.density_guidance(process, q=0.6)
    with pytest.raises(steer.SteerError, match="delta_logp <= 16"):
        guidance.density_guidance(process, 20.0)
    plain, _ = log_densities(process, Hooks())
    forced, log = log_densities(process, guidance.density_guidance(process, q=0.6, headroom=math.inf))
    assert 10.0 < float((forced - plain).mean()) < 16.5  # next to the mode, and not beyond it
    assert float((forced - plain).min()) > 0.0
    assert max(most for _, most in log.table("clamped").values()) == 1.0
    unclamped, _ = log_densities(process, guidance.density_guidance(process, q=0.6, headroom=math.inf, limit=1e9))
    assert float((unclamped - plain).min()) < -100.0


@pytest.mark.slow
def test_stochastic_density_guidance():
    """Noise across the score, its second-order effect taken off: the closed form within .6 nat, unlike without that."""
    process = mixture(512)
    plain, _ = log_densities(process, Hooks())
    hooks = guidance.density_guidance(process, -19.0, noise=0.3)
    found, _ = log_densities(process, hooks)
    again, _ = log_densities(process, hooks, key=1)
    assert float((found - plain).mean()) == pytest.approx(-19.0, abs=0.6)
    assert not torch.equal(found, again)
    uncorrected = Hooks(score=guidance.density_guidance(process, -19.0).score, mean=hooks.mean)
    assert abs(float((log_densities(process, uncorrected)[0] - plain).mean()) + 19.0) > 5.0


@pytest.mark.slow
def test_prior_guidance_is_exact_where_the_data_is_gaussian():
    process = steer.models.gaussian(
        torch.zeros(SIZE), 1.0, schedule=SCHEDULE, times=grid(800), transition=steer.ode(), dtype=torch.float64
    )

    def found(delta):
        guided = guide(process, guidance.prior_guidance(process, delta))
        result = steer.rollout(guided, lambda x: x[:, 0], particles=8, keep_states=False)
        return process.reference.log_prob(result.x[0])

    median = found(0.0)
    for delta in (-40.0, -10.0, 5.0, 14.0):
        torch.testing.assert_close(found(delta) - median, torch.full_like(median, delta), rtol=1e-2, atol=0.1)
    draws = steer.Key(1).normal((1, 20000, SIZE)).square().sum(2)[0]
    below = (draws < guidance.density.radius((SIZE,), 0.0) ** 2).double()
    assert abs(z(below - 0.5)) < LIMIT
    with pytest.raises(steer.SteerError, match="at the origin"):
        guidance.prior_guidance(process, 16.0)


def test_density_guidance_says_what_it_needs():
    process = mixture(8)
    for options, word in [({}, "one of them"), ({"q": 1.0}, "probability"), ({"q": 0.4, "noise": -1.0}, "noise")]:
        with pytest.raises(steer.SteerError, match=word):
            guidance.density_guidance(process, **options)
    with pytest.raises(steer.StateSpaceError, match="start hook"):
        _ = guide(process, guidance.prior_guidance(process)).prior_moments
