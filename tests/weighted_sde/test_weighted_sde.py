"""The weighted SDE against quadrature in the plane: annealing, products, guidance, tilts, on every path.

Steps are finite, so laws are right up to a bias linear in the step. Every case runs at two step sizes and is judged by
the extrapolation to none (`exact.extrapolated`): |z| < 4 over 128 independent problems. Evidence-weighted estimates are
consistent in problems at any number of particles. A case beyond 4 is judged again by 4 times the problems, another key.
The mutants are what papers' code does, or what a slip of the pen would do; the same test has to reject each.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from exact import LIMIT, PATHS, Grid2D, Quadratic, extrapolated, mixture_2d

import steer
from steer.models import GaussianMixture
from steer.weighted_sde.composite import compose
from steer.weighted_sde.derivatives import ValueDerivatives
from steer.weighted_sde.engine import Terms, WeightedSDE
from steer.weighted_sde.step_integrals import span

BATCH, PARTICLES, STEPS = 128, 16, 40
THREE = mixture_2d()
TWO = GaussianMixture([[1.0, 1.0], [-1.5, -0.5]], [[[0.8, 0.1], [0.1, 0.6]], [[0.7, -0.2], [-0.2, 0.9]]], [0.6, 0.4])
NARROW = GaussianMixture([[1.5, 0.5], [-1.0, 0.0]], [[[0.4, 0.1], [0.1, 0.3]], [[0.3, -0.1], [-0.1, 0.4]]], [0.7, 0.3])
WIDE = GaussianMixture([[0.5, 0.0], [-1.0, 0.5]], [[[1.2, 0.2], [0.2, 1.0]], [[1.0, 0.0], [0.0, 1.3]]], [0.5, 0.5])
REWARD = Quadratic([1.0, 0.5], 0.6)
EXACT = steer.FeynmanKac(probes=None)
SCORE, HALF, BASE = steer.score_transport, steer.half_transport, steer.base_transport


def process(mixture, path, steps):
    """A chain even in log-SNR, down to a noise that leaves the last step's error below what is tested."""
    times = steer.log_snr_times(PATHS[path], steps, end=1e-4 if path == "ve" else 1e-3)
    return steer.models.gaussian_mixture(
        mixture.means, mixture.covs, mixture.weights, schedule=PATHS[path], times=times, dtype=torch.float64
    )


def power(beta):
    return Grid2D(lambda x: beta * THREE.log_prob(x), edge=16.0 if beta < 1 else 9.0)


def guided(w, tilt=False):
    return Grid2D(lambda x: (1.0 - w) * WIDE.log_prob(x) + w * NARROW.log_prob(x) + (REWARD(x) if tilt else 0.0))


PRODUCT = Grid2D(lambda x: THREE.log_prob(x) + TWO.log_prob(x))
TILTED = Grid2D(lambda x: THREE.log_prob(x) + REWARD(x))


def anneal(path, beta, **options):
    return lambda steps, **o: steer.fkc(process(THREE, path, steps), exponent=beta, **options, **o)


def multiply(path, **options):
    return lambda steps, **o: steer.fkc([process(THREE, path, steps), process(TWO, path, steps)], **options, **o)


def guide(path, w, reward=None, **options):
    def run(steps, **o):
        return steer.fkc(
            process(NARROW, path, steps), reward, unconditional=process(WIDE, path, steps), guidance=w, **options, **o
        )

    return run


def tilt(path, **options):
    return lambda steps, **o: steer.fkc(process(THREE, path, steps), REWARD, **options, **o)


def worst(run, law, *, key=1, batch=BATCH, particles=PARTICLES, steps=STEPS):
    """Largest |z| and its name."""
    found = extrapolated(
        lambda count: run(count, batch=batch, particles=particles, key=steer.Key(key).fold(count, batch)), law, steps
    )
    return max((abs(z) if math.isfinite(z) else math.inf, name, found[name]) for name, (z, _, _) in found.items())


def check(run, law, **options):
    found = worst(run, law, **options)
    if found[0] >= LIMIT:
        found = worst(run, law, **{**options, "batch": 4 * BATCH})
    assert found[0] < LIMIT, found


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("beta", [0.5, 2.0, 3.0])
def test_annealing_along_the_flow(path, beta):
    check(anneal(path, beta, weight=EXACT), power(beta), steps=60 if beta == 3.0 else STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_annealing_by_the_score(path):
    """Where its weights have a variance: A < 1.21."""
    check(anneal(path, 0.5, transport=SCORE), power(0.5))
    check(anneal(path, 0.5, transport=SCORE, weight=steer.KernelRatio()), power(0.5))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_products(path):
    check(multiply(path, weight=EXACT), PRODUCT)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("w", [1.4, 2.0])
def test_guidance(path, w):
    check(guide(path, w), guided(w))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_strong_guidance(path):
    """w = 4: weights of large variance, so more particles and smaller steps."""
    check(guide(path, 4.0), guided(4.0), particles=48, steps=2 * STEPS)


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_guidance_with_any_noise(noise):
    selection = steer.resample(threshold=0.0 if noise == 0.0 else 0.5)
    check(guide("vp", 2.0, noise=noise, selection=selection), guided(2.0))


TRANSPORTS = {"score": SCORE, "half": HALF, "base": BASE}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_tilts_by_kernel_ratios(path, transport):
    check(tilt(path, transport=TRANSPORTS[transport]), TILTED)


@pytest.mark.parametrize(
    ("path", "transport"), [("vp", "score"), ("vp", "half"), ("vp", "base"), ("ve", "half"), ("flow", "base")]
)
def test_tilts_on_the_state_by_kernel_ratios(path, transport):
    check(tilt(path, transport=TRANSPORTS[transport], look_ahead=steer.at_state()), TILTED)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transport", [SCORE, HALF], ids=["score", "half"])
def test_tilts_by_feynman_kac(path, transport):
    check(tilt(path, transport=transport, weight=EXACT), TILTED, steps=80 if path == "ve" else STEPS)


@pytest.mark.parametrize("transport", [SCORE, HALF, BASE], ids=["score", "half", "base"])
def test_tilts_on_the_state_by_feynman_kac(transport):
    check(tilt("vp", transport=transport, weight=EXACT, look_ahead=steer.at_state()), TILTED)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_guidance_and_tilt(path):
    check(guide(path, 2.0, REWARD), guided(2.0, True))
    if path == "vp":
        check(guide(path, 2.0, REWARD, weight=EXACT), guided(2.0, True))


@pytest.mark.slow
@pytest.mark.parametrize("weight", [steer.KernelRatio(), EXACT], ids=["kernel", "feynman-kac"])
def test_exponents_that_change_along_the_path(weight):
    """From p at the noise to p^(3/2) at the data, log q by the Ito estimator."""

    def run(steps, **o):
        model = process(THREE, "vp", steps)
        return steer.fkc(
            model, exponent=lambda level: (1.5 - 0.5 * level.sigma**2,), weight=weight, transport=SCORE, **o
        )  # fmt: skip

    check(run, power(1.5), particles=32, steps=2 * STEPS)


@pytest.mark.slow
def test_other_look_aheads():
    check(tilt("vp", look_ahead=steer.ode_steps(3)), TILTED)


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_a_flow_map_leaves_the_ramp_alone_in_the_weights(path):
    """FMTT's case, exact: half transport and the flow map of N(0, 1), weights (ramp' - ramp) r(flow(x))."""
    schedule, reward = PATHS[path], Quadratic([0.8, -0.4], 0.5)

    def flow(x, t):
        alpha, sigma, _, _ = schedule(t)
        return x / math.sqrt(alpha**2 + sigma**2)

    def run(steps, **o):
        times = steer.log_snr_times(schedule, steps, end=1e-3)
        model = steer.models.gaussian(torch.zeros(2), 1.0, schedule=schedule, times=times, dtype=torch.float64)
        look = steer.flow_map(flow, ramp=lambda level: level.alpha**2)
        return steer.fkc(model, reward, look_ahead=look, transport=HALF, weight=EXACT, **o)

    check(run, Grid2D(lambda x: -0.5 * x.square().sum(1) - math.log(2.0 * math.pi) + reward(x)))


# Mutants.


def reject(run, law, **options):
    """8 times the problems: mutants get the power that the library's own runs do not need."""
    found = worst(run, law, **{"batch": 8 * BATCH, **options})
    assert found[0] > LIMIT, found


def replaced(monkeypatch, **fields):
    """WeightedSDE.terms with functions of its own parts in place of them."""
    own = WeightedSDE.terms

    def terms(self, *args):
        found = own(self, *args)
        return found._replace(**{name: change(getattr(found, name)) for name, change in fields.items()})

    monkeypatch.setattr(WeightedSDE, "terms", terms)


STATE = {"transport": SCORE, "weight": EXACT, "look_ahead": steer.at_state()}


@pytest.mark.slow
@pytest.mark.parametrize("factor", [-1.0, 2.0])
def test_mutant_sign_and_doubled_weight_are_rejected(monkeypatch, factor):
    own = Terms.total
    monkeypatch.setattr(Terms, "total", lambda self: factor * own(self))
    reject(guide("vp", 2.0), guided(2.0))


@pytest.mark.slow
def test_mutant_without_advection_is_rejected(monkeypatch):
    replaced(monkeypatch, advection=torch.zeros_like)
    reject(tilt("vp", **STATE), TILTED)


@pytest.mark.slow
def test_mutant_without_laplacian_is_rejected(monkeypatch):
    replaced(monkeypatch, laplacian=torch.zeros_like)
    reject(tilt("vp", **STATE), TILTED)


@pytest.mark.slow
def test_mutant_without_time_derivative_is_rejected(monkeypatch):
    replaced(monkeypatch, partial=torch.zeros_like)
    reject(tilt("vp", **STATE), TILTED)


@pytest.mark.slow
def test_mutant_total_for_partial_derivative_is_rejected(monkeypatch):
    """d rho / dt along the flow, where the state moves too, instead of at the state."""
    own = ValueDerivatives.later_value

    def moved(self, x, x0, k):
        here, there = self.target.levels[k], self.target.levels[k + 1]
        return own(self, there.alpha * x0 + (x - here.alpha * x0) * (there.sigma / here.sigma), x0, k)

    monkeypatch.setattr(ValueDerivatives, "later_value", moved)
    reject(tilt("vp", **STATE), TILTED)


@pytest.mark.slow
def test_mutant_without_the_constant_is_rejected(monkeypatch):
    """(A - 1) div f is the same for all particles: samples do not need it, the evidence does."""
    own = WeightedSDE.model_terms
    monkeypatch.setattr(WeightedSDE, "model_terms", lambda *args: own(*args)._replace(normaliser=0.0))
    reject(anneal("vp", 2.0, weight=EXACT), power(2.0))


def churned(here, there):
    """EDM's churn as injected noise: what raising sigma by 1 + gamma adds, over what a step takes away."""
    return ((1.0 + _gamma(here, there)) ** 2 - 1.0) * here.sigma**2 / (here.sigma**2 - there.sigma**2)


def _gamma(here, there):
    return 2.0 * math.log(here.sigma / there.sigma)  # in proportion to the step, as S_churn / steps is


@pytest.mark.slow
def test_churn_is_weighted_by_the_net_interval(monkeypatch):
    run = guide("ve", 1.4, noise=churned)
    check(run, guided(1.4), steps=2 * STEPS)
    own = WeightedSDE.model_terms

    def released(self, state, point):
        found = own(self, state, point)
        here, there = self.target.levels[state.k], self.target.levels[state.k + 1]
        if there.sigma == 0.0:
            return found
        raised = (1.0 + _gamma(here, there)) * here.sigma
        wrong = raised * (raised - there.sigma) / (0.5 * (here.sigma**2 - there.sigma**2))
        return found._replace(models=wrong * found.models)

    monkeypatch.setattr(WeightedSDE, "model_terms", released)
    reject(run, guided(1.4), steps=2 * STEPS)


# Parts.


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("beta", [0.5, 2.0, 5.0])
def test_a_gaussian_is_annealed_without_step_bias(path, beta):
    """Integrated coefficients are exact for N(0, sigma_data^2): six steps, weights equal, evidence to the last step."""
    schedule, size, std = PATHS[path], 16, 1.7
    model = steer.models.gaussian(
        torch.zeros(size), std**2, schedule=schedule, dtype=torch.float64,
        times=steer.log_snr_times(schedule, 6, end=1e-4 if path != "ve" else 1e-6),
    )  # fmt: skip
    result = steer.fkc(model, exponent=beta, weight=EXACT, batch=64, particles=64, sigma_data=std)
    exact = 0.5 * size * ((1.0 - beta) * math.log(2.0 * math.pi * std**2) - math.log(beta))
    torch.testing.assert_close(result.log_evidence, torch.full((64,), exact, dtype=torch.float64), rtol=0, atol=0.02)
    assert float((result.ess / 64).min()) > 0.999
    spread = result.x.double().square().mean((1, 2)) * beta / std**2 - 1.0
    assert abs(float(spread.mean() / (spread.std() / 8.0))) < LIMIT


def test_integrated_coefficients_have_the_left_point_as_limit():
    for schedule in PATHS.values():
        for first, second in ((0.5, 0.499), (0.2, 0.1999)):
            here, there = (steer.schedules.level(schedule, t) for t in (first, second))
            step = span(here, there, 1.0)
            for value in (step.rate, step.drift(1.0), step.drift(2.0), step.drift(5.0), step.noise(3.0, 1.0)):
                assert value / step.gamma == pytest.approx(1.0, abs=0.02)
            assert step.noise(1.0, 1.0) == pytest.approx(step.noise(1.0 + 1e-6, 1.0), rel=1e-5)
            assert step.drift(2.0) == pytest.approx(step.gamma, rel=1e-12)


def test_the_composites_own_transition_is_ancestral_sampling_for_one_model():
    model = process(THREE, "vp", 8)
    target = compose(model)
    x = target.prior(steer.Key(0), 1, 5)
    x0 = target.denoise(x, 3)
    ours, theirs = target.transition(x, x0, 3), model.transition(x, x0, 3)
    torch.testing.assert_close(ours.mean, theirs.mean)
    assert ours.std == pytest.approx(theirs.std)


@pytest.mark.slow
def test_derivatives_agree_with_finite_differences_and_probes_with_the_trace():
    target = compose([process(THREE, "vp", 8), process(TWO, "vp", 8)], exponent=[1.5, -0.3])
    from steer.core.objective import open_objective
    from steer.weighted_sde.derivatives import RequiredDerivatives

    metered, objective, _ = open_objective(target, REWARD)
    x = target.prior(steer.Key(0), 2, 3)
    everything = RequiredDerivatives(True, True, True, True)
    look = ValueDerivatives(metered, objective, 0.7, steer.x0_hat(), None, steer.Key(0))
    point = look(x, 4, everything)
    trace = bend = 0.0
    for i in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = 1e-5
        up, down = (look(x + sign * step, 4, everything) for sign in (1.0, -1.0))
        torch.testing.assert_close(point.gradient[..., i], (up.value - down.value) / 2e-5, rtol=1e-5, atol=1e-6)
        trace = trace + (up.score - down.score)[..., i] / 2e-5
        bend = bend + (up.gradient - down.gradient)[..., i] / 2e-5
    torch.testing.assert_close(point.divergence, trace, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(point.laplacian, bend, rtol=1e-5, atol=1e-6)
    probed = ValueDerivatives(metered, objective, 0.7, steer.x0_hat(), 400, steer.Key(0))(x, 4, everything)
    torch.testing.assert_close(probed.divergence, point.divergence, rtol=0.1, atol=0.5)
    torch.testing.assert_close(probed.laplacian, point.laplacian, rtol=0.2, atol=0.5)


@pytest.mark.slow
def test_log_q_along_the_path():
    """The Ito estimator against the model's own marginal, to an error that falls as 1 / sqrt(steps)."""
    errors = []
    for steps in (100, 400):
        model = process(THREE, "vp", steps)
        events = []
        steer.fkc(
            model, exponent=lambda level: (1.0 + 1e-9 * level.sigma,), transport=SCORE, batch=4, particles=64,
            selection=steer.resample(threshold=0.0), on_step=events.append,
        )  # fmt: skip
        last = events[-2].state
        exact = THREE.log_prob(last.x, last.process.levels[last.k])
        errors.append(float((last.path.log_q[..., 0] - exact).square().mean().sqrt()))
    assert errors[1] < 0.65 * errors[0] < 0.4


@pytest.mark.parametrize(
    ("weight", "transport"),
    [(EXACT, SCORE), (EXACT, HALF), (EXACT, BASE), (steer.KernelRatio(), HALF)],
    ids=["score", "half", "base", "half by kernels"],
)
def test_a_constant_exponent_is_a_smaller_reward(weight, transport):
    """On the way, a value tempered by a half is half the value, in the weights as in the drift: to rounding."""

    def half(state, value):
        return torch.full_like(value[:, 0], 0.5)

    def states(reward, tempering):
        seen = []
        steer.fkc(
            process(THREE, "vp", 8), reward, weight=weight, transport=transport, tempering=tempering, batch=2,
            particles=5, selection=steer.resample(threshold=0.0), on_step=lambda event: seen.append(event.state),
        )  # fmt: skip
        return seen[:8]

    tempered, smaller = states(REWARD, half), states(lambda x: 0.5 * REWARD(x), None)
    for mine, theirs in zip(tempered, smaller, strict=True):
        torch.testing.assert_close(mine.x, theirs.x, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(mine.log_weight, theirs.log_weight, rtol=1e-10, atol=1e-10)
    assert (smaller[6].log_weight - smaller[3].log_weight).abs().max() > 0.01  # there is something to compare


@pytest.mark.parametrize("sigma_data", [0.0, 1.0])
def test_the_last_step_weighs_by_the_noise_that_is_left(sigma_data):
    """At sigma = 0 the integral of g^2 is sigma^2, whatever the data's scale: by (2), -sigma^2 |S|^2 / 4 for A = 1/2
    and one model, whose score is twice that of S."""
    target = compose(process(THREE, "vp", 5), exponent=0.5)
    k, sigma = 4, target.levels[4].sigma
    x = steer.Key(0).normal((2, 3, 2))
    state = steer.Trajectory.begin(target, x, k=k)
    score = steer.Key(1).normal((2, 3, 2))
    point = SimpleNamespace(components=2.0 * score[:, :, None], score=score)
    engine = SimpleNamespace(target=target, last=lambda k: True, span=lambda k: span(*target.levels[4:6], sigma_data))
    found = WeightedSDE.model_terms(engine, state, point)  # pyright: ignore
    assert target.levels[5].sigma == 0.0
    torch.testing.assert_close(found.models, -0.5 * sigma**2 * score.square().sum(2))
