"""The Gaussian process: prediction types, prior, forward noise, conversion between paths, and its errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from exact import LIMIT, PATHS, mixture_2d, times, z

import steer
from steer.cost import Meter
from steer.key import Key
from steer.models import chain_law, gaussian
from steer.processes import parameterization, schedules
from steer.processes.schedules import VP, RectifiedFlow, level

each_path = pytest.mark.parametrize("path", PATHS)
PAIRS = list(itertools.permutations(PATHS, 2))
MEAN, VARIANCE = 0.8, 0.3


def networks(schedule):
    """What networks of every prediction type would say on N(MEAN, VARIANCE) data, from the marginal's score."""

    def score(x, t):
        alpha, sigma, _, _ = schedule(t)
        return (alpha * MEAN - x) / (alpha**2 * VARIANCE + sigma**2)

    def eps(x, t):
        return -schedule(t).sigma * score(x, t)

    def x0(x, t):
        alpha, sigma, _, _ = schedule(t)
        return (alpha * VARIANCE * x + sigma**2 * MEAN) / (alpha**2 * VARIANCE + sigma**2)

    def v(x, t):
        alpha, sigma, _, _ = schedule(t)
        return alpha * eps(x, t) - sigma * x0(x, t)

    def velocity(x, t):
        _, _, d_alpha, d_sigma = schedule(t)
        return d_alpha * x0(x, t) + d_sigma * eps(x, t)

    return {"denoiser": x0, "eps": eps, "score": score, "v": v, "velocity": velocity}


def final_states(process, key=0):
    return steer.rollout(process, lambda x: x.sum(1), batch=2, particles=5, key=key).x


@each_path
def test_prediction_types_give_the_same_chain(path):
    """Final states of from_eps, from_score, from_v, from_velocity equal from_denoiser's to 1e-9, under one key."""
    schedule, grid = PATHS[path], times(path, 7)
    chains = {}
    for kind, network in networks(schedule).items():
        process = getattr(steer, f"from_{kind}")(network, schedule, grid, event=(2,), dtype=torch.float64)
        chains[kind] = final_states(process)
    for kind, x in chains.items():
        torch.testing.assert_close(x, chains["denoiser"], rtol=1e-9, atol=1e-9, msg=kind)
    assert float(chains["denoiser"].std()) > 0.05


@each_path
def test_prediction_types_are_round_trips(path):
    """x0 -> eps, score, velocity, v -> x0 to 1e-10, on states that are not on any data's manifold."""
    schedule = PATHS[path]
    x, x0 = 3.0 * Key(0).normal((2, 3, 4)), Key(1).normal((2, 3, 4))
    for t in (0.05, 0.3, 0.7, 0.95):
        at = level(schedule, t)
        pairs = {
            "eps": (parameterization.eps, parameterization.from_eps),
            "score": (parameterization.score, parameterization.from_score),
            "velocity": (parameterization.velocity, parameterization.from_velocity),
            "v": (parameterization.v_prediction, parameterization.from_v),
        }
        for kind, (to, back) in pairs.items():
            predicted = to(x, x0, at)
            again = back(lambda state, time, out=predicted: out, schedule)(x, t)
            torch.testing.assert_close(again, x0, rtol=1e-10, atol=1e-10, msg=f"{kind} at {t}")


def test_velocity_models_start_at_pure_noise_and_eps_models_do_not():
    flow = RectifiedFlow()
    said = networks(flow)
    x = Key(0).normal((1, 2, 1))
    torch.testing.assert_close(
        steer.from_velocity(said["velocity"], flow, (1.0, 0.5, 0.0), event=(1,)).denoise(x, 0), torch.full_like(x, MEAN)
    )
    for kind in ("eps", "score"):
        process = getattr(steer, f"from_{kind}")(said[kind], flow, (1.0, 0.5, 0.0), event=(1,))
        with pytest.raises(
            steer.ModelError, match=rf"predicts {kind} says nothing about x0 where alpha = 0, got t = 1"
        ):
            process.denoise(x, 0)


@each_path
def test_prior_has_the_scale_of_the_first_level(path):
    """z of mean and variance of 40 000 draws; rows are those of any batch they are drawn in."""
    process = gaussian([0.0, 0.0], 1.0, schedule=PATHS[path], times=times(path, 4), dtype=torch.float64)
    x = process.prior(Key(3), 2, 10_000)
    scaled = x.flatten() / process.levels[0].sigma
    assert x.shape == (2, 10_000, 2)
    assert abs(z(scaled)) < LIMIT
    assert abs(z(scaled.square() - 1.0)) < LIMIT
    assert torch.equal(process.prior(Key(3).shifted(problem=1, slot=4), 1, 3), x[1:2, 4:7])
    assert gaussian([0.0], 1.0).prior(Key(3), 1, 2).dtype == torch.float32


@each_path
def test_forward_noise_has_the_law_of_the_path(path):
    """From a fixed state at level k, x at the noisier level j: z of mean and variance over 30 000 draws.

    Going there in two steps is the same in law as in one.
    """
    process = gaussian([0.0], 1.0, schedule=PATHS[path], times=times(path, 6), dtype=torch.float64)
    levels, k, middle, j = process.levels, 6, 4, 2
    x = torch.full((1, 30_000, 1), 1.7, dtype=torch.float64)
    at_middle = process.noise(x, k, middle, Key(4))
    draws = {"one step": process.noise(x, k, j, Key(5)), "two steps": process.noise(at_middle, middle, j, Key(6))}
    for name, drawn in draws.items():
        scaled = (drawn.flatten() - levels[j].alpha * 1.7) / levels[j].sigma
        assert abs(z(scaled)) < LIMIT, name
        assert abs(z(scaled.square() - 1.0)) < LIMIT, name
    scale = levels[j].alpha / levels[middle].alpha
    gap = draws["two steps"] - scale * at_middle
    spread = levels[j].sigma ** 2 - (scale * levels[middle].sigma) ** 2
    assert abs(z(gap.flatten().square() / spread - 1.0)) < LIMIT


def test_forward_noise_goes_towards_noise_only():
    process = gaussian([0.0], 1.0, steps=4)
    x = torch.ones(1, 2, 1)
    torch.testing.assert_close(process.noise(x, 3, 3, Key(0)), x)
    for k_from, k_to in ((2, 3), (5, 1), (2, -1)):
        with pytest.raises(steer.SteerError, match=rf"k_to <= k_from, got {k_from} to {k_to}"):
            process.noise(x, k_from, k_to, Key(0))


def test_forward_noise_within_the_level_of_pure_noise():
    """alpha = 0 there, and nothing is to be done."""
    process = gaussian([0.0], 1.0, schedule=RectifiedFlow(), times=(1.0, 0.5, 0.0))
    x = torch.ones(1, 2, 1)
    assert torch.equal(process.noise(x, 0, 0, Key(0)), x)


# --- conversion -------------------------------------------------------------------------------------------------------


def native(path: str, steps: int = 6, **options) -> steer.GaussianProcess:
    mixture = mixture_2d()
    return steer.models.gaussian_mixture(
        mixture.means, mixture.covs, mixture.weights, schedule=PATHS[path], times=times(path, steps),
        dtype=torch.float64, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_converted_denoiser_is_that_of_the_new_path(old, new):
    """Against the mixture's own denoiser on the new path at every level, to 1e-8; and there and back again."""
    process = native(old)
    converted = steer.convert(process, PATHS[new])
    assert converted.schedule == PATHS[new]
    assert converted.steps == process.steps
    for k, at in enumerate(converted.levels[:-1]):
        x = math.hypot(at.alpha, at.sigma) * 2.0 * Key(k).normal((2, 4, 2))
        expected = process.reference.denoise(x, at.alpha, at.sigma)
        torch.testing.assert_close(converted.denoise(x, k), expected, rtol=1e-8, atol=1e-8)
    back = steer.convert(converted, PATHS[old], process.times[2:])
    for k in range(back.steps):
        x = 2.0 * back.levels[k].sigma * Key(k).normal((2, 4, 2))
        torch.testing.assert_close(back.denoise(x, k), process.denoise(x, k + 2), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("old", "new"), PAIRS)
@pytest.mark.parametrize("rule", [steer.ddim(1.0), steer.cps(0.5), steer.euler_maruyama(lambda at: at.sigma)])
def test_converted_chain_has_the_law_of_the_native_one(old, new, rule):
    cov = [[1.0, 0.3], [0.3, 0.4]]
    process = gaussian([0.5, -0.2], cov, schedule=PATHS[old], times=times(old, 6), transition=rule)
    converted = steer.convert(process, PATHS[new])
    native_law = chain_law(gaussian([0.5, -0.2], cov, schedule=PATHS[new], times=converted.times, transition=rule))
    law = chain_law(converted)
    torch.testing.assert_close(law.means, native_law.means, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(law.covs, native_law.covs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_converted_grid_starts_where_both_models_reach(old, new):
    """At the noise-to-signal ratio of the old grid's start, or the new schedule's start if that is less noisy."""
    process = native(old)
    converted = steer.convert(process, PATHS[new])
    begins = schedules.angle(process.schedule, process.times[0]), schedules.angle(PATHS[new], PATHS[new].start)
    assert schedules.angle(PATHS[new], converted.times[0]) == pytest.approx(min(begins), abs=1e-9)
    assert converted.times[-1] == 0.0
    assert steer.convert(process, PATHS[new], 11).steps == 11
    gaps = [a - b for a, b in itertools.pairwise(converted.times)]
    assert gaps == pytest.approx([gaps[0]] * 6)


def test_conversion_keeps_what_it_does_not_change():
    process = native("flow", transition=steer.cps(0.3))
    converted = steer.convert(process, VP())
    assert converted.rule == process.rule
    assert converted.reference is process.reference
    assert converted.event == process.event
    assert converted.dtype == process.dtype
    given = (0.8, 0.3, 0.0)
    assert steer.convert(process, VP(), given).times == given


def test_conversion_refuses_a_grid_noisier_than_the_model():
    model = gaussian([0.0], 1.0, schedule=steer.VE(5.0), steps=4)
    with pytest.raises(steer.SteerError, match=r"starts at t = 1.0, noisier than the model's own path .* at or below"):
        steer.convert(model, VP(), (1.0, 0.5, 0.0))
    reachable = schedules.time_at(VP(), math.atan(5.0))
    assert steer.convert(model, VP(), (reachable, 0.0)).times[0] == reachable
    assert steer.convert(model, VP()).times[0] == pytest.approx(reachable, abs=1e-9)


# --- the value itself -------------------------------------------------------------------------------------------------


def test_shape_errors_say_what_was_expected():
    process = steer.from_denoiser(lambda x, t: x[..., :1], VP(), 4, event=(3,))
    with pytest.raises(steer.ShapeError, match=r"shape of x, \(2, 5, 3\) = \(B, N, \*event\), got \(2, 5, 1\)"):
        process.denoise(torch.zeros(2, 5, 3), 0)
    conditioned = steer.from_denoiser(lambda x, t: x, VP(), 4, event=(3,), problems=2)
    assert conditioned.prior(Key(0), 2, 5).shape == (2, 5, 3)
    with pytest.raises(steer.ShapeError, match=r"conditioned on 2 problem\(s\), got batch=3"):
        conditioned.prior(Key(0), 3, 5)
    with pytest.raises(steer.SteerError, match="times must fall strictly"):
        steer.from_denoiser(lambda x, t: x, VP(), (0.0, 1.0), event=(3,))
    with pytest.raises(steer.SteerError, match="times must fall strictly"):
        process.with_times((0.5, 0.6))
    with pytest.raises(steer.ModelError, match="analytic processes only"):
        process.exact(lambda x: x)


def test_verbs():
    process = gaussian([0.0, 0.0], 1.0, steps=4)
    assert process.steps == 4
    assert [process.stochastic(k) for k in range(4)] == [True, True, True, False]
    assert not any(process.with_rule(steer.ode()).stochastic(k) for k in range(4))
    assert process.with_rule(steer.ode()).times == process.times
    assert process.with_times((0.7, 0.0)).levels == (level(VP(), 0.7), level(VP(), 0.0))
    assert process.denoise(torch.zeros(1, 2, 2, dtype=torch.float64), 0).dtype == torch.float64
    for said in ("event=(2,)", "steps=4", "VP(", "prior N(0, 1^2) at t=1", "alpha=0.00657"):
        assert said in repr(process)


def test_decode_flattens_and_the_meter_counts():
    decoded = steer.from_denoiser(lambda x, t: x, VP(), 4, event=(3,), decoder=lambda x: x.sum(1))
    x = Key(0).normal((2, 5, 3))
    assert torch.equal(decoded.decode(x), x.flatten(0, 1).sum(1))
    assert torch.equal(gaussian([0.0] * 3, 1.0).decode(x), x.flatten(0, 1))
    meter = Meter()
    metered = decoded.metered(meter)
    metered.denoise(x, 0), metered.decode(x)
    assert (meter.cost().nfe, meter.cost().decodes) == (10, 10)
    assert decoded.meter is None
