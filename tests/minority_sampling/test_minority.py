"""Boost-and-Skip, minority guidance, self-guidance and the minority score, against closed forms.

The mixture has a mode of 3 %. Tolerances are four standard errors of the counts, stated where they are used.
"""

import math

import pytest
import torch

import steer
from steer import rewards
from steer.guidance import GuidedProcess, follow
from steer.minority_sampling import (
    boost_and_skip,
    minority,
    minority_guidance,
    minority_score,
    quantile_labels,
    self_guided,
)
from steer.minority_sampling.score import euclidean
from steer.minority_sampling.signal_level import level_near, share
from steer.models import ExactStep, GaussianMixture

SIZE, RARE = 8, 3
SCHEDULES = {"linear": steer.VP(), "cosine": steer.Cosine(), "flow": steer.RectifiedFlow()}


def law():
    means = torch.zeros(4, SIZE, dtype=torch.float64)
    means[0, 0], means[1, 1], means[2, 2] = 2.0, 2.0, 2.0
    means[RARE, :3], means[RARE, 3] = -0.9, -1.8
    return GaussianMixture(means, torch.tensor([0.25, 0.3, 0.35, 0.3]), [0.38, 0.34, 0.25, 0.03])


def chain(schedule="linear", steps=40, *, exact=False, target=None):
    target, path = target or law(), SCHEDULES[schedule]
    return steer.models.gaussian_mixture(
        target.means, target.covs, target.weights, schedule=path, times=steer.log_snr_times(path, steps),
        transition=ExactStep(target) if exact else None,
    )  # fmt: skip


def first(x):
    return x[:, 0].double()


def rare_mass(process, samples=4000, key=0):
    x = steer.rollout(process, first, particles=samples, key=key, keep_states=False).x[0]
    return law().responsibilities(x).argmax(1).eq(RARE).double().mean().item()


def theory(process, draws=40_000):
    """E p(rare | x_start), to .0008, for a start of a boosted process and the exact reverse kernels."""
    x = process.initial[1] * steer.Key(9).normal((1, draws, SIZE))[0]
    joint = law().log_joint(x, process.levels[0].alpha, process.levels[0].sigma)
    return torch.softmax(joint, 1)[:, RARE].mean().item()


class ExactClassifier:
    def __call__(self, x, log_snr):
        signal = 1.0 / (1.0 + math.exp(-log_snr))
        joint = law().log_joint(x.double(), math.sqrt(signal), math.sqrt(1.0 - signal))
        return torch.stack([joint[:, :RARE].logsumexp(1), joint[:, RARE]], 1)


# Boost-and-Skip


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [4.0, 8.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_occupancy_is_a_function_of_kappa(schedule, gamma):
    """One curve for all schedules and gammas: 4000 samples, binomial error .004 at 9 %; exact kernels."""
    for kappa, expected in ((0.15, 0.050), (0.45, 0.0855), (1.0, 0.128)):
        process = minority(chain(schedule, exact=True), boost_and_skip(kappa, gamma=gamma))
        exact = theory(process)
        assert abs(exact - expected) < 0.004  # O(alpha-bar): at most .003 over these starts
        mass = rare_mass(process)
        assert abs(mass - exact) < 4.0 * math.sqrt(expected * (1.0 - expected) / 4000)


def test_gamma_and_skip_alone_do_not_say_the_strength():
    """The mutant: the paper's own setting, gamma 4 and 3 steps, is another strength on every schedule."""
    plans = [boost_and_skip(gamma=4.0, skip=3).plan(chain(name).with_times(steer.uniform_times(path, 250)))
             for name, path in SCHEDULES.items()]  # fmt: skip
    kappas = sorted(plan.kappa for plan in plans)
    assert kappas[0] < kappas[1] / 1.5 < kappas[2] / 2.0
    masses = [theory(minority(chain(name, 40), boost_and_skip(gamma=4.0, skip=skip)))
              for name, skip in (("linear", 3), ("linear", 13))]  # fmt: skip
    assert masses[1] - masses[0] > 0.02  # one gamma, two starts: five binomial errors apart


def test_kappa_is_exact_on_the_grid():
    for name in SCHEDULES:
        for kappa in (0.0, 0.01, 0.3, 2.0):
            process = chain(name)
            plan = boost_and_skip(kappa).plan(process)
            assert (plan.gamma**2 - 1.0) * share(process.levels[plan.skip]) == pytest.approx(kappa)
            assert kappa == 0.0 or 2.0 < plan.gamma < 8.0
    assert boost_and_skip(0.0).plan(chain()).skip == 0


def test_boost_skips_rows_and_keeps_the_rest():
    process = chain()
    boosted = minority(process, boost_and_skip(0.45))
    skip = boost_and_skip(0.45).plan(process).skip
    assert boosted.steps == process.steps - skip
    assert boosted.times == process.times[skip:]
    result = steer.rollout(boosted, first, particles=10)
    assert result.cost.nfe == 10 * boosted.steps
    start = boosted.prior(steer.Key(0), 1, 4000)
    expected = boost_and_skip(0.45).plan(process).gamma
    assert start.std().item() == pytest.approx(expected, rel=0.02)  # four standard errors of 32,000 normals: .016


# Minority guidance


@pytest.mark.slow
def test_exact_classifier_at_scale_one_draws_the_rare_mode():
    """Bayes' rule: everything lands in the mode. Mean within four errors and 40 steps' bias, which halves by steps."""
    process = minority(chain(steps=80), minority_guidance(ExactClassifier(), scale=1.0))
    x = steer.rollout(process, first, particles=2000, keep_states=False).x[0].double()
    assert law().responsibilities(x)[:, RARE].mean() > 0.95
    assert (x.mean(0) - law().means[RARE]).abs().max() < 4.0 * math.sqrt(0.3 / 2000) + 0.1


@pytest.mark.slow
def test_guidance_at_zero_is_the_model_and_low_targets_suppress():
    plain = steer.rollout(chain(), first, particles=50)
    still = steer.rollout(minority(chain(), minority_guidance(ExactClassifier(), scale=0.0)), first, particles=50)
    assert torch.equal(plain.x, still.x)
    assert rare_mass(minority(chain(), minority_guidance(ExactClassifier(), scale=1.0, target=0))) < 0.005
    assert 0.015 < rare_mass(chain()) < 0.045


def guided_then_corrected(weighted):
    """Rare mode's mass of SMC without a reward, minority guidance as proposal; unweighted, weights are lost."""
    process = chain(steps=30, target=law())
    proposal = follow(minority_guidance(ExactClassifier(), scale=0.5))
    result = steer.smc(
        process, rewards.Linear(torch.zeros(SIZE)), batch=40, particles=100, proposal=proposal,
        selection=steer.resample(threshold=0.5 if weighted else 0.0),
    )  # fmt: skip
    mass = law().responsibilities(result.x)[..., RARE]
    return ((result.log_weight.exp() if weighted else 0.01) * mass).sum(1), result.log_evidence.exp()


@pytest.mark.slow
def test_as_a_proposal_the_law_is_the_models():
    """SMC corrects: mass (evidence-weighted over 40 runs) is the plain chain's; the mutant without weights is not."""
    bare = rare_mass(chain(steps=30), samples=20_000)
    mass, evidence = guided_then_corrected(weighted=True)
    errors = evidence * (mass - bare)
    assert abs(errors.mean()) < 4.0 * errors.std() / math.sqrt(40)
    assert abs(evidence.mean() - 1.0) < 4.0 * evidence.std() / math.sqrt(40)
    mutant, _ = guided_then_corrected(weighted=False)
    assert mutant.mean() - bare > 4.0 * mutant.std() / math.sqrt(40)


# Self-guided sampling


@pytest.mark.slow
def test_self_guidance_raises_the_rare_mode_in_its_window():
    """At 4 the mass doubles (error .004); at 20 samples leave the data: strength has a window."""
    found = {w: steer.rollout(minority(chain(), self_guided(w)), first, particles=4000).x[0] for w in (0.0, 4.0, 20.0)}
    mass = {w: law().responsibilities(x).argmax(1).eq(RARE).double().mean().item() for w, x in found.items()}
    density = {w: law().log_prob(x).mean().item() for w, x in found.items()}
    assert mass[4.0] - mass[0.0] > 4.0 * math.sqrt(0.05 / 4000)
    assert density[4.0] > density[0.0] - 4.0
    assert density[20.0] < density[0.0] - 10.0


def test_a_vanishing_gradient_moves_nothing():
    """The model predicts one point whatever it sees: 0 / 0 in the released code."""
    process = steer.from_denoiser(lambda x, t: torch.zeros_like(x) + 0.0 * x, steer.VP(), 10, event=(3,))
    result = steer.rollout(minority(process, self_guided(5.0, every=1)), first, particles=20)
    assert torch.equal(result.x, torch.zeros_like(result.x))
    assert result.process.log.table()[3] == (0.0, 0.0)


def test_every_phase_and_interval_choose_the_steps():
    process = chain(steps=20)
    hook = self_guided(1.0, every=4, phase=1, interval=(0.1, 0.9)).mean[0]
    chosen = [k for k in range(20) if hook.acts(process, k)]
    assert chosen
    assert all((19 - k) % 4 == 1 and 0.1 <= share(process.levels[k]) <= 0.9 for k in chosen)
    guided = minority(process, self_guided(1.0, every=4, phase=1, interval=(0.1, 0.9)))
    result = steer.rollout(guided, first, particles=7)
    assert (result.cost.nfe, result.cost.grads) == (7 * (20 + len(chosen)), 7 * len(chosen))
    moved = {k for k, (mean, _) in result.process.log.table().items() if mean > 0.0}
    assert moved == set(chosen)


def test_displacement_is_scale_times_variance_by_largest_entry():
    process = chain(steps=20)
    result = steer.rollout(minority(process, self_guided(3.0, every=1)), first, particles=50)
    for k, (_, most) in result.process.log.table().items():
        std = process.rule.std(process.levels[k], process.levels[k + 1])
        assert most <= 3.0 * std * math.sqrt(SIZE) + 1e-6  # norm over std; every entry at most scale * variance


# The minority score


@pytest.mark.slow
def test_score_of_a_gaussian_in_closed_form():
    """Data N(0, I): restored = alpha x_s, so with squared error the score is (1 - a)^2 |x|^2 + a (1 - a) D."""
    process = steer.models.gaussian(torch.zeros(SIZE), 1.0, times=steer.uniform_times(steer.VP(), 50))
    x = steer.Key(1).normal((1, 3, SIZE)).float() * torch.tensor([0.3, 1.0, 3.0])[None, :, None]
    a = share(process.levels[level_near(process, 0.5)])
    squared = lambda p, q: (p - q).flatten(1).square().sum(1)  # noqa: E731
    draws = [minority_score(process, x, draws=100, distance=squared, key=k) for k in range(30)]
    found = torch.stack(draws)
    expected = (1.0 - a) ** 2 * x.double().square().sum(2) + a * (1.0 - a) * SIZE
    assert ((found.mean(0) - expected).abs() < 4.0 * found.std(0) / math.sqrt(30)).all()


def test_rare_modes_score_high():
    points = law().means.float()[None]
    score = minority_score(chain(), points, draws=50)[0]
    assert score.argmax() == RARE
    assert torch.equal(score, minority_score(chain(), points, draws=50)[0])


def test_the_score_draws_noise_of_hooks_by_its_own_key():
    """Once per draw: another key, other noise; the same, the same; no two draws alike."""

    def drawn(key):
        seen = []

        def drawing(at):
            seen.append(at.key.normal(at.x.shape))
            return at.x0

        guided = steer.guide(chain(), steer.Hooks(x0=(drawing,)))
        minority_score(guided, torch.zeros(1, 3, SIZE, dtype=torch.float64), draws=4, key=key)
        return seen

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert len({float(noise.sum()) for noise in one}) == 4
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_quantiles_within_a_class():
    score = torch.tensor([5.0, 1.0, 3.0, 2.0, 60.0, 20.0, 40.0, 30.0])
    classes = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert quantile_labels(score, 2, classes).tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
    assert quantile_labels(score, 2).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    ties = quantile_labels(torch.zeros(7), 3)
    assert sorted(ties.bincount().tolist()) == [2, 2, 3]


def test_distance_of_equal_states_has_a_finite_gradient():
    a = torch.zeros(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(euclidean(a, torch.tensor([[0.0, 0, 0], [3.0, 4, 0]])).sum(), a)
    assert torch.allclose(gradient, torch.tensor([[0.0, 0, 0], [-0.6, -0.8, 0]]))


# Together, and errors


def test_methods_compose_and_every_sampler_runs():
    process = minority(minority(chain(steps=12), self_guided(1.0)), boost_and_skip(0.3))
    assert isinstance(process, GuidedProcess)
    reward = rewards.Linear(torch.ones(SIZE))
    for method in (steer.rollout, steer.smc, steer.importance_sampling):
        result = method(process, reward, particles=6, key=1)
        again = method(process, reward, particles=6, key=1)
        assert torch.equal(result.x, again.x)
        assert result.x.isfinite().all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: boost_and_skip(), "one of the two"),
        (lambda: boost_and_skip(0.1, skip=3), "one of the two"),
        (lambda: boost_and_skip(-1.0), "at least 0"),
        (lambda: boost_and_skip(0.1, gamma=1.0), "above 1"),
        (lambda: boost_and_skip(3.0, gamma=2.0), "lower kappa, or raise gamma"),
        (lambda: minority(chain(), boost_and_skip(skip=40)), "at least one of the 40 steps"),
        (lambda: minority(chain(), "boost"), "method is steer.boost_and_skip"),
        (lambda: minority(steer.load("letters"), boost_and_skip(0.1)), "Gaussian path"),
        (lambda: self_guided(every=0), "every counts steps"),
        (lambda: self_guided(signal=1.0), "0 < signal < 1"),
        (lambda: minority_score(chain(), torch.zeros(4, SIZE)), "clean states"),
        (lambda: quantile_labels(torch.zeros(3), 5), "too few for 5 bins"),
        (
            lambda: steer.rollout(minority(chain(), minority_guidance(ExactClassifier(), target=7)), first),
            "one of the classifier's 2 bins",
        ),
    ],
)
def test_errors_say_the_cure(call, says):
    with pytest.raises(steer.SteerError, match=says):
        call()
