"""Resamplers: unbiased copies, no particle of weight zero, and the promises each one makes beyond that."""

from __future__ import annotations

import math

import pytest
import torch
from exact import LIMIT
from scipy import stats

import steer
from steer.core.resampling import killing, multinomial, residual, ssp, stratified, systematic
from steer.key import Key

RESAMPLERS = [systematic, stratified, multinomial, residual, ssp, killing]
ANY_COUNT = [systematic, stratified, multinomial, residual, ssp]
SORTED = [systematic, stratified, residual, ssp]
P_VALUE = math.erfc(LIMIT / math.sqrt(2.0))  # the p-value that |z| = LIMIT has
REPLICATES = 6000

WEIGHTS = {
    "uneven": [0.05, 0.4, 0.1, 0.15, 0.3],
    "zeros leading, interior and trailing": [0.0, 0.35, 0.0, 0.05, 0.6, 0.0, 0.0],
    "one heavy": [0.01, 0.01, 0.95, 0.02, 0.01],
    "whole shares": [0.25, 0.5, 0.25, 0.0],
    "equal": [0.25, 0.25, 0.25, 0.25],
    "two": [0.7, 0.3],
}

each = pytest.mark.parametrize("resampler", RESAMPLERS, ids=lambda r: r.__name__)


def log_weights(weights, problems: int = 1) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64).log().expand(problems, -1)


def copies(ancestors: torch.Tensor, particles: int) -> torch.Tensor:
    """How often each particle was chosen, (B, N)."""
    return torch.nn.functional.one_hot(ancestors, particles).sum(1).double()


def misfit(resampler, weights, count: int, seed: int = 0) -> float:
    """p-value of E[copies] = count W, jointly over particles: Hotelling's statistic of replicates run as problems.

    A direction in which copies never vary must be met exactly.
    """
    log_weight = log_weights(weights, REPLICATES)
    off = copies(resampler(log_weight, Key(seed), count), len(weights)) - count * torch.softmax(log_weight, 1)
    variances, axes = torch.linalg.eigh(torch.cov(off.T))
    mean, varies = off.mean(0) @ axes, variances > 1e-9
    if bool((mean[~varies].abs() > 1e-9).any()):
        return 0.0
    statistic = float((REPLICATES * mean[varies].square() / variances[varies]).sum())
    return float(stats.chi2.sf(statistic, int(varies.sum()))) if bool(varies.any()) else 1.0


@each
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_unbiased(resampler, weights):
    """6000 replicates: a bias of 0.04 copies of a particle, 4 SE at a spread of 0.8, is rejected."""
    assert misfit(resampler, weights, len(weights)) > P_VALUE


@pytest.mark.parametrize("resampler", ANY_COUNT, ids=lambda r: r.__name__)
@pytest.mark.parametrize("count", [1, 3, 12])
def test_unbiased_with_fewer_or_more_offspring(resampler, count):
    assert misfit(resampler, WEIGHTS["uneven"], count) > P_VALUE
    assert resampler(log_weights(WEIGHTS["uneven"], 3), Key(0), count).shape == (3, count)


def all_copies_of_one(log_weight, key, count):
    one = (key.uniform((len(log_weight), 1)) * log_weight.shape[1]).long()
    return one.expand(-1, count)


def all_copies_of_the_best(log_weight, key, count):
    return log_weight.argmax(1, keepdim=True).expand(-1, count)


def without_randomness(log_weight, key, count):
    points = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.searchsorted(torch.softmax(log_weight, 1).cumsum(1), points.expand(len(log_weight), -1).contiguous())


def residual_without_the_rest(log_weight, key, count):
    """Draws the remainder from the whole weights instead of what the sure copies left over."""
    sure = (torch.softmax(log_weight, 1) * count).floor()[0].long()
    head = torch.arange(len(sure)).repeat_interleave(sure).expand(len(log_weight), -1)
    return torch.cat([head, multinomial(log_weight, key, count - head.shape[1])], 1)


def killing_by_shares(log_weight, key, count):
    """Survival with probability min(1, N W) instead of W / max W, the surplus of the heavy ones lost."""
    uniforms = key.uniform((len(log_weight), log_weight.shape[1]))
    survives = uniforms < torch.softmax(log_weight, 1) * count
    place = torch.arange(count).expand(len(log_weight), -1)
    return torch.where(survives, place, multinomial(log_weight, key.fold("rest"), count))


MUTANTS = [
    all_copies_of_one, all_copies_of_the_best, without_randomness, residual_without_the_rest, killing_by_shares
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda r: r.__name__)
def test_mutants_are_rejected(mutant):
    assert misfit(mutant, WEIGHTS["uneven"], 5) < P_VALUE


@each
def test_weight_zero_is_never_chosen(resampler):
    """400 random patterns of zeros, the first and last particle among them, also when one particle is left."""
    key, particles = Key(1), 9
    log_weight = 3.0 * key.fold("w").normal((400, particles))
    log_weight[key.fold("zero").uniform((400, particles)) < 0.6] = -math.inf
    log_weight[torch.arange(400), torch.arange(400) % particles] = 0.0
    chosen = resampler(log_weight, key.fold("draw"), particles)
    assert bool(log_weight.gather(1, chosen).isfinite().all())


@each
def test_extreme_log_weights(resampler):
    for values in ([1e4, -1e4, -1e4, 9e3], [0.0, -1e5, -1e5, -1e5], [-1e5, -1e5, -1e5, 0.0], [-1e5, 0.0, -1e5, -1e5]):
        log_weight = torch.tensor([values], dtype=torch.float64)
        chosen = resampler(log_weight.expand(50, -1), Key(2), 4)
        assert bool((chosen == log_weight.argmax()).all())
    shifted = torch.tensor([[0.1, -0.4, 1.3, 0.0]], dtype=torch.float64).expand(50, -1)
    assert torch.equal(resampler(shifted, Key(2), 4), resampler(shifted - 1024.0, Key(2), 4))


@each
def test_weights_are_summed_in_float64_whatever_they_come_in(resampler):
    """Weights over eight decades: sums of float32 lose the small ones, and where a draw falls moves by 1e-7."""
    log_weight = -5.0 * Key(0).normal((200, 1000), dtype=torch.float32).abs()
    assert torch.equal(resampler(log_weight, Key(1), 1000), resampler(log_weight.double(), Key(1), 1000))


@each
def test_one_particle(resampler):
    for weight in (0.0, -1e5, 1e5):
        assert bool((resampler(torch.full((3, 1), weight, dtype=torch.float64), Key(0), 1) == 0).all())


@pytest.mark.slow
@pytest.mark.parametrize("resampler", [systematic, stratified, residual, ssp, killing], ids=lambda r: r.__name__)
def test_equal_weights_leave_a_population_as_it_is(resampler):
    """Every size to 128: 1/49 * 49 is below one in float64, and no rounding may turn that into a random draw."""
    for particles in range(1, 129):
        chosen = resampler(torch.zeros((4, particles), dtype=torch.float64), Key(particles), particles)
        assert torch.equal(chosen, torch.arange(particles).expand(4, -1)), particles


def test_multinomial_loses_roots_at_equal_weights():
    """E[distinct roots] of N = 4 is 4 (1 - (3/4)^4) = 2.73: within 4 SE over 6000 replicates."""
    chosen = multinomial(log_weights(WEIGHTS["equal"], REPLICATES), Key(3), 4)
    distinct = (copies(chosen, 4) > 0).sum(1).double() - 4.0 * (1.0 - 0.75**4)
    assert abs(float(distinct.mean() / distinct.std()) * math.sqrt(REPLICATES)) < LIMIT


@pytest.mark.parametrize("count", [1, 7, 20, 53])
def test_bounds_on_copies(count):
    """Systematic: |copies - count W| < 1. SSP: floor or ceiling. Residual: at least the floor."""
    key, particles, slack = Key(4), 20, 1e-9
    log_weight = 2.0 * key.fold("w").normal((300, particles))
    share = torch.softmax(log_weight, 1) * count
    assert bool(((copies(systematic(log_weight, key, count), particles) - share).abs() < 1.0).all())
    rounded = copies(ssp(log_weight, key, count), particles)
    assert bool(((rounded >= (share - slack).floor()) & (rounded <= (share + slack).ceil())).all())
    assert bool((copies(residual(log_weight, key, count), particles) >= (share - slack).floor()).all())
    in_strata = copies(stratified(log_weight, key, count), particles) - share
    assert bool((in_strata.abs() < 2.0).all())


def test_killing_keeps_survivors_in_their_slots():
    """The heaviest particle always survives; others stay with probability W / max W or come back by the draw."""
    log_weight = log_weights(WEIGHTS["uneven"], REPLICATES)
    chosen = killing(log_weight, Key(5), 5)
    assert bool((chosen[:, 1] == 1).all())
    weight = log_weight.exp()[0]
    stay = weight / weight.max() + (1.0 - weight / weight.max()) * weight
    kept = (chosen == torch.arange(5)).double() - stay
    for n in (0, 2, 3, 4):
        assert abs(float(kept[:, n].mean() / kept[:, n].std()) * math.sqrt(REPLICATES)) < LIMIT
    with pytest.raises(steer.ShapeError, match="count must be N = 5, got 3"):
        killing(log_weight, Key(5), 3)


@pytest.mark.parametrize("resampler", SORTED, ids=lambda r: r.__name__)
def test_ancestors_rise(resampler):
    chosen = resampler(2.0 * Key(6).normal((100, 30)), Key(7), 30)
    assert bool((chosen.diff(dim=1) >= 0).all())
    assert chosen.dtype == torch.int64


@each
def test_a_problem_does_not_depend_on_its_batch(resampler):
    """Bitwise: row b of a batch is the same problem drawn alone at its own slot, among other weights."""
    log_weight, key = 2.0 * Key(8).normal((6, 13)), Key(9).fold("resample").at(3)
    whole = resampler(log_weight, key, 13)
    for b in range(6):
        assert torch.equal(resampler(log_weight[b : b + 1], key.shifted(problem=b), 13), whole[b : b + 1])
    kept = log_weight.clone()
    resampler(log_weight, key, 13)
    assert torch.equal(log_weight, kept)


def test_systematic_equals_the_textbook():
    """Points (i + u) / count looked up on the cumulative weights, one problem and one point at a time."""
    log_weight, key, count = 2.0 * Key(10).normal((40, 17)), Key(11), 23
    chosen, start = systematic(log_weight, key, count), 1.0 - key.uniform((40, 1))
    for b in range(40):
        cumulative = torch.softmax(log_weight[b], 0).cumsum(0).tolist()
        for i in range(count):
            point = (i + float(start[b])) / count
            assert int(chosen[b, i]) == sum(c <= point for c in cumulative)


def one_for_all(log_weight, key, count):
    """All copies of one particle drawn by weight: unbiased, and useless."""
    return multinomial(log_weight, key, 1).expand(-1, count)


def test_order_of_variances():
    """Var of a resampled mean on one example of N = 32, 6000 replicates (SE of a variance ratio about 0.03).

    Values are in no order along the particles: sorted ones are where stratified beats systematic.
    """
    weights = torch.softmax(Key(12).normal((1, 32)), 1)
    values = Key(14).normal((1, 32))[0]
    log_weight = weights.log().expand(REPLICATES, -1)

    def variance(resampler):
        return float(values[resampler(log_weight, Key(13), 32)].mean(1).var())

    worst = variance(multinomial)
    exact = float((weights[0] * values.square()).sum() - (weights[0] * values).sum() ** 2) / 32
    assert worst == pytest.approx(exact, rel=LIMIT * math.sqrt(2.0 / REPLICATES))
    assert variance(systematic) < 0.9 * variance(stratified)
    assert variance(ssp) < 0.9 * variance(stratified)
    assert variance(stratified) < 0.9 * worst
    assert variance(residual) < 0.9 * worst
    assert variance(killing) < 1.1 * worst
    assert variance(one_for_all) > 10.0 * worst


def test_a_resampler_by_name_is_refused():
    with pytest.raises(steer.SteerError, match=r"is a function, for instance steer.systematic.*got 'ssp'"):
        steer.resample("ssp")
