"""Arithmetic of log-weights: against sums in the plain, at huge magnitudes, and Var(Z_hat) against its true value."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from exact import LIMIT, Linear, z

import steer
from steer import search
from steer.core import diagnostics, population
from steer.core.trajectory import ResamplingRecord
from steer.key import Key
from steer.models import ExactStep, gaussian

INF = math.inf


def rows(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_weights(problems: int = 6, particles: int = 9) -> torch.Tensor:
    log_weight = 2.0 * Key(0).normal((problems, particles))
    log_weight[1, 2:5] = -INF
    return log_weight


def test_log_mean_exp():
    log_weight = random_weights()
    torch.testing.assert_close(
        population.log_mean_exp(log_weight), log_weight.exp().mean(1).log(), rtol=1e-14, atol=1e-14
    )
    torch.testing.assert_close(population.log_mean_exp(log_weight + 1e5), population.log_mean_exp(log_weight) + 1e5)
    assert population.log_mean_exp(rows([-INF, -INF], [-1e300, -INF])).tolist() == [-INF, pytest.approx(-1e300)]
    assert population.log_mean_exp(rows([3.25])).tolist() == [3.25]


def test_normalise():
    log_weight = random_weights()
    torch.testing.assert_close(population.normalise(log_weight).exp(), torch.softmax(log_weight, 1), rtol=1e-13, atol=0)
    torch.testing.assert_close(
        population.normalise(log_weight - 1e6).exp(), torch.softmax(log_weight, 1), rtol=1e-9, atol=0
    )


def test_the_best_share_equally():
    """Ties go to the first, forbidden scores to nobody, and where all are forbidden that is overlooked."""
    score = rows((1.0, 3.0, 3.0, 3.0), (0.0, -math.inf, -math.inf, 2.0), (-math.inf,) * 4)
    torch.testing.assert_close(
        population.weights_of_top_k(score, 2).exp(),
        rows((0.0, 0.5, 0.5, 0.0), (0.5, 0.0, 0.0, 0.5), (0.5, 0.5, 0.0, 0.0)),
    )
    torch.testing.assert_close(population.weights_of_top_k(score, 3)[1].exp(), rows((0.5, 0.0, 0.0, 0.5))[0])
    torch.testing.assert_close(population.weights_of_top_k(score, 9)[0].exp(), rows((0.25,) * 4)[0])


def test_ess_of_small_cases():
    cases = {(0.0,): 1.0, (0.0, 0.0): 2.0, (0.0, -INF): 1.0, (0.0, -INF, 0.0, -INF): 2.0, (1e6, 0.0, 1e6): 2.0}
    cases |= {(-1e300, -1e300): 2.0, (math.log(3.0), 0.0): 16.0 / 10.0, (-1e5, -INF, -1e5 - math.log(2.0)): 9.0 / 5.0}
    for values, expected in cases.items():
        assert float(population.ess(rows(values))) == pytest.approx(expected, rel=1e-10)
    assert population.ess(rows([-INF, -INF], [0.0, 0.0]))[0].isnan()


def test_ess_is_between_one_and_n_and_free_of_scale():
    log_weight = 4.0 * Key(1).normal((300, 11))
    size = population.ess(log_weight)
    assert bool(((size >= 1.0 - 1e-12) & (size <= 11.0 + 1e-12)).all())
    torch.testing.assert_close(size, 1.0 / torch.softmax(log_weight, 1).square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(population.ess(log_weight + 1024.0), size, rtol=1e-12, atol=0)
    assert float(population.ess(log_weight[:, :1]).max()) == 1.0


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_temper_reaches_the_goal(share):
    """ESS at the exponent equals share * N to 1e-6, over likelihoods of spread 0.01 to 1e5."""
    scale = torch.logspace(-2, 5, 40, dtype=torch.float64)[:, None]
    likelihood, lowest = scale * Key(2).normal((40, 16)), torch.zeros(40, dtype=torch.float64)
    zero = torch.zeros_like(likelihood)
    exponent = population.temper(zero, likelihood, lowest, share=share)
    size = population.ess(exponent[:, None] * likelihood)
    full = population.ess(likelihood) >= share * 16
    assert bool(full.any())
    assert bool((~full).any())
    assert bool((exponent[full] == 1.0).all())
    assert float((size[~full] - share * 16).abs().max()) < 1e-6
    assert bool((size[~full] >= share * 16 * (1 - 1e-8)).all())  # at or above, never below


def test_temper_continues_from_an_exponent_and_from_weights():
    likelihood, lowest = 6.0 * Key(3).normal((20, 16)), torch.linspace(0.0, 0.9, 20, dtype=torch.float64)
    log_weight = 0.3 * Key(4).normal((20, 16))
    exponent = population.temper(log_weight, likelihood, lowest, share=0.5)
    size = population.ess(log_weight + (exponent - lowest)[:, None] * likelihood)
    assert bool((exponent > lowest).all())
    assert float((size - 8.0)[exponent < 1.0].abs().max()) < 1e-6


def test_temper_stays_where_the_weights_are_already_below_the_goal():
    log_weight = rows([0.0, -20.0, -20.0, -20.0])
    likelihood, lowest = rows([3.0, 1.0, 0.0, -1.0]), rows(0.25)[None, 0]
    assert float(population.temper(log_weight, likelihood, lowest)) == 0.25


def test_temper_with_forbidden_particles():
    """A likelihood of -inf is a zero weight at any exponent above the lowest: the rest decides."""
    allowed = 5.0 * Key(5).normal((3, 8))
    forbidden = torch.cat([allowed, torch.full((3, 8), -INF, dtype=torch.float64)], 1)
    lowest = torch.zeros(3, dtype=torch.float64)
    alone = population.temper(torch.zeros_like(allowed), allowed, lowest, share=0.5)
    half = population.temper(torch.zeros_like(forbidden), forbidden, lowest, share=0.25)
    torch.testing.assert_close(half, alone, rtol=1e-9, atol=0)


def test_temper_does_not_depend_on_the_batch():
    likelihood, lowest = 6.0 * Key(6).normal((5, 16)), torch.zeros(5, dtype=torch.float64)
    whole = population.temper(torch.zeros_like(likelihood), likelihood, lowest)
    for b in range(5):
        row = likelihood[b : b + 1]
        assert torch.equal(population.temper(torch.zeros_like(row), row, lowest[:1]), whole[b : b + 1])


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_temper_names_a_bad_share(share):
    with pytest.raises(steer.SteerError, match=r"in \(0, 1\], got"):
        population.temper(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1), share=share)


def test_weighted_mean():
    log_weight, values = random_weights(), Key(7).normal((6, 9, 2, 3))
    expected = torch.einsum("bn,bnij->bij", torch.softmax(log_weight, 1), values)
    torch.testing.assert_close(population.weighted_mean(log_weight, values), expected)
    assert population.weighted_mean(log_weight, values[..., 0, 0]).shape == (6,)
    assert population.weighted_mean(log_weight, values.float()).dtype == torch.float64


def test_weighted_mean_reads_nothing_at_weight_zero():
    log_weight, values = rows([0.0, -INF, math.log(3.0), -INF]), rows([1.0, math.nan, 2.0, INF])
    assert float(population.weighted_mean(log_weight, values)) == pytest.approx(1.75)
    assert population.weighted_mean(rows([0.0, 0.0]), rows([1.0, math.nan])).isnan().all()


# --- variance of the evidence -----------------------------------------------------------------------------------------


def brute_force_variance(weight, root, resamplings):
    """Lee & Whiteley's V as the sum over pairs of particles of different roots."""
    particles = len(weight)
    apart = sum(weight[i] * weight[j] for i, j in itertools.permutations(range(particles), 2) if root[i] != root[j])
    return 1.0 - (particles / (particles - 1)) ** (resamplings + 1) * apart


def test_evidence_variance_is_the_sum_over_pairs():
    log_weight = random_weights(4, 7)
    root = (Key(8).uniform((4, 7)) * 7).long()
    resamplings = torch.tensor([0, 1, 3, 8])
    got = diagnostics.evidence_variance(log_weight, root, resamplings)
    for b in range(4):
        weight = torch.softmax(log_weight[b], 0).tolist()
        assert float(got[b]) == pytest.approx(brute_force_variance(weight, root[b].tolist(), int(resamplings[b])))


def test_evidence_variance_of_independent_particles_is_that_of_a_mean():
    """Without resampling V is the sample variance of the weights over N times their squared mean."""
    log_weight, root = random_weights(5, 8), torch.arange(8).expand(5, 8)
    weight = log_weight.exp()
    expected = weight.var(1) / 8 / weight.mean(1).square()
    got = diagnostics.evidence_variance(log_weight, root, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert diagnostics.evidence_variance(torch.zeros(2, 1), torch.zeros(2, 1).long(), torch.zeros(2)).isnan().all()


@pytest.fixture(scope="module")
def runs():
    """6000 runs of 8 particles, resampled multinomially at every level whose weights differ, where Z is known.

    At t = 1 every prediction is the data's mean, so the three levels after it are those that count.
    """
    times = steer.uniform_times(steer.RectifiedFlow(), 5, start=1.0)
    process = gaussian([0.5], 0.8, schedule=steer.RectifiedFlow(), times=times, dtype=torch.float64)
    process = process.with_rule(ExactStep(process.reference))
    reward = Linear([0.6])
    result = steer.smc(
        process, reward, particles=8, batch=6000, key=3, selection=steer.resample(steer.multinomial, threshold=1.0)
    )
    return result, (result.log_evidence - process.exact(reward).log_evidence).exp()


def by_ancestors(result):
    trajectory = result.trajectory
    return diagnostics.evidence_variance(result.log_weight, trajectory.root, trajectory.resamplings())


def unbiased_for_variance(estimate, ratio) -> float:
    """z of E[(Z_hat / Z)^2 V - (Z_hat / Z - 1)^2] = 0, which is Lee & Whiteley's theorem, at any N."""
    return z(ratio.square() * estimate - (ratio - 1.0).square())


def test_evidence_and_its_variance_are_unbiased(runs):
    """z over 6000 replicates; V averages 0.07, with a relative SE of about 2%. A result has it where roots are left."""
    result, ratio = runs
    root, resamplings = result.trajectory.root, result.trajectory.resamplings()
    assert int(resamplings.min()) >= 3
    assert abs(z(ratio - 1.0)) < LIMIT
    assert abs(unbiased_for_variance(by_ancestors(result), ratio)) < LIMIT
    alone = diagnostics.one_root(result.log_weight, root)  # of one root ancestors tell nothing: the spread does
    expected = torch.where(alone, diagnostics.variance_between(result.log_evidence), by_ancestors(result))
    assert torch.equal(result.log_evidence_variance, expected)
    assert 0 < int(alone.sum()) < 0.02 * 6000
    assert bool((by_ancestors(result)[alone] > 0.99).all())  # whatever the evidence


def test_other_estimates_of_the_variance_are_rejected(runs):
    """The sum of squares of `particles` (Var_logLt), V with a factor too few, V as if nothing was resampled."""
    result, ratio = runs
    root, log_weight, resamplings = result.trajectory.root, result.log_weight, result.trajectory.resamplings()
    weight = torch.softmax(log_weight, 1)
    squares = torch.zeros_like(weight).scatter_add_(1, root, weight).square().sum(1)
    mutants = {
        "sum of squares": squares,
        "one factor too few": diagnostics.evidence_variance(log_weight, root, resamplings - 1),
        "one factor too many": diagnostics.evidence_variance(log_weight, root, resamplings + 1),
        "no lineage": diagnostics.evidence_variance(log_weight, torch.arange(8).expand_as(root), 0 * resamplings),
    }
    for name, estimate in mutants.items():
        assert abs(unbiased_for_variance(estimate, ratio)) > LIMIT, name


def test_evidence_variance_where_ancestors_do_not_tell():
    """By ancestors of coupled draws V is below zero; the spread of eight repetitions is right, over 150 such groups."""
    process = gaussian([0.5], 0.8, steps=20, schedule=steer.RectifiedFlow(), dtype=torch.float64)
    process = process.with_rule(ExactStep(process.reference))
    reward, options = Linear([0.6]), {"particles": 8, "batch": 1200, "key": 5}
    for resampler in (steer.systematic, steer.ssp, steer.stratified, steer.multinomial):
        result = steer.smc(process, reward, selection=steer.resample(resampler, threshold=1.0), **options)
        ratio = (result.log_evidence - process.exact(reward).log_evidence).exp()
        true = (ratio - 1.0).square()
        groups = torch.stack([diagnostics.variance_between(group)[0] for group in result.log_evidence.split(8)])
        # To first order: 8 repetitions miss their own mean by an eighth of the variance, squared.
        error = (groups.var() / len(groups) + true.var() / len(true)).sqrt()
        assert abs(float((groups.mean() - true.mean()) / error)) < LIMIT, resampler
        if resampler is steer.multinomial:
            assert abs(unbiased_for_variance(by_ancestors(result), ratio)) < LIMIT
        else:
            assert unbiased_for_variance(by_ancestors(result), ratio) < -LIMIT  # the mutant: what this was
            assert torch.equal(result.log_evidence_variance, diagnostics.variance_between(result.log_evidence))


@pytest.mark.parametrize("resampler", [steer.systematic, steer.multinomial])
def test_a_single_run_says_what_it_knows_of_its_variance(resampler):
    """Prompts are problems of their own, and so is a run alone: NaN, unless nothing was resampled."""
    plain = gaussian([0.5], 0.8, steps=8, dtype=torch.float64)
    prompted = dataclasses.replace(plain, problems=3, prompts=("a", "b", "c"))
    for process in (plain, prompted):
        often = steer.smc(process, Linear([2.0]), particles=4, selection=steer.resample(resampler, threshold=1.0))
        assert bool(often.log_evidence_variance.isnan().all())  # 7 times, with 4 particles: no two ancestors are left
        sharp = steer.smc(process, Linear([2.0]), particles=16, selection=steer.resample(resampler, threshold=1.0))
        assert bool(sharp.trajectory.resamplings().all())
        assert bool(sharp.log_evidence_variance.isnan().all()) == (resampler is steer.systematic)
        never = steer.smc(process, Linear([0.1]), particles=16, selection=steer.resample(resampler, threshold=0.0))
        assert bool((never.log_evidence_variance > 0.0).all())
    tree = search.dts(plain, Linear([2.0]), particles=8, batch=4)
    assert torch.equal(tree.log_evidence_variance, diagnostics.variance_between(tree.log_evidence))
    assert bool(search.dts(plain, Linear([2.0]), particles=8).log_evidence_variance.isnan().all())


def test_evidence_variance_at_a_lag(runs):
    """Given the ancestors at a lag as roots: the whole lag is the run itself, none is independent particles."""
    result, ratio = runs
    trajectory = result.trajectory
    rearranged = [event.parent for event in trajectory.past if isinstance(event, ResamplingRecord)]
    ancestors = {0: torch.arange(8).expand(6000, 8)}
    for lag, parent in enumerate(reversed(rearranged), start=1):
        ancestors[lag] = parent.gather(1, ancestors[lag - 1])

    def at_lag(lag, resamplings):
        return diagnostics.evidence_variance(result.log_weight, ancestors[lag], resamplings)

    assert torch.equal(ancestors[len(rearranged)], trajectory.root)
    whole = at_lag(len(rearranged), trajectory.resamplings())
    assert torch.equal(whole, by_ancestors(result))
    weight = result.log_weight.exp()
    none = at_lag(0, torch.zeros(6000))
    torch.testing.assert_close(none, weight.var(1) / 8 / weight.mean(1).square())
    # a lag leaves out what the generations before it added to the variance, so it is too small for the whole
    assert unbiased_for_variance(none, ratio) < -LIMIT
    assert unbiased_for_variance(at_lag(1, torch.ones(6000)), ratio) < -LIMIT


def test_variance_of_a_weighted_mean():
    """4000 runs of 64 particles: the estimate is the variance of the mean (SE 2.5 %), at every lag that covers it."""
    process = gaussian([0.5], 0.8, steps=8, schedule=steer.RectifiedFlow(), dtype=torch.float64)
    result = steer.smc(
        process,
        Linear([0.6]),
        particles=64,
        batch=4000,
        key=5,
        selection=steer.resample(steer.multinomial, threshold=1.0),
    )
    mean = result.mean(lambda x: x)[:, 0]
    true = float((mean - mean.mean()).square().mean())

    def ratio(lag):
        moves = result.trajectory.resamplings() if lag is None else torch.full((4000,), lag)
        ancestor = result.trajectory.ancestor(lag)
        return float(diagnostics.mean_variance(result.log_weight, result.x[..., 0], ancestor, moves).mean()) / true

    assert torch.equal(result.trajectory.ancestor(), result.root)
    assert abs(ratio(None) - 0.95) < 0.08, ratio(None)  # O(1 / N) short of 1
    # what happened four rearrangements ago is forgotten here; what happened since is not
    assert abs(ratio(5) - ratio(None)) < 0.08
    assert ratio(0) < 0.5


# --- Pareto k-hat -----------------------------------------------------------------------------------------------------


def pareto_weights(shape: float, problems: int, count: int) -> torch.Tensor:
    """Log-weights 1 + a generalized Pareto variable of that shape and scale 1, whose tails have that shape too."""
    uniform = Key(10).uniform((problems, count))
    return torch.log1p((uniform**-shape - 1.0) / shape if shape else -uniform.log())


@pytest.mark.parametrize("shape", [-0.5, 0.0, 0.3, 0.5, 0.7, 1.0, 1.5])
def test_pareto_k_of_known_tails(shape):
    """Mean over 60 problems of 20,000: SE about (1 + k) / sqrt(425 * 60), and the prior pulls by 2 % towards .5."""
    found = diagnostics.pareto_k(pareto_weights(shape, 60, 20_000))
    assert float(found.mean()) == pytest.approx(shape + 0.023 * (0.5 - shape), abs=0.05)


@pytest.mark.parametrize("shape", [0.0, 0.4, 0.8, 1.2])
def test_pareto_k_is_near_scipys_maximum_likelihood_fit(shape):
    scipy = pytest.importorskip("scipy.stats")
    log_weight = pareto_weights(shape, 3, 20_000)
    tail = math.ceil(3.0 * math.sqrt(20_000))
    for row, found in zip(log_weight.exp().sort(1).values, diagnostics.pareto_k(log_weight).tolist(), strict=True):
        fitted = scipy.genpareto.fit((row[-tail:] - row[-tail - 1]).numpy(), floc=0)[0]
        assert found == pytest.approx((fitted * tail + 5.0) / (tail + 10.0), abs=0.03)


def test_pareto_k_follows_the_fit_written_out():
    """Zhang & Stephens in plain Python on small samples, batch and scale apart."""
    log_weight = pareto_weights(0.6, 4, 60)
    log_weight[3, 5] = -INF
    for row, found in zip(log_weight.tolist(), diagnostics.pareto_k(log_weight + 700.0).tolist(), strict=True):
        ordered = sorted(math.exp(v) for v in row)
        excess = [v - ordered[-13] for v in ordered[-12:]]  # the tail is 60 / 5
        points, quartile = 33, excess[2]
        thetas = [1 / excess[-1] + (1 - math.sqrt(points / (j + 0.5))) / (3 * quartile) for j in range(points)]
        shapes = [sum(math.log1p(-theta * v) for v in excess) / 12 for theta in thetas]
        profile = [12 * (math.log(-t / k) - k - 1) for t, k in zip(thetas, shapes, strict=True)]
        share = [1 / sum(math.exp(other - this) for other in profile) for this in profile]
        centre = sum(w * theta for w, theta in zip(share, thetas, strict=True))
        fitted = sum(math.log1p(-centre * v) for v in excess) / 12
        assert found == pytest.approx((12 * fitted + 5) / 22, rel=1e-9)


def test_pareto_k_tells_good_importance_weights_from_bad():
    """N(0, 1) weighted to a shift of .5 (k = 0) and to ten times the variance (k = .9), approached from below."""
    x = Key(11).normal((20, 2000))
    assert float(diagnostics.pareto_k(0.5 * x).median()) < 0.2
    assert float(diagnostics.pareto_k(0.45 * x.square()).median()) > 0.65


def test_pareto_k_is_nan_where_there_is_no_tail():
    assert diagnostics.pareto_k(torch.zeros(2, 100)).isnan().all()
    assert diagnostics.pareto_k(2.0 * Key(12).normal((3, 20))).isnan().all()
    assert bool(diagnostics.pareto_k(2.0 * Key(12).normal((3, 21))).isfinite().all())


def test_large_weights_are_normalised_to_the_last_digits():
    log_weight = 1e12 * torch.tensor([[1.0, 1.0 - 1e-12, 0.5]], dtype=torch.float64)
    total = population.normalise(log_weight).exp().sum()
    assert abs(float(total) - 1.0) < 1e-15


def test_the_variance_of_a_mean_counts_one_generation_more_than_resamplings():
    """Of N independent draws it is the textbook's s^2 / N, and every multinomial resampling takes N / (N - 1) more."""
    values = steer.Key(3).normal((4, 6))
    equal, own = torch.zeros(4, 6, dtype=torch.float64), torch.arange(6).expand(4, -1)
    for resamplings in (0, 1, 3):
        found = diagnostics.mean_variance(equal, values, own, torch.full((4,), resamplings))
        torch.testing.assert_close(found, values.var(1) / 6 * (6 / 5) ** resamplings)
