"""FK-steering, TDS and DAS: exact on the Gaussian cases where what was released is not.

References are the laws of the discretised chains (`steer.models.chain_law`), so a run of few steps is as exact as any:
every statistic is exactly unbiased over 256 problems (see `exact.z_scores`), |z| < 4. Variances of the data are chosen
such that the chain's own law, tilted, has its mean at .750 and at .900.
"""

import dataclasses
import math

import pytest
import torch
from exact import LIMIT, PATHS, Linear, exact_chain, mixture_2d, times, worst, z, z_scores

import steer
from steer.core import trajectory
from steer.key import Key
from steer.models import chain_law

BATCH = 256
SUM = Linear([1.0, 1.0])


def gaussian_with(chain_variance, steps, path="vp"):
    """A process in the plane whose chain of that many steps ends in N(0, chain_variance I)."""

    def build(variance):
        return steer.models.gaussian(
            [0.0, 0.0], variance, schedule=PATHS[path], times=times(path, steps), dtype=torch.float64
        )

    low, high = 0.0, 10.0 * chain_variance
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(chain_law(build(middle)).covs[0, 0, 0]) < chain_variance else (low, middle)
    return build(0.5 * (low + high))


# --- FK-steering ------------------------------------------------------------------------------------------------------

FK = gaussian_with(1.5, 20)  # lambda = 1/2, r = x_1 + x_2: each coordinate's mean is 1.5 / 2
FK_LEVELS, FK_PARTICLES, LAMBDA = range(0, 20, 4), 64, 0.5
POTENTIALS = {"difference": steer.difference, "maximum": steer.maximum, "total": steer.total}


def released_fk(potential, *, levels=FK_LEVELS, adaptive=False, clamp=1e10, offset=0.0):
    """FK-steering as released: means of the equally weighted population it ends with, (B,)."""
    key, particles = Key(1), FK_PARTICLES
    x = FK.prior(key.fold("prior"), BATCH, particles)
    statistic = torch.zeros(x.shape[:2], dtype=torch.float64)  # maxima start from 0 too
    product = torch.ones_like(statistic)
    for k in range(FK.steps + 1):
        x0 = FK.denoise(x, k) if k < FK.steps else x
        if k in levels or k == FK.steps:
            score = x0.sum(2) + offset
            new = {"difference": score, "maximum": torch.maximum(score, statistic), "total": score + statistic}[
                potential
            ]
            weight = (LAMBDA * (score - statistic)).exp() if potential == "difference" else (LAMBDA * new).exp()
            if k == FK.steps and potential != "difference":
                weight = weight / product
            weight = weight.clamp(max=clamp)
            share = weight / weight.sum(1, keepdim=True)
            low = (1.0 / share.square().sum(1) < particles / 2) | (not adaptive)
            index = steer.multinomial(share.log(), key.fold("resample").at(k), particles)
            index = torch.where(low[:, None], index, torch.arange(particles))
            product = torch.where(low[:, None], (product * weight).gather(1, index), product)
            statistic = new.gather(1, index)
            x, x0 = (t.gather(1, index[..., None].expand_as(t)) for t in (x, x0))
        if k < FK.steps:
            x = FK.transition(x, x0, k).sample(key.fold("step").at(k))
    return x.mean((1, 2))


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_fk_steering_is_exact(potential, threshold):
    target = chain_law(FK).exact(SUM, temperature=1.0 / LAMBDA)
    assert target.mean.tolist() == pytest.approx([0.75, 0.75], abs=1e-6)
    result = steer.fk_steering(
        FK, SUM, potential=POTENTIALS[potential], levels=FK_LEVELS, particles=FK_PARTICLES, batch=BATCH,
        temperature=1.0 / LAMBDA, threshold=threshold, key=2,
    )  # fmt: skip
    found, name = worst(z_scores(result, target))
    assert found < LIMIT, (name, found)
    if potential == "difference":  # the plain weighted mean has a bias of order 1 / N, small here
        assert abs(float(result.mean(lambda x: x).mean()) - 0.75) < 0.04


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"potential": "difference", "adaptive": True}, 0.0),  # weights of levels that do not resample are forgotten
        ({"potential": "maximum"}, None),  # closes on the maximum, and the maximum starts from 0
        ({"potential": "total"}, None),  # closes on the sum
        ({"potential": "difference", "levels": (), "offset": 80.0}, 0.0),  # weights above 1e10 tie
    ],
    ids=["adaptive", "maximum", "total", "clamp"],
)
def test_released_fk_steering_is_rejected(options, expected):
    means = released_fk(**options)
    assert abs(z(means - 0.75)) > LIMIT
    if expected is not None:
        assert abs(float(means.mean()) - expected) < 0.1


def test_released_fk_steering_without_those_is_not():
    """The same code on difference potentials: what bias its 64 particles leave is within a tenth."""
    assert abs(float(released_fk("difference").mean()) - 0.75) < 0.1
    unclamped = released_fk("difference", levels=(), offset=80.0, clamp=math.inf)
    assert abs(float(unclamped.mean()) - 0.75) < 0.1


def test_fk_steering_defaults():
    process = steer.models.gaussian([0.0, 0.0], 1.0, steps=100)
    result = steer.fk_steering(process, SUM)
    assert [seen.k for seen in result.seen] == [0, 20, 40, 60, 80, 100]
    assert result.x.shape == (1, 4, 2)
    assert (result.cost.nfe, result.cost.rewards, result.cost.grads) == (400, 24, 0)
    assert {k for k, _ in result.trajectory.unique_roots()} <= {0, 20, 40, 60, 80}
    few = steer.fk_steering(process.with_times(steer.uniform_times(steer.VP(), 3)), SUM)
    assert [seen.k for seen in few.seen] == [0, 1, 2, 3]


# --- TDS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_tds_is_exact(path, scale):
    process = gaussian_with(0.8, 12, path)
    result = steer.tds(process, SUM, particles=16, batch=BATCH, temperature=1.5, scale=scale, key=3)
    found, name = worst(z_scores(result, chain_law(process).exact(SUM, temperature=1.5)))
    assert found < LIMIT, (name, found)


@pytest.mark.parametrize("sampler", [steer.tds, steer.das, steer.fk_steering])
@pytest.mark.parametrize("path", PATHS)
def test_policies_on_a_mixture(sampler, path):
    """Three correlated modes, exact reverse kernels."""
    mixture, reward = mixture_2d(), Linear([0.7, -0.5])
    options = {} if sampler is steer.fk_steering else {"scale": 0.4}
    result = sampler(exact_chain(mixture, path, 6), reward, particles=12, batch=2048, key=4, **options)
    found, name = worst(z_scores(result, mixture.exact(reward), mixture))
    assert found < LIMIT, (name, found)


@pytest.mark.parametrize("rule", [steer.ddim(1.0), steer.ddim(0.4), steer.cps(0.6), steer.churn()])
@pytest.mark.parametrize("path", PATHS)
def test_twisted_steps_are_those_of_the_twisted_prediction(rule, path):
    """Algorithm 1 as written: x0 + sigma^2 / alpha times the gradient goes into the step's own formula."""
    process = steer.models.gaussian(
        [0.3, -0.2], 0.7, schedule=PATHS[path], times=times(path, 8), transition=rule, dtype=torch.float64
    )
    seen = 0
    for k in range(7):
        x, gradient = Key(1).at(k).normal((2, 3, 2)), Key(2).at(k).normal((2, 3, 2))
        x0, here = process.denoise(x, k), process.levels[k]
        model = process.transition(x, x0, k)
        state = trajectory.Trajectory.begin(process, x, k=k).with_step_cache(x0=x0, gradient=gradient)
        asked = process.transition(x, x0 + here.sigma**2 / here.alpha * gradient, k)
        torch.testing.assert_close(steer.twisted()(state, model).mean, asked.mean, rtol=1e-9, atol=1e-9)
        seen += 1
    assert seen == 7


def test_twisted_and_guided_agree_in_small_steps_and_not_in_large_ones():
    def ratio(steps):
        process = steer.models.gaussian([0.0], 1.0, steps=steps, dtype=torch.float64)
        k = steps // 2
        x = Key(1).normal((1, 4, 1))
        state = trajectory.Trajectory.begin(process, x, k=k).with_step_cache(x0=x, gradient=torch.ones_like(x))
        model = process.transition(x, process.denoise(x, k), k)
        shifts = [(proposal(state, model).mean - model.mean).mean() for proposal in (steer.twisted(), steer.guided())]
        return float(shifts[0] / shifts[1])

    assert ratio(4) > 2.0
    assert 1.0 < ratio(1000) < 1.02
    assert (ratio(2000) - 1.0) == pytest.approx((ratio(1000) - 1.0) / 2.0, rel=0.05)


def test_tds_runs_where_alpha_is_zero():
    process = gaussian_with(0.8, 12, "flow")
    start = process.with_times((1.0, *process.times[1:]))
    result = steer.tds(start, SUM, particles=16, batch=BATCH, temperature=1.5, key=5)
    found, name = worst(z_scores(result, chain_law(start).exact(SUM, temperature=1.5)))
    assert found < LIMIT, (name, found)


# --- DAS --------------------------------------------------------------------------------------------------------------

DAS = gaussian_with(0.9, 20)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_das_is_exact(threshold):
    """alpha = 1, K = 64: mean .900 and log Z = .900."""
    target = chain_law(DAS).exact(SUM)
    assert target.mean.tolist() == pytest.approx([0.9, 0.9], abs=1e-6)
    assert target.log_evidence == pytest.approx(0.9, abs=1e-6)
    result = steer.das(DAS, SUM, particles=64, batch=BATCH, key=6, selection=steer.resample(steer.ssp, threshold))
    found, name = worst(z_scores(result, target))
    assert found < LIMIT, (name, found)
    assert abs(float(result.mean(lambda x: x).mean()) - 0.9) < 0.03
    assert abs(math.log(float(result.log_evidence.exp().mean())) - 0.9) < 0.05


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_released_das_is_rejected(monkeypatch, temperature):
    """Twist and gradient stay behind when their particles are resampled: log Z, and then the mean, are too large."""
    take = trajectory.Trajectory._take

    def stale(self, *args):
        moved = take(self, *args)
        return dataclasses.replace(moved, path=self.path, cache=moved.cache.replace(gradient=self.cache.gradient))

    monkeypatch.setattr(trajectory.Trajectory, "_take", stale)
    selection = steer.resample(steer.ssp, 1.0 if temperature == 1.0 else 0.5)
    result = steer.das(DAS, SUM, particles=64, batch=BATCH, key=6, temperature=temperature, selection=selection)
    target = chain_law(DAS).exact(SUM, temperature=temperature)
    assert z(result.mean(lambda x: x).mean(1) - target.mean.mean()) > LIMIT
    assert float(result.log_evidence.mean()) > target.log_evidence + 0.5


def test_das_tempers_and_looks_one_level_ahead():
    seen = []
    process = steer.models.gaussian([0.0], 1.0, steps=100, dtype=torch.float64)
    steer.das(process, Linear([1.0]), on_step=seen.append, selection=steer.resample(threshold=0.0))
    exponents = [float(event.state.path.exponent[0, 0]) for event in seen[:-1]]
    assert exponents[0] == 0.0
    assert exponents[10] == pytest.approx(1.008**10 - 1.0, rel=1e-3)
    assert exponents[86] < 1.0
    assert exponents[87] == exponents[98] == 1.0
    gamma = math.expm1(math.log(2.0) / (0.87 * 8))
    assert gamma == pytest.approx(0.1, abs=0.01)  # the paper's choice for 8 steps

    from steer.particles.proposals import TemperedGuided

    x = Key(1).normal((1, 4, 1))
    state = trajectory.Trajectory.begin(process, x, k=50).with_step_cache(x0=x, gradient=torch.ones_like(x))
    model = process.transition(x, x, 50)
    proposal = TemperedGuided(steer.geometric_tempering(0.008), 2.0)
    moved = proposal(state.with_path_state(exponent=torch.zeros(1, 4)), model)
    expected = 2.0 * (1.008**51 - 1.0) * model.std**2
    torch.testing.assert_close(moved.mean - model.mean, torch.full_like(x, expected))


def test_das_lowest_exponent():
    tempering = steer.geometric_tempering(0.1, lowest=0.4)
    assert [tempering.at(k) for k in (0, 1, 100)] == pytest.approx([0.4, 0.5, 1.0])
    for lowest in (-0.1, 1.1):
        with pytest.raises(steer.SteerError, match="lowest"):
            steer.geometric_tempering(0.1, lowest=lowest)
        with pytest.raises(steer.SteerError, match="lowest"):
            steer.adaptive_tempering(lowest=lowest)


@pytest.mark.parametrize("sampler", [steer.fk_steering, steer.tds, steer.das])
def test_default_number_of_particles_is_the_papers(sampler):
    process = steer.models.gaussian([0.0, 0.0], 1.0, steps=5)
    assert sampler(process, SUM).x.shape[1] == 4
    assert sampler(process, SUM, budget=31).x.shape[1] == 6
