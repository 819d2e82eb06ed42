"""Analytic models: denoiser by autograd, tilted answers by quadrature, the exact reverse kernel, and exact chains."""

from __future__ import annotations

import math

import pytest
import torch
from exact import LIMIT, PATHS, Linear, Quadratic, mixture_2d, mixture_16d, times, worst, z
from scipy import stats

import steer
from steer.key import Key
from steer.models import Exact, ExactStep, GaussianMixture, chain_law, finite_data, gaussian, gaussian_mixture
from steer.processes.schedules import RectifiedFlow, level
from steer.types import Level

MIXTURES = {
    "full": mixture_2d(),
    "isotropic": GaussianMixture([[2.0, 0.0], [-2.0, 1.0], [0.0, -2.0]], [0.5, 0.1, 1.2], [0.5, 0.3, 0.2]),
    "16d": mixture_16d(),
}
each_mixture = pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
each_path = pytest.mark.parametrize("path", PATHS)


class Form:
    """r(x) = -x'Ax/2 + b'x + c."""

    def __init__(self, matrix, vector, constant=0.0):
        self.matrix = torch.as_tensor(matrix, dtype=torch.float64)
        self.vector = torch.as_tensor(vector, dtype=torch.float64)
        self.constant = constant

    def __call__(self, x):
        return -0.5 * torch.einsum("mi,ij,mj->m", x, self.matrix, x) + x @ self.vector + self.constant

    def quadratic_form(self, size):
        return steer.QuadraticForm(self.matrix, self.vector, self.constant)


def plane(limit: float = 11.0, points: int = 331) -> tuple[torch.Tensor, float]:
    """Grid points (M, 2) and the area of a cell: the trapezoid rule on smooth densities that vanish at its rim."""
    axis = torch.linspace(-limit, limit, points, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


# --- the mixture and its denoiser -------------------------------------------------------------------------------------


@each_mixture
@each_path
def test_denoiser_is_tweedie_of_the_density(mixture, path):
    """(x + sigma^2 grad log p_t) / alpha with the gradient of `log_prob` by autograd, to 1e-8."""
    for t in (0.02, 0.2, 0.5, 0.9):
        at = level(PATHS[path], t)
        x = math.hypot(at.alpha, at.sigma) * 2.0 * Key(0).normal((3, 5, mixture.means.shape[1]))
        x.requires_grad_()
        (score,) = torch.autograd.grad(mixture.log_prob(x, at).sum(), x)
        expected = (x + at.sigma**2 * score) / at.alpha
        torch.testing.assert_close(mixture.denoise(x, at.alpha, at.sigma), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mixture", [MIXTURES["full"], MIXTURES["isotropic"]], ids=["full", "isotropic"])
def test_density_is_that_of_noised_data(mixture):
    """Against torch.distributions on alpha x_0 + sigma eps, and normalised in the plane."""
    x, area = plane()
    for at in (None, Level(0.5, 0.6, 0.7, 0.0, 0.0)):
        alpha, sigma = (1.0, 0.0) if at is None else (at.alpha, at.sigma)
        covs = alpha**2 * mixture.covs + sigma**2 * torch.eye(2, dtype=torch.float64)
        modes = torch.distributions.MultivariateNormal(alpha * mixture.means, covs)
        family = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(mixture.weights), modes)
        torch.testing.assert_close(mixture.log_prob(x, at), family.log_prob(x), rtol=1e-8, atol=1e-8)
        assert float(mixture.log_prob(x, at).exp().sum() * area) == pytest.approx(1.0, abs=1e-9)
    share = mixture.responsibilities(x[:7].view(7, 1, 2))
    assert share.shape == (7, 1, 3)
    joint = torch.stack([w.log() + m for w, m in zip(mixture.weights, modes_log_prob(mixture, x[:7]), strict=True)], 1)
    torch.testing.assert_close(share[:, 0], torch.softmax(joint, 1))


def modes_log_prob(mixture, x):
    return torch.distributions.MultivariateNormal(mixture.means[:, None], mixture.covs[:, None]).log_prob(x)


def test_isotropic_covariances_are_a_special_case_of_full_ones():
    isotropic = MIXTURES["isotropic"]
    full = GaussianMixture(isotropic.means, isotropic.covs, isotropic.weights)
    x = 3.0 * Key(1).normal((2, 6, 2))
    for alpha, sigma in ((1.0, 0.1), (0.6, 0.8), (0.0, 1.0), (1.0, 80.0)):
        torch.testing.assert_close(isotropic.denoise(x, alpha, sigma), full.denoise(x, alpha, sigma))
    a, b = (m.exact(Quadratic([1.0, 0.5], 0.6)) for m in (isotropic, full))
    torch.testing.assert_close(a.covs, b.covs)
    torch.testing.assert_close(a.weights, b.weights)
    assert a.log_evidence == pytest.approx(b.log_evidence, rel=1e-12)


def test_denoiser_keeps_dtype_and_shape():
    mixture = mixture_2d()
    x = Key(2).normal((3, 4, 2))
    single = mixture.denoise(x.float(), 0.6, 0.8)
    assert single.dtype == torch.float32
    assert torch.equal(single, mixture.denoise(x.float().double(), 0.6, 0.8).float())
    torch.testing.assert_close(mixture.denoise(x, 0.0, 1.0), (mixture.weights @ mixture.means).expand(3, 4, 2))


def test_weights_are_normalised_in_float64():
    assert GaussianMixture([[0.0], [1.0]], [1.0, 1.0], [9, 1]).weights.tolist() == [0.9, 0.1]
    assert GaussianMixture([[0.0], [1.0]], [1.0, 1.0]).weights.tolist() == [0.5, 0.5]
    assert GaussianMixture([[0.0], [1.0]], [1.0, 1.0], [0.9, 0.1]).weights.tolist() == [0.9, 0.1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([0.0, 1.0], [1.0, 1.0]), r"means must have shape \(K, D\), got \(2,\)"),
        (([[0.0], [1.0]], [1.0]), r"covs must have shape \(2, 1, 1\) or \(2,\), got \(1,\)"),
        (([[0.0], [1.0]], [1.0, 1.0], [1.0, -1.0]), "weights must be 2 positive numbers"),
        (([[0.0], [1.0]], [1.0, 1.0], [1.0]), "weights must be 2 positive numbers"),
        (([[0.0], [1.0]], [1.0, -0.1]), r"positive \(semi\)definite, got an eigenvalue of -0.1"),
        (([[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]]), r"positive \(semi\)definite, got an eigenvalue of -1"),
    ],
)
def test_bad_mixtures_are_refused(arguments, says):
    with pytest.raises(steer.SteerError, match=says):
        GaussianMixture(*arguments)


# --- tilted laws ------------------------------------------------------------------------------------------------------

FORMS = {
    "linear": Linear([0.7, -0.5], 0.3),
    "quadratic": Quadratic([1.0, 0.5], 0.6),
    "correlated": Form([[0.8, 0.3], [0.3, 0.5]], [0.2, -0.4], -1.0),
    "indefinite": Form([[0.5, 0.2], [0.2, -0.15]], [0.2, 0.1]),
}


@pytest.mark.parametrize("mixture", [MIXTURES["full"], MIXTURES["isotropic"]], ids=["full", "isotropic"])
@pytest.mark.parametrize("reward", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_exact_equals_quadrature(mixture, reward, temperature):
    """Evidence, mode masses, mean and covariance of p(x) exp(r(x) / T) against sums over a grid, to 1e-7."""
    x, area = plane()
    tilt = (reward(x) / temperature).exp()
    by_mode = mixture.log_joint(x, 1.0, 0.0).exp() * tilt[:, None] * area
    evidence = by_mode.sum()
    density = by_mode.sum(1) / evidence
    mean = density @ x
    exact = mixture.exact(reward, temperature=temperature)
    assert exact.log_evidence == pytest.approx(float(evidence.log()), abs=1e-7)
    torch.testing.assert_close(exact.weights, by_mode.sum(0) / evidence, rtol=0, atol=1e-7)
    torch.testing.assert_close(exact.mean, mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(exact.cov, (x - mean).T @ ((x - mean) * density[:, None]), rtol=0, atol=1e-7)
    for k in range(3):
        share = by_mode[:, k] / by_mode[:, k].sum()
        torch.testing.assert_close(exact.means[k], share @ x, rtol=0, atol=1e-7)
        centred = x - share @ x
        torch.testing.assert_close(exact.covs[k], centred.T @ (centred * share[:, None]), rtol=0, atol=1e-7)


def test_exact_through_the_process():
    process = gaussian([1.0], 0.5, steps=3)
    exact = process.exact(Linear([2.0]), temperature=4.0)
    assert float(exact.mean) == pytest.approx(1.0 + 0.5 * 0.5)
    assert exact.log_evidence == pytest.approx(0.5 * 1.0 + 0.5 * 0.25 * 0.5)
    flat = mixture_2d().exact(Linear([0.0, 0.0], 0.25))
    assert flat.log_evidence == pytest.approx(0.25, rel=1e-12)
    torch.testing.assert_close(flat.covs, mixture_2d().covs)


def test_exact_refuses_what_has_no_normaliser_or_no_form():
    mixture = GaussianMixture([[0.0, 0.0]], [1.0])
    growing = Form([[-1.5, 0.0], [0.0, 0.0]], [0.0, 0.0])
    with pytest.raises(steer.ModelError, match=r"no finite normalizing constant: .* raise the temperature"):
        mixture.exact(growing)
    assert mixture.exact(growing, temperature=2.0).log_evidence == pytest.approx(-0.5 * math.log(0.25))
    with pytest.raises(steer.ModelError, match=r"quadratic_form\(dim\).*got function"):
        mixture.exact(lambda x: x.sum(1))


def test_finite_data_without_bandwidth_is_a_softmax_over_points():
    points, masses = Key(3).normal((1, 12, 3))[0], torch.arange(1.0, 13.0, dtype=torch.float64)
    reward = Quadratic([0.5, 0.0, -0.5], 1.3)
    process = finite_data(points, 0.0, masses, steps=3)
    exact = process.exact(reward, temperature=0.7)
    logits = (masses / masses.sum()).log() + reward(points) / 0.7
    torch.testing.assert_close(exact.weights, torch.softmax(logits, 0))
    torch.testing.assert_close(exact.means, points)
    assert float(exact.covs.abs().max()) == 0.0
    assert exact.log_evidence == pytest.approx(float(logits.logsumexp(0)), rel=1e-12)
    # and the prediction of a nearly clean state is the nearest point
    near = process.reference.denoise(points + 0.01, 1.0, 0.02)
    torch.testing.assert_close(near, points, rtol=0, atol=1e-6)


def test_moments_of_an_exact_law():
    law = Exact(torch.tensor([0.25, 0.75]).double(), torch.tensor([[0.0], [4.0]]).double(), torch.ones(2, 1, 1), 0.0)
    law = Exact(law.weights, law.means, law.covs.double(), 0.0)
    assert float(law.mean) == 3.0
    assert float(law.cov) == 1.0 + 0.25 * 9.0 + 0.75 * 1.0


# --- the exact reverse kernel -----------------------------------------------------------------------------------------

LINE = GaussianMixture([[-1.5], [0.4], [2.0]], [[[0.2]], [[0.5]], [[0.1]]], [0.3, 0.5, 0.2])


@each_path
@pytest.mark.parametrize(("k", "steps"), [(1, 5), (3, 5), (4, 5)])
def test_exact_step_carries_one_marginal_to_the_next(path, k, steps):
    """integral of p(x' | x) q_t(x) dx = q_t'(x') by quadrature on a line, to 1e-6 of the density's height."""
    grid = [level(PATHS[path], t) for t in times(path, steps)]
    here, there = grid[k], grid[k + 1]
    reach = here.alpha * 5.0 + 8.0 * here.sigma
    x = torch.linspace(-reach, reach, 4001, dtype=torch.float64)
    weight = LINE.log_prob(x[:, None], here).exp() * float(x[1] - x[0])
    assert float(weight.sum()) == pytest.approx(1.0, abs=1e-9)
    kernel = ExactStep(LINE)(x.view(1, -1, 1), None, here, there)
    for target in torch.linspace(-4.0, 4.0, 17, dtype=torch.float64) * (there.alpha + there.sigma):
        carried = (kernel.log_prob(target.expand(1, len(x), 1)).exp()[0] * weight).sum()
        expected = LINE.log_prob(target.view(1, 1), there).exp()[0]
        assert float(carried) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("mixture", [MIXTURES["full"], MIXTURES["isotropic"]], ids=["full", "isotropic"])
def test_exact_step_is_normalised_in_the_plane_and_has_its_mean(mixture):
    x, area = plane()
    state = torch.tensor([[[0.4, -0.3], [-1.0, 0.8]]], dtype=torch.float64)
    kernel = ExactStep(mixture)(state, None, level(RectifiedFlow(), 0.6), level(RectifiedFlow(), 0.35))
    for n in range(2):
        alone = ExactStep(mixture)(state[:, n : n + 1], None, level(RectifiedFlow(), 0.6), level(RectifiedFlow(), 0.35))
        density = alone.log_prob(x[None]).exp()[0] * area
        assert float(density.sum()) == pytest.approx(1.0, abs=1e-9)
        torch.testing.assert_close(density @ x, kernel.mean[0, n], rtol=1e-8, atol=1e-8)


def test_exact_step_to_the_data_predicts_the_denoiser():
    """The mean of p(x_0 | x) is E[x_0 | x], on every path."""
    for schedule in PATHS.values():
        here, there = level(schedule, 0.4), level(schedule, 0.0)
        x = math.hypot(here.alpha, here.sigma) * Key(4).normal((2, 5, 2))
        for name in ("full", "isotropic"):
            kernel = ExactStep(MIXTURES[name])(x, None, here, there)
            expected = MIXTURES[name].denoise(x, here.alpha, here.sigma)
            torch.testing.assert_close(kernel.mean, expected, rtol=1e-8, atol=1e-8)


def test_exact_step_samples_its_density():
    """Chi-square of 20 000 draws from one state in 30 cells against the integral of `log_prob`; shift moves both."""
    here, there = level(RectifiedFlow(), 0.8), level(RectifiedFlow(), 0.2)
    kernel = ExactStep(LINE)(torch.full((1, 20_000, 1), 0.3, dtype=torch.float64), None, here, there)
    edges = torch.linspace(-2.5, 3.5, 31, dtype=torch.float64)
    fine = torch.linspace(-2.5, 3.5, 3001, dtype=torch.float64)

    def p_value(drawn, law):
        middle = 0.5 * (fine[1:] + fine[:-1])
        one = steer.models.mixture.MixtureTransition(law.log_share[:, :1], law.means[:, :1], law.factors, law.dtype)
        mass = one.log_prob(middle.view(1, -1, 1)).exp()[0] * float(fine[1] - fine[0])
        expected = 20_000 * mass.view(30, 100).sum(1)
        counts = torch.histogram(drawn.flatten(), edges).hist
        inside = expected > 8.0
        rest = 20_000 - float(counts[inside].sum()), 20_000 - float(expected[inside].sum())
        statistic = float(((counts - expected)[inside].square() / expected[inside]).sum()) + (
            (rest[0] - rest[1]) ** 2 / rest[1]
        )
        return stats.chi2.sf(statistic, int(inside.sum()))

    drawn = kernel.sample(Key(5))
    assert p_value(drawn, kernel) > 1e-5
    assert p_value(1.03 * drawn, kernel) < 1e-5
    moved = kernel.shift(torch.full_like(drawn, 0.25))
    assert p_value(moved.sample(Key(6)), moved) > 1e-5
    assert p_value(moved.sample(Key(6)), kernel) < 1e-5
    torch.testing.assert_close(moved.log_prob(drawn + 0.25), kernel.log_prob(drawn))
    torch.testing.assert_close(moved.mean, kernel.mean + 0.25)


def test_exact_step_in_the_plane_keeps_the_marginal():
    """x ~ q_t, x' drawn: z of first and second moments against q_t', 20 000 draws, correlated modes."""
    mixture, here, there = mixture_2d(), level(RectifiedFlow(), 0.7), level(RectifiedFlow(), 0.3)
    chosen = (mixture.weights.log() + Key(7).gumbel((1, 20_000, 3))).argmax(2)[0]
    factor = torch.linalg.cholesky(mixture.covs)[chosen]
    data = mixture.means[chosen] + torch.einsum("nij,nj->ni", factor, Key(8).normal((1, 20_000, 2))[0])
    x = here.alpha * data + here.sigma * Key(9).normal((1, 20_000, 2))[0]
    drawn = ExactStep(mixture)(x[None], None, here, there).sample(Key(10))[0]
    covs = there.alpha**2 * mixture.covs + there.sigma**2 * torch.eye(2, dtype=torch.float64)
    law = Exact(mixture.weights, there.alpha * mixture.means, covs, 0.0)
    assert worst(moment_scores(drawn, law))[0] < LIMIT
    assert worst(moment_scores(1.05 * drawn, law))[0] > LIMIT


def moment_scores(x: torch.Tensor, law) -> dict[str, float]:
    """z of mean and of every second moment of independent draws (M, D) against an exact answer."""
    centred = x.double() - law.mean
    size = x.shape[1]
    scores = {f"mean{i}": z(centred[:, i]) for i in range(size)}
    return scores | {
        f"cov{i}{j}": z(centred[:, i] * centred[:, j] - law.cov[i, j]) for i in range(size) for j in range(i, size)
    }


def test_exact_step_needs_a_density():
    process = finite_data([[0.0], [1.0]], 0.0, steps=2)
    with pytest.raises(steer.ModelError, match="give every mode a positive variance"):
        ExactStep(process.reference)(torch.zeros(1, 2, 1), None, *process.levels[1:])


# --- laws of chains ---------------------------------------------------------------------------------------------------

COV = [[1.0, 0.3], [0.3, 0.4]]
RULES = {
    "ddim": steer.ddim(1.0),
    "ddim-half": steer.ddim(0.5),
    "ode": steer.ode(),
    "cps": steer.cps(0.6),
    "churn": steer.churn(0.3),
    "euler": steer.euler_maruyama(lambda at: 0.8 * at.sigma),
}


def as_exact(law: GaussianMixture) -> Exact:
    return Exact(law.weights, law.means, law.covs, 0.0)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("path", ["vp", "flow"])
def test_chain_law_is_what_the_chain_samples(rule, path):
    """z of mean and covariance over 20 000 chains of 5 steps, whose distribution is far from the data's."""
    process = gaussian([0.5, -0.2], COV, schedule=PATHS[path], steps=5, transition=rule, dtype=torch.float64)
    result = steer.rollout(process, lambda x: x.sum(1), particles=20_000, keep_states=False, key=1)
    assert worst(moment_scores(result.x[0], as_exact(chain_law(process))))[0] < LIMIT
    assert worst(moment_scores(result.x[0], as_exact(process.reference)))[0] > LIMIT


@pytest.mark.parametrize("rule", [steer.ddim(1.0), steer.ode(), steer.euler_maruyama()], ids=["ddim", "ode", "euler"])
def test_chain_law_converges_at_first_order(rule):
    """Error of the covariance halves (to 15%) as steps double; the mean goes to the data's up to the prior's 1e-3."""
    errors = []
    for steps in (100, 200, 400):
        process = gaussian([0.5, -0.2], COV, steps=steps, transition=rule)
        law = chain_law(process)
        errors.append(float((law.covs - process.reference.covs).norm()))
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.15)
    torch.testing.assert_close(law.means, process.reference.means, rtol=0, atol=5e-3)


@pytest.mark.parametrize("cov", [0.6, COV], ids=["isotropic", "correlated"])
def test_chain_law_of_exact_steps_is_the_data(cov):
    """From alpha = 0 no discretisation and no prior mismatch is left, whatever the covariance."""
    grid = steer.uniform_times(RectifiedFlow(), 4, start=1.0)
    process = gaussian([0.5, -0.2], cov, schedule=RectifiedFlow(), times=grid)
    process = process.with_rule(ExactStep(process.reference))
    law = chain_law(process)
    torch.testing.assert_close(law.means, process.reference.means, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(law.covs, process.reference.covs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("means", [[[-1.0], [1.0]], [[-1.0, 0.0], [1.0, 0.5]]], ids=["line", "plane"])
def test_chain_law_refuses_mixtures(means):
    process = gaussian_mixture(means, [0.1, 0.1], steps=3)
    with pytest.raises(steer.ModelError, match="affine in the state: the data must be a single Gaussian"):
        chain_law(process)


@each_path
def test_exact_chains_sample_the_mixture(path):
    """z of moments of 20 000 chains of 3 exact steps against the mixture, from a prior that is nearly its marginal."""
    mixture = mixture_2d()
    process = gaussian_mixture(
        mixture.means,
        mixture.covs,
        mixture.weights,
        schedule=PATHS[path],
        times=times(path, 3),
        transition=ExactStep(mixture),
        dtype=torch.float64,
    )
    x = steer.rollout(process, lambda x: x.sum(1), particles=20_000, keep_states=False, key=2).x[0]
    assert worst(moment_scores(x, as_exact(mixture)))[0] < LIMIT
