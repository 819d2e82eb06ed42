"""Functions of rewards: their arithmetic and laws, units, bounds, gradients, and what is forbidden."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch

import steer
from steer.errors import NotDifferentiableError, RewardError
from steer.rewards import (
    DigitLogProb,
    Ink,
    JPEGSize,
    Linear,
    Quadratic,
    Saturation,
    Symmetry,
    chunked,
    clip,
    gate,
    group_zscore,
    judge,
    log,
    minimum,
    product,
    rank,
    softmin,
    target,
    weighted,
    zscore,
)
from steer.search import best_of_n
from steer.types import RewardSpec

INF, NAN = math.inf, math.nan


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def first(samples: torch.Tensor) -> torch.Tensor:
    return samples[:, 0]


def second(samples: torch.Tensor) -> torch.Tensor:
    return samples[:, 1]


def lengths(samples: torch.Tensor, *, prompts: list[str]) -> list[float]:
    return [float(len(prompt)) for prompt in prompts]


POINTWISE = {
    "zscore": lambda r, s: zscore(r, 0.3, 2.0),
    "clip": lambda r, s: clip(r, 0.2, 0.7),
    "target": lambda r, s: target(r, 0.4),
    "log": lambda r, s: log(r),
    "minimum": lambda r, s: minimum(r, s),
    "softmin": lambda r, s: softmin(r, s, width=0.3),
    "product": lambda r, s: product(r, s),
    "gate": lambda r, s: gate(r, s, 0.5),
}
GROUPWISE = {"rank": lambda r, s: rank(r), "group_zscore": lambda r, s: group_zscore(r, 0.01)}
DEFINITIONS = {
    "zscore": lambda r, s: (r - 0.3) / 2.0,
    "clip": lambda r, s: min(max(r, 0.2), 0.7),
    "target": lambda r, s: -abs(r - 0.4),
    "log": lambda r, s: math.log(r),
    "minimum": min,
    "softmin": lambda r, s: -0.3 * math.log((math.exp(-r / 0.3) + math.exp(-s / 0.3)) / 2),
    "product": lambda r, s: r * s,
    "gate": lambda r, s: r if s >= 0.5 else -INF,
}


@pytest.mark.parametrize("name", POINTWISE)
def test_scores_are_those_of_the_definition(name):
    x = rows(20, 2)
    expected = torch.tensor([DEFINITIONS[name](*row) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(POINTWISE[name](first, second)(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", POINTWISE)
def test_gradient_is_that_of_finite_differences(name):
    x = rows(6, 2)
    x = x[x[:, 1] > 0.51] if name == "gate" else x
    assert len(x) > 1
    assert torch.autograd.gradcheck(POINTWISE[name](first, second), x.requires_grad_())


@pytest.mark.parametrize("name", POINTWISE)
def test_what_a_part_forbids_stays_forbidden_and_spoils_no_gradient(name):
    def picky(samples: torch.Tensor) -> torch.Tensor:
        return samples[:, 0].masked_fill(samples[:, 0] < 0.3, -INF)

    x = torch.tensor([[0.1, 0.9], [0.6, 0.8], [0.2, 0.2]], dtype=torch.float64, requires_grad=True)
    for reward in (POINTWISE[name](picky, second), POINTWISE[name](second, picky)):
        if picky not in (*reward.parts, *reward.judges):
            continue  # a function of one reward
        scores = reward(x)
        assert (scores == -INF).tolist() == [True, False, True]
        (slope,) = torch.autograd.grad(scores[1], x)
        assert slope.isfinite().all()
        assert slope[1].abs().sum() > 0 or name == "clip"


@pytest.mark.parametrize("name", POINTWISE)
def test_nan_is_not_hidden(name):
    x = torch.tensor([[NAN, 0.9], [0.6, 0.8]], dtype=torch.float64)
    assert POINTWISE[name](first, second)(x).isnan().tolist() == [True, False]
    if name in ("minimum", "softmin", "product", "gate"):
        assert POINTWISE[name](second, first)(x).isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", POINTWISE)
def test_bounds_hold_and_scores_do_not_depend_on_the_batch(name):
    images = rows(12, 3, 8, 8, seed=3)
    reward = POINTWISE[name](Ink(), Saturation())
    scores, (low, high) = reward(images), reward.spec.bounds
    kept = scores[scores > -INF]
    assert low <= kept.min() <= kept.max() <= high
    assert reward.spec.scope == "pointwise"
    torch.testing.assert_close(chunked(reward, 5)(images), scores)
    order = torch.arange(11, -1, -1)
    torch.testing.assert_close(reward(images[order]), scores[order])


def test_laws():
    x = rows(30, 2)
    r, s = first, second
    same = lambda a, b: torch.testing.assert_close(a(x), b(x), rtol=1e-12, atol=1e-12)  # noqa: E731
    same(minimum(r, s), minimum(s, r))
    same(minimum(r, r), clip(r))
    same(softmin(r, r, width=0.2), clip(r))  # idempotent: equal scores are their own soft minimum
    same(product(r, s), product(s, r))
    same(log(product(r, s)), weighted((1.0, log(r)), (1.0, log(s))))
    same(clip(clip(r, 0.2, 0.8), 0.2, 0.8), clip(r, 0.2, 0.8))
    same(zscore(zscore(r, 1.0, 2.0), 0.5, 4.0), zscore(r, 2.0, 8.0))
    same(target(r, 0.0), weighted((-1.0, r)))  # r >= 0 here
    same(rank(zscore(r, 0.1, 0.7)), rank(r))  # of a monotone function
    same(group_zscore(zscore(r, 0.1, 0.5), 1e-9), group_zscore(r, 1e-9))
    below, between = minimum(r, s)(x), softmin(r, s, width=0.1)(x)
    assert (below <= between).all()
    assert (between <= below + 0.1 * math.log(2) + 1e-12).all()
    assert (between <= x.mean(1) + 1e-12).all()
    torch.testing.assert_close(softmin(r, s, width=1e-4)(x), below, rtol=0, atol=1e-4)
    torch.testing.assert_close(softmin(r, s, width=1e4)(x), x.mean(1), rtol=0, atol=1e-4)


def test_rank_is_the_share_of_the_others_below():
    x = torch.tensor([[3.0], [1.0], [1.0], [7.0], [-INF]])
    assert rank(first)(x).tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6, 1.0, -INF])
    assert rank(first)(x[:1]).tolist() == [0.5]
    assert rank(first)(torch.tensor([[NAN], [1.0], [2.0]])).isnan().tolist() == [True, False, False]
    assert rank(first)(x[:0]).shape == (0,)


def test_group_zscore_has_a_floor_and_leaves_the_forbidden_out():
    x = torch.tensor([[1.0], [3.0], [-INF]], dtype=torch.float64)
    assert group_zscore(first, 0.1)(x).tolist() == pytest.approx([-1.0, 1.0, -INF])
    close = torch.tensor([[1.0], [1.0 + 1e-6]], dtype=torch.float64)
    assert group_zscore(first, 0.1)(close).abs().max() < 1e-5  # no advantage out of nothing
    assert group_zscore(first, 1e-9)(close).tolist() == pytest.approx([-1.0, 1.0])
    assert group_zscore(first, 0.1)(x[:0]).shape == (0,)


def test_a_gate_is_open_at_its_threshold():
    x = torch.tensor([[7.0, 0.5], [7.0, 0.49], [7.0, -INF]])
    assert gate(first, second, 0.5)(x).tolist() == [7.0, -INF, -INF]


def test_logs_and_products_of_what_is_not_positive():
    x = torch.tensor([[0.0, 2.0], [-1.0, 2.0], [3.0, -2.0]], dtype=torch.float64, requires_grad=True)
    scores = log(first)(x)
    assert scores[0] == -INF
    assert scores[1].isnan()
    assert torch.autograd.grad(scores[2] + scores[0], x)[0].isfinite().all()
    assert product(first, second)(x).isnan().tolist() == [False, True, True]
    for make in (log, product):
        with pytest.raises(RewardError, match=r"at least 0, and Symmetry says that it goes down to -1; clip .*low=0.0"):
            make(Symmetry())
        make(clip(Symmetry(), low=0.0))  # the cure works


def test_units():
    ink, digit, jpeg = Ink(), DigitLogProb(3), JPEGSize()
    assert zscore(jpeg, 1.0, 2.0).spec.unit == "z"
    assert weighted((1.0, zscore(jpeg, 1.0, 2.0)), (1.0, zscore(digit, -3.0, 2.0))).spec.unit == "z"
    assert clip(jpeg, -5.0).spec.unit == target(jpeg, 3.0).spec.unit == gate(jpeg, digit, -1.0).spec.unit == "kB"
    assert log(judge(3)).spec.unit == "nat"
    assert log(first).spec.unit == "nat"
    assert minimum(ink, Symmetry()).spec.unit == "1"
    assert product(ink, judge(3)).spec.unit == "1"
    assert product(ink, clip(jpeg, 0.0)).spec.unit == "kB"
    assert product(ink, first).spec.unit is None
    assert rank(jpeg).spec.unit == "1"
    for make in (lambda *r: minimum(*r), lambda *r: softmin(*r, width=1.0)):
        with pytest.raises(RewardError, match=r"cannot compare JPEGSize \(in kB\) with DigitLogProb\(3\) \(in nat\)"):
            make(digit, jpeg)
    with pytest.raises(RewardError, match=r'needs a pure number, and JPEGSize is in kB; .*"1/kB"'):
        log(jpeg)
    assert log(weighted((1.0, clip(jpeg, 0.0), "1/kB"))).spec.unit == "nat"


def test_bounds_are_those_of_the_function():
    assert zscore(Ink(), 0.5, 0.25).spec.bounds == (-2.0, 2.0)
    assert clip(Ink(), 0.2).spec.bounds == (0.2, 1.0)
    assert target(Ink(), 0.25).spec.bounds == (-0.75, 0.0)
    assert target(Ink(), 3.0).spec.bounds == (-3.0, -2.0)
    assert log(Ink()).spec.bounds == (-INF, 0.0)
    assert minimum(Ink(), Symmetry()).spec.bounds == (-1.0, 0.0)
    assert weighted((-2.0, Ink()), (1.0, Symmetry())).spec.bounds == (-3.0, 0.0)
    assert product(Ink(), clip(JPEGSize(), 0.0)).spec.bounds == (0.0, INF)


@pytest.mark.parametrize(
    "make",
    [
        lambda: zscore(first, 0.0, 0.0),
        lambda: zscore(first, NAN, 1.0),
        lambda: clip(first, 1.0, 1.0),
        lambda: target(first, INF),
        lambda: minimum(),
        lambda: softmin(first, second, width=-1.0),
        lambda: product(),
        lambda: gate(first, second, NAN),
        lambda: group_zscore(first, 0.0),
        lambda: minimum(first, 3),
    ],
)
def test_settings_that_mean_nothing_are_refused(make):
    with pytest.raises(RewardError, match=r"must be|needs low < high|takes one or more rewards"):
        make()


def test_prompts_reach_the_parts_that_name_them():
    x, prompts = rows(3, 2), ["a", "bb", "cccc"]
    for reward in (minimum(first, lengths), gate(first, lengths, 2.0), rank(lengths)):
        assert reward.spec.prompts
        assert "prompts" in inspect.signature(reward).parameters
        assert reward(x, prompts=prompts).shape == (3,)
    assert gate(first, lengths, 2.0)(x, prompts=prompts)[0] == -INF
    assert "prompts" not in inspect.signature(minimum(first, second)).parameters


def test_half_a_gradient_is_refused_and_a_gate_needs_none():
    images = rows(2, 1, 8, 8).requires_grad_()
    files = weighted((1.0, JPEGSize(size=8), "1/kB"))
    assert minimum(Ink(), files).spec.gradient == "none"
    with pytest.raises(NotDifferentiableError, match=r"minimum\(Ink, 1\*JPEGSize\) would leave out 1\*JPEG"):
        minimum(Ink(), files)(images)
    with torch.no_grad():
        assert minimum(Ink(), files)(images).shape == (2,)
    gated = gate(Ink(), JPEGSize(size=8), -10.0)
    assert gated.spec.gradient == "exact"
    assert torch.autograd.grad(gated(images).sum(), images)[0].abs().sum() > 0
    with pytest.raises(NotDifferentiableError, match="has no gradient"):
        rank(Ink())(images)


# What samplers make of it

PROCESS = steer.models.gaussian([0.0, 0.0], 1.0, steps=4)


@pytest.mark.parametrize("name", GROUPWISE)
def test_no_law_is_tilted_by_a_comparison_within_a_group(name):
    reward = GROUPWISE[name](Linear([1.0, 0.0]), None)
    for method in (steer.smc, steer.importance_sampling, steer.tds):
        with pytest.raises(RewardError, match=rf"{name}\(Linear\) scores a sample against .*best_of_n"):
            method(PROCESS, reward, particles=4, key=0)
    with pytest.raises(RewardError, match="scores a sample against"):
        steer.smc(PROCESS, weighted((1.0, reward)), particles=4, key=0)
    with pytest.raises(RewardError, match="compares samples with the others"):
        chunked(reward, 2)


@pytest.mark.parametrize("name", GROUPWISE)
def test_the_group_is_one_problem_whatever_the_chunk(name):
    plain, reward = Linear([1.0, 0.0]), GROUPWISE[name](Linear([1.0, 0.0]), None)
    whole = steer.rollout(PROCESS, reward, batch=3, particles=7, key=0)
    alone = steer.rollout(PROCESS, plain, batch=3, particles=7, key=0)
    for problem in range(3):
        torch.testing.assert_close(whole.reward[problem], reward(alone.x[problem]).double(), rtol=1e-5, atol=1e-5)
    found = best_of_n(PROCESS, reward, batch=3, particles=7, key=0, chunk=2)
    torch.testing.assert_close(found.reward, whole.reward)
    best = best_of_n(PROCESS, plain, batch=3, particles=7, key=0, chunk=2)
    assert torch.equal(found.log_weight, best.log_weight)  # a monotone function has the same best


def test_every_group_gets_its_own_prompts():
    seen = []

    def wordy(samples: torch.Tensor, *, prompts: list[str]) -> torch.Tensor:
        seen.append(list(prompts))
        return samples[:, 0]

    conditioned = dataclasses.replace(PROCESS, problems=2, prompts=("a cat", "a dog"))
    steer.rollout(conditioned, rank(wordy), particles=3, key=0)
    assert seen == [["a cat"] * 3, ["a dog"] * 3]


def test_a_sum_is_tilted_by_as_its_parts_say():
    """Pointwise compositions run in SMC: z-scoring with frozen constants is tempering, exactly."""
    reward = Quadratic([0.5, -0.5], 0.4)
    one = steer.smc(PROCESS, zscore(reward, -1.0, 2.0), batch=4, particles=64, key=0)
    other = steer.smc(PROCESS, reward, batch=4, particles=64, key=0, temperature=2.0)
    torch.testing.assert_close(one.log_weight, other.log_weight, rtol=1e-4, atol=1e-4)


def test_a_declared_lack_of_gradient_is_refused_before_the_network_is_called():
    calls = []

    class Silent:
        spec = RewardSpec("1", gradient="none")

        def __call__(self, samples: torch.Tensor) -> torch.Tensor:
            calls.append(len(samples))
            return samples[:, 0]

    with pytest.raises(
        NotDifferentiableError, match=r'Silent, which says .*spec.gradient is "none".*steer.smc with its default'
    ):
        steer.smc(PROCESS, Silent(), particles=4, key=0, proposal=steer.guided())
    assert calls == []
    assert steer.smc(PROCESS, Silent(), particles=4, key=0).reward.shape == (1, 4)


def test_flags_and_counts_are_scores_too():
    """Functions of rewards take what samplers take: booleans and integers."""
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def flag(x):
        return x.flatten(1).mean(1) > 0.5

    def count(x):
        return (x > 0.5).flatten(1).sum(1)

    assert (gate(flag, Ink(), 10.0)(images) == -INF).all()
    assert torch.equal(gate(flag, Ink(), -10.0)(images), flag(images).double())
    assert torch.equal(clip(count, 0, 30)(images), count(images).clamp(0, 30).double())
    for combined in (
        product(flag, count),
        minimum(flag, count),
        target(count, 30.0),
        zscore(count, 30.0, 4.0),
        rank(flag),
    ):
        assert bool(combined(images).isfinite().all())


def test_the_bounds_of_a_soft_minimum_are_reached_and_no_closer():
    """Between the least of the lows, and the mean of the highs: a wide one is the mean, above the least of them."""

    def rising(low, high):
        def reward(x):
            return low + (high - low) * x[:, 0]

        reward.spec = RewardSpec(unit="1", bounds=(low, high), gradient="exact")
        return reward

    parts = rising(0.0, 1.0), rising(-1.0, 3.0)
    whole = softmin(*parts, width=1e4)
    assert whole.spec.bounds == (-1.0, 2.0)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(whole(ends), torch.tensor([-0.5, 2.0]).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(softmin(*parts, width=1e-4)(ends), torch.tensor([-1.0, 1.0]).double(), atol=1e-3, rtol=0)
