"""Transition rules against the published formulas, diffusers' own steps, and laws in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_ddpm
from exact import LIMIT, PATHS, times, z
from torch.distributions import Normal as TorchNormal

import steer
from steer.key import Key
from steer.models import chain_law, gaussian
from steer.processes.schedules import VE, VP, RectifiedFlow, Tabulated, level
from steer.processes.transitions import ClippedPrediction, Normal

KEEPING = {
    "ode": steer.ode(),
    "ddim-half": steer.ddim(0.5),
    "ddim": steer.ddim(1.0),
    "cps": steer.cps(0.7),
    "cps-1": steer.cps(1.0),
    "churn": steer.churn(),
    "churn-big": steer.churn(2.0),
}
NOISING = {
    "own": steer.euler_maruyama(),
    "constant": steer.euler_maruyama(lambda at: 0.3),
    "flow-sde": steer.flow_sde(0.7),
}
RULES = KEEPING | NOISING
each_keeping = pytest.mark.parametrize("rule", KEEPING.values(), ids=KEEPING)
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
each_path = pytest.mark.parametrize("path", PATHS)

X, X0 = Key(0).normal((2, 3, 4)), Key(1).normal((2, 3, 4))


def shifted_times(steps: int, shift: float = 3.0) -> tuple[float, ...]:
    """Flow-matching levels as image models space them: shift s / (1 + (shift - 1) s) of equally spaced s."""
    return tuple(shift * s / (1.0 + (shift - 1.0) * s) for s in (1.0 - k / steps for k in range(steps + 1)))


def response(rule, here, there) -> tuple[float, float, float]:
    """Coefficients of a step: of x, of x0, and its std."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    zero = torch.zeros_like(one)
    step = rule(one, zero, here, there)
    return float(step.mean), float(rule(zero, one, here, there).mean), step.std


# --- rules that keep the marginal -------------------------------------------------------------------------------------


@each_keeping
@each_path
def test_marginals_are_kept_on_a_point_mass(rule, path):
    """If x ~ N(alpha m, sigma^2) and x0 = m, then x' ~ N(alpha' m, sigma'^2), at every step down to the data."""
    grid = [level(PATHS[path], t) for t in times(path, 9)]
    for here, there in itertools.pairwise(grid):
        on_x, on_x0, std = response(rule, here, there)
        assert on_x * here.alpha + on_x0 == pytest.approx(there.alpha, abs=1e-12)
        assert (on_x * here.sigma) ** 2 + std**2 == pytest.approx(there.sigma**2, abs=1e-12)
    assert std == 0.0
    assert on_x == 0.0


@each_keeping
def test_chains_keep_the_marginals_of_a_point_mass(rule):
    """The law of the whole chain to each level of a shift-3 grid, from t = 1: mean (1 - t) m and std t."""
    grid = shifted_times(10)
    process = gaussian([0.3, -1.0], 0.0, schedule=RectifiedFlow(), times=grid, transition=rule)
    for k in range(1, 11):
        law = chain_law(process.with_times(grid[: k + 1]))
        torch.testing.assert_close(law.means[0], (1.0 - grid[k]) * process.reference.means[0])
        torch.testing.assert_close(law.covs[0], grid[k] ** 2 * torch.eye(2, dtype=torch.float64))


@each_path
def test_ancestral_step_is_the_ddpm_posterior(path):
    """DDIM(1) is q(x' | x, x0) of the forward chain, by Bayes' rule for Gaussians (Ho et al. 2020, Eqs. 6-7)."""
    grid = [level(PATHS[path], t) for t in times(path, 9)[:-1]]
    for here, there in itertools.pairwise(grid):
        rate = here.alpha / there.alpha
        beta = here.sigma**2 - (rate * there.sigma) ** 2
        precision = 1.0 / there.sigma**2 + rate**2 / beta
        on_x, on_x0, std = response(steer.ddim(1.0), here, there)
        assert std == pytest.approx(precision**-0.5, rel=1e-9)
        assert on_x == pytest.approx(rate / beta / precision, rel=1e-9)
        assert on_x0 == pytest.approx(there.alpha / there.sigma**2 / precision, rel=1e-9)


def test_cps_is_its_published_formula():
    """x' = (1 - t') D + t' cos(pi eta / 2) (x + (1 - t) u) + t' sin(pi eta / 2) z (Wang & Yu 2025)."""
    here, there, eta = level(RectifiedFlow(), 0.8), level(RectifiedFlow(), 0.55), 0.7
    u = (X - X0) / 0.8
    step = steer.cps(eta)(X, X0, here, there)
    carried = 0.55 * math.cos(math.pi * eta / 2) * (X + 0.2 * u)
    torch.testing.assert_close(step.mean, 0.45 * (X - 0.8 * u) + carried, rtol=1e-12, atol=1e-12)
    assert step.std == pytest.approx(0.55 * math.sin(math.pi * eta / 2), rel=1e-14)


def edm_law(mean: float, variance: float, sigmas: list[float], gammas: list[float]) -> tuple[float, float]:
    """Law that Karras et al.'s Algorithm 2 (first order, S_noise = 1) gives N(mean, variance) data, one coordinate."""
    m, v = 0.0, sigmas[0] ** 2
    for i, gamma in enumerate(gammas):
        raised = sigmas[i] * (1.0 + gamma)
        v += raised**2 - sigmas[i] ** 2
        # d = (x - D(x)) / raised with D(x) = (raised^2 mean + variance x) / (variance + raised^2)
        slope = raised / (variance + raised**2)
        h = sigmas[i + 1] - raised
        m, v = m + h * slope * (m - mean), (1.0 + h * slope) ** 2 * v
    return m, v


@pytest.mark.parametrize("gamma", [0.0, 0.2, math.sqrt(2.0) - 1.0])
@pytest.mark.parametrize("window", [(0.0, math.inf), (0.5, 16.5)])
def test_churn_is_edm_algorithm_2_in_law(gamma, window):
    """On the raised levels that EDM's network sees; `lowest` and `highest` are about those.

    No level lies between highest / (1 + gamma) and highest, where a grid does not tell if it was raised.
    """
    low, high, rho, steps = 0.05, 40.0, 7.0, 12
    a, b = high ** (1 / rho), low ** (1 / rho)
    sigmas = [(a + (b - a) * i / (steps - 1)) ** rho for i in range(steps)] + [0.0]
    gammas = [gamma if window[0] <= s * (1.0 + gamma) <= window[1] else 0.0 for s in sigmas[:-1]]
    if gamma and window[0]:
        assert 0 < sum(g > 0 for g in gammas) < steps - 2
    raised = [s * (1.0 + g) for s, g in zip(sigmas, gammas, strict=False)]
    path = VE(raised[0])
    rule = steer.churn(gamma, lowest=window[0], highest=window[1])
    grid = [s / raised[0] for s in (*raised, 0.0)]
    law = chain_law(gaussian([0.7], 0.3, schedule=path, times=grid, transition=rule))
    mean, variance = edm_law(0.7, 0.3, sigmas, gammas)
    assert float(law.means) == pytest.approx(mean, abs=1e-10)
    assert float(law.covs) == pytest.approx(variance, abs=1e-10)


def test_churn_works_on_ratios():
    """On a VP path the step is EDM's on x / alpha: noise-to-signal falls to ratio' / (1 + gamma), then rises."""
    here, there, gamma = level(VP(), 0.6), level(VP(), 0.4), 0.3
    step = steer.churn(gamma)(X, X0, here, there)
    ratio, lowered = here.sigma / here.alpha, there.sigma / there.alpha / (1.0 + gamma)
    euler = X / here.alpha + (lowered - ratio) * (X / here.alpha - X0) / ratio
    torch.testing.assert_close(step.mean / there.alpha, euler, rtol=1e-12, atol=1e-12)
    assert step.std / there.alpha == pytest.approx(math.sqrt((lowered * (1 + gamma)) ** 2 - lowered**2), rel=1e-12)


# --- diffusers --------------------------------------------------------------------------------------------------------


def ddim_scheduler(cls=DDIMScheduler, **options):
    scheduler = cls(num_train_timesteps=100, beta_end=0.15, **options)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()  # so that agreement is to the last digits
    scheduler.set_timesteps(10)
    return scheduler


def discrete_levels(scheduler):
    """(timestep, here, there) of every step of a scheduler; the one after the last is the data."""
    path = Tabulated(scheduler.alphas_cumprod.tolist())
    steps = scheduler.timesteps.tolist()
    points = [level(path, (n + 1) / 100) for n in steps] + [level(path, 0.0)]
    return list(zip(steps, points, points[1:], strict=False))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_equals_diffusers(eta, clip):
    """Mean and std of DDIMScheduler.step, read off by giving it noise of 0 and of 1, at every step."""
    scheduler = ddim_scheduler(clip_sample=clip, clip_sample_range=0.8)
    rule = ClippedPrediction(steer.ddim(eta), 0.8) if clip else steer.ddim(eta)
    noise = Key(2).normal((2, 3, 4))
    for n, here, there in discrete_levels(scheduler):
        quiet, loud = (
            scheduler.step(noise, n, X, eta=eta, variance_noise=torch.full_like(X, v)).prev_sample for v in (0.0, 1.0)
        )
        step = rule(X, (X - here.sigma * noise) / here.alpha, here, there)
        torch.testing.assert_close(step.mean, quiet, rtol=1e-9, atol=1e-9)
        assert step.std == pytest.approx(float((loud - quiet).mean()), abs=1e-9)
        assert step.std == rule.std(here, there)


def test_ancestral_step_equals_diffusers_ddpm(monkeypatch):
    """Mean and std of DDPMScheduler.step at every step but the last, where it too adds no noise."""
    scheduler = ddim_scheduler(DDPMScheduler, clip_sample=False)
    scheduler.betas = scheduler.betas.double()
    noise = Key(3).normal((2, 3, 4))
    for n, here, there in discrete_levels(scheduler):
        drawn = []
        for value in (0.0, 1.0):
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, v=value, **__: torch.full_like(X, v))
            drawn.append(scheduler.step(noise, n, X).prev_sample)
        step = steer.ddim(1.0)(X, (X - here.sigma * noise) / here.alpha, here, there)
        torch.testing.assert_close(step.mean, drawn[0], rtol=1e-6, atol=1e-6)
        assert step.std == pytest.approx(float((drawn[1] - drawn[0]).mean()), abs=1e-6)


def test_flow_ode_equals_diffusers_and_the_velocity_step():
    """x' = x + (t' - t) u, as FlowMatchEulerDiscreteScheduler steps on its own shifted levels."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    velocity, sample = Key(4).normal((2, 3, 4)), X.clone()
    sigmas = scheduler.sigmas.double().tolist()
    for k, n in enumerate(scheduler.timesteps):
        here, there = level(RectifiedFlow(), sigmas[k]), level(RectifiedFlow(), sigmas[k + 1])
        step = steer.ode()(sample, sample - here.t * velocity, here, there)
        torch.testing.assert_close(step.mean, sample + (there.t - here.t) * velocity, rtol=1e-12, atol=1e-12)
        sample = scheduler.step(velocity, n, sample).prev_sample
        torch.testing.assert_close(step.mean, sample, rtol=1e-5, atol=1e-5)


# --- Euler-Maruyama ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "t_next"), [(0.9, 0.75), (0.4, 0.3), (0.2, 0.0)])
def test_flow_sde_is_its_published_formula(t, t_next):
    """x (1 - s^2 D / 2t) - u (1 + s^2 (1 - t) / 2t) D + s sqrt(D) z with s = a sqrt(t / (1 - t)) (Liu et al. 2025)."""
    a, gap = 0.7, t - t_next
    u, s2 = (X - X0) / t, a**2 * t / (1.0 - t)
    step = steer.flow_sde(a)(X, X0, level(RectifiedFlow(), t), level(RectifiedFlow(), t_next))
    expected = X * (1.0 - s2 * gap / (2 * t)) - u * (1.0 + s2 * (1.0 - t) / (2 * t)) * gap
    torch.testing.assert_close(step.mean, expected, rtol=1e-12, atol=1e-12)
    assert step.std == pytest.approx(math.sqrt(s2 * gap), rel=1e-12)


def test_flow_sde_at_pure_noise_takes_alpha_from_the_next_level():
    here, there = level(RectifiedFlow(), 1.0), level(RectifiedFlow(), 0.9)
    assert steer.flow_sde(0.7)(X, X0, here, there).std == pytest.approx(0.7 * math.sqrt(1.0 / 0.1) * math.sqrt(0.1))


@pytest.mark.parametrize(("steps", "last_step", "chain"), [(10, 0.218, 0.228), (20, 0.110, 0.114)])
def test_flow_sde_leaves_noise_on_a_point_mass(steps, last_step, chain):
    """Its last step from the right marginal leaves std .218 (.110), the whole chain more; CPS and DDIM leave none."""
    grid = shifted_times(steps)
    on_x, _, std = response(steer.flow_sde(0.7), level(RectifiedFlow(), grid[-2]), level(RectifiedFlow(), 0.0))
    assert math.hypot(on_x * grid[-2], std) == pytest.approx(last_step, abs=5e-4)
    process = gaussian([0.3], 0.0, schedule=RectifiedFlow(), times=grid, transition=steer.flow_sde(0.7))
    assert math.sqrt(float(chain_law(process).covs)) == pytest.approx(chain, abs=5e-4)
    for rule in (steer.cps(0.7), steer.ddim(1.0)):
        assert float(chain_law(process.with_rule(rule)).covs) == pytest.approx(0.0, abs=1e-15)


def test_dance_sde_is_a_constant_coefficient():
    """x - u D + eta^2 s D / 2 with noise eta sqrt(D), s the score."""
    t, t_next, eta = 0.7, 0.5, 0.3
    u, score = (X - X0) / t, ((1.0 - t) * X0 - X) / t**2
    step = steer.euler_maruyama(lambda at: eta)(X, X0, level(RectifiedFlow(), t), level(RectifiedFlow(), t_next))
    torch.testing.assert_close(step.mean, X - u * 0.2 + 0.5 * eta**2 * score * 0.2, rtol=1e-12, atol=1e-12)
    assert step.std == pytest.approx(eta * math.sqrt(0.2), rel=1e-12)


def test_own_coefficient_on_vp_is_the_vp_sde():
    """dx = (-beta x / 2 - beta score) dt + sqrt(beta) dw backwards in time (Song et al. 2021, Eqs. 6 and 11)."""
    path = VP()
    here, there = level(path, 0.6), level(path, 0.58)
    beta, gap = 0.1 + 0.6 * 19.9, 0.02
    score = (here.alpha * X0 - X) / here.sigma**2
    step = steer.euler_maruyama()(X, X0, here, there)
    torch.testing.assert_close(step.mean, X + (0.5 * beta * X + beta * score) * gap, rtol=1e-9, atol=1e-9)
    assert step.std == pytest.approx(math.sqrt(beta * gap), rel=1e-9)


@pytest.mark.parametrize(
    ("path", "g"),
    [
        ("vp", None),
        ("flow", lambda at: at.sigma),
        ("flow", lambda at: 0.5),
        ("vp", lambda at: 1.0),
    ],
)
def test_euler_maruyama_reaches_the_continuous_law_at_first_order(path, g):
    """Error of the chain's exact law: falls by 2 (to 15%) as steps double, to under 1% of the spread."""
    rule = steer.euler_maruyama(g)
    start = 0.999 if path == "flow" else 1.0

    def error(steps):
        grid = steer.uniform_times(PATHS[path], steps, start=start)
        law = chain_law(
            gaussian([0.5, 0.0], [[1.0, 0.3], [0.3, 0.4]], schedule=PATHS[path], times=grid).with_rule(rule)
        )
        return float((law.covs[0] - torch.tensor([[1.0, 0.3], [0.3, 0.4]], dtype=torch.float64)).norm())

    errors = [error(steps) for steps in (200, 400, 800)]
    assert errors[-1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.15)


def test_own_coefficient_at_pure_noise_says_what_to_do():
    with pytest.raises(steer.SteerError, match=r"diverges at t = 1.0, where alpha = 0; start the grid lower"):
        steer.euler_maruyama()(X, X0, level(RectifiedFlow(), 1.0), level(RectifiedFlow(), 0.9))


# --- the law of a step ------------------------------------------------------------------------------------------------


@each_rule
@each_path
def test_std_is_known_before_the_step(rule, path):
    grid = [level(PATHS[path], t) for t in times(path, 9)]
    for here, there in itertools.pairwise(grid):
        assert rule(X, X0, here, there).std == rule.std(here, there)


def test_log_prob_is_a_sum_of_normals():
    mean, x = Key(5).normal((2, 3, 4, 5)), Key(6).normal((2, 3, 4, 5))
    expected = TorchNormal(mean, 0.37).log_prob(x).sum((2, 3))
    got = Normal(mean, 0.37).log_prob(x)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    assert got.shape == (2, 3)
    single = Normal(mean.float(), 0.37).log_prob(x.float())
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, expected, rtol=1e-6, atol=0)


def test_log_prob_of_scalar_events():
    """States (B, N) of event ()."""
    mean, x = Key(5).normal((2, 3)), Key(6).normal((2, 3))
    torch.testing.assert_close(Normal(mean, 0.37).log_prob(x), TorchNormal(mean, 0.37).log_prob(x))


def test_shift_moves_the_mean_only():
    delta = Key(7).normal((2, 3, 4))
    law = Normal(X, 0.5)
    moved = law.shift(delta)
    assert torch.equal(moved.mean, X + delta)
    assert moved.std == 0.5
    torch.testing.assert_close(moved.sample(Key(8)), law.sample(Key(8)) + delta, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(moved.log_prob(X + delta), law.log_prob(X))


def test_samples_have_the_law():
    """z of mean and variance over 40 000 coordinates, SE 1 / sqrt(n) and sqrt(2 / n)."""
    mean = torch.full((2, 5000, 4), 1.5, dtype=torch.float32)
    drawn = Normal(mean, 0.25).sample(Key(9))
    assert drawn.dtype == torch.float32
    scaled = (drawn.double().flatten() - 1.5) / 0.25
    assert abs(z(scaled)) < LIMIT
    assert abs(z(scaled.square() - 1.0)) < LIMIT
    assert abs(z((1.05 * scaled).square() - 1.0)) > LIMIT


def test_a_step_without_noise_has_no_density():
    still = steer.ode()(X, X0, level(VP(), 0.5), level(VP(), 0.4))
    assert torch.equal(still.sample(Key(0)), still.mean)
    with pytest.raises(steer.NotStochasticError, match=r"std = 0 has no density; use a stochastic rule such as"):
        still.log_prob(X)


@pytest.mark.parametrize(
    "make",
    [
        lambda: steer.ddim(1.5), lambda: steer.ddim(-0.1), lambda: steer.cps(2.0), lambda: steer.churn(-1.0),
        lambda: steer.flow_sde(-0.7), lambda: steer.ddim(math.nan),
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_named(make):
    with pytest.raises(steer.SteerError, match=r"(eta|gamma|a) must be in \[0.0, .*\], got"):
        make()


def test_steps_keep_the_dtype_and_pass_gradients():
    here, there = level(RectifiedFlow(), 0.6), level(RectifiedFlow(), 0.4)
    for rule in RULES.values():
        assert rule(X.float(), X0.float(), here, there).mean.dtype == torch.float32
        x0 = X0.clone().requires_grad_()
        rule(X, x0, here, there).mean.sum().backward()
        on_x0 = response(rule, here, there)[1]
        torch.testing.assert_close(x0.grad, torch.full_like(X0, on_x0))
