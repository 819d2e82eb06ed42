"""Soft value decoding: its limits, its cost, and the law it tends to."""

import functools

import pytest
import torch
from exact import Linear, exact_chain, mixture_2d, z

import steer
from steer import search
from steer.core.trajectory import PathState
from steer.search import selection
from steer.search.selection import Choice

REWARD = Linear([0.7, -0.5])


def process(steps=5, **options):
    mixture = mixture_2d()
    return steer.models.gaussian_mixture(mixture.means, mixture.covs, mixture.weights, steps=steps, **options)


@pytest.fixture(params=["ddim", "exact", "flow"])
def chain(request):
    if request.param == "ddim":
        return process()
    return exact_chain(mixture_2d(), "vp" if request.param == "exact" else "flow", 5)


def test_one_candidate_is_the_rollout(chain):
    steered = search.svdd(chain, REWARD, particles=6, candidates=1, batch=2, key=3)
    assert torch.equal(steered.x, steer.rollout(chain, REWARD, particles=6, batch=2, key=3).x)


def test_a_step_costs_one_prediction_per_candidate():
    result = search.svdd(process(), REWARD, particles=3, candidates=4, batch=2)
    assert (result.cost.nfe, result.cost.rewards) == (2 * 3 * 4 * 5, 2 * 3 * 4 * 5)
    # The last step of an exact chain draws noise: candidates of x_0 too, which cost rewards and no predictions.
    result = search.svdd(exact_chain(mixture_2d(), "vp", 5), REWARD, particles=3, candidates=4, batch=2)
    assert (result.cost.nfe, result.cost.rewards) == (2 * 3 * 4 * 5, 2 * 3 * 4 * 6)


def test_no_candidate_reaches_the_network_twice():
    seen = []
    inner = process(dtype=torch.float64)

    def denoise(x, t):
        seen.append(x.flatten(0, 1))
        return inner.denoiser(x, t)

    spied = steer.from_denoiser(denoise, inner.schedule, inner.times, event=(2,), dtype=torch.float64)
    result = search.svdd(spied, REWARD, particles=3, candidates=4, select="argmax", replace=0.4)
    states = torch.cat(seen)
    assert len(states) == result.cost.nfe == len(torch.unique(states, dim=0))


def test_argmax_is_the_limit_of_small_temperatures(chain):
    run = functools.partial(search.svdd, chain, REWARD, particles=4, candidates=5, batch=2, key=1)
    hard = run(select="argmax")
    assert torch.equal(run(temperature=1e-12).x, hard.x)
    assert torch.equal(run(temperature=7.0, select="argmax").x, hard.x)
    assert not torch.equal(run(temperature=1.0).x, hard.x)


def linear_gaussian():
    """A chain whose soft values are r(x0_hat) + constant(k): V_k = b E[x_0 | x] + b^2 Var / 2 for r = b x."""
    gaussian = steer.models.gaussian([0.0], 1.0, steps=3, dtype=torch.float64)
    return gaussian.with_rule(steer.models.ExactStep(gaussian.reference)), Linear([1.0])


def errors(candidates, particles, **options):
    chain, reward = linear_gaussian()
    target = chain.exact(reward)
    result = search.svdd(chain, reward, particles=particles, candidates=candidates, key=1, chunk=1 << 20, **options)
    centred = result.x[0, :, 0] - target.mean
    return centred, centred.square() - target.cov[0, 0]


@pytest.mark.slow
def test_bias_halves_when_candidates_double():
    """Exact values, nested importance sampling: a bias of order 1 / M, -1 at M = 1 where nothing is tilted."""
    bias = {m: errors(m, 40_000)[0].mean().item() for m in (1, 8, 16, 32)}
    assert bias[1] == pytest.approx(-1.0, abs=0.02)
    assert 1.6 < bias[8] / bias[16] < 2.2
    assert 1.6 < bias[16] / bias[32] < 2.2


@pytest.mark.parametrize(
    ("options", "right"), [({}, True), ({"temperature": 0.8}, False), ({"select": "argmax"}, False)], ids=str
)
def test_many_candidates_give_the_tilted_law(options, right):
    """1,200 chains tell the mutants by z = 9 of the mean (colder by a fifth) and by hundreds (argmax)."""
    mean, variance = errors(768, 1200, **options)
    assert (max(abs(z(mean)), abs(z(variance))) < 4.0) == right


def test_candidates_may_depend_on_the_level():
    """One starting noise per chain, as in the released code."""
    result = search.svdd(process(), REWARD, particles=2, candidates=lambda k: 1 if k == 0 else 3)
    assert [seen.score.shape[1] for seen in result.seen] == [2, 6, 6, 6, 6, 2]
    assert result.cost.nfe == 2 * (1 + 4 * 3)
    assert torch.equal(result.root, torch.tensor([[0, 1]]))
    with pytest.raises(steer.SteerError, match="candidates must be at least 1"):
        search.svdd(process(), REWARD, candidates=lambda k: k)


def test_a_budget_buys_candidates_first():
    cases = (38, 1, [8, 8, 8, 7, 7, 1]), (200, 2, [40] * 5 + [2]), (4001, 40, [800] * 5 + [40])
    for budget, particles, widths in cases:
        result = search.svdd(process(), REWARD, budget=budget)
        assert result.x.shape[1] == particles
        assert [seen.score.shape[1] for seen in result.seen] == widths
        assert budget - particles < result.cost.nfe <= budget


def test_guidance_pairs_count_twice():
    from dataclasses import replace

    result = search.svdd(replace(process(), rows=2), REWARD, budget=41)
    assert result.cost.nfe == 40


def test_results_do_not_depend_on_chunks():
    whole, parts = (search.svdd(process(), REWARD, particles=3, candidates=7, chunk=c, key=2) for c in (256, 4))
    torch.testing.assert_close(whole.x, parts.x, rtol=1e-6, atol=1e-6)


def choice(values, key=0, **changes):
    values = torch.as_tensor(values, dtype=torch.float64)
    fields = {
        "path": PathState(),
        "particles": values.shape[1],
        "temperature": 1.0,
        "k": 1,
        "steps": 4,
        "separable": True,
    }
    return Choice(values, **{**fields, "separable": True, "key": steer.Key(key), **changes})


def test_replacement_takes_the_worst_and_draws_in_proportion():
    values = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(20_000, -1)
    rule = selection.replace_worst(selection.argmax(), 0.5)
    index = rule(choice(values))
    assert torch.equal(index[:, [1, 3]], torch.tensor([1, 3]).expand(20_000, -1))
    share = torch.bincount(index[:, [0, 2]].flatten(), minlength=4) / 40_000
    torch.testing.assert_close(share.double(), torch.softmax(values[0].double(), 0), atol=0.01, rtol=0)
    # copies that could not part are not made, and a share of 0 is no rule of its own
    assert torch.equal(rule(choice(values, separable=False))[0], torch.arange(4))
    assert selection.replace_worst(selection.argmax(), 0.0) == selection.argmax()


def test_replacement_raises_the_mean_and_costs_diversity():
    run = functools.partial(search.svdd, process(20), REWARD, particles=20, candidates=3, batch=20)
    plain, replaced = run(), run(replace=0.1)
    assert replaced.mean_reward.mean() > plain.mean_reward.mean()
    roots = [len(torch.unique(row)) for row in replaced.root]
    assert max(roots) < 20
    assert replaced.cost.nfe == plain.cost.nfe


def test_forbidden_predictions_are_avoided_where_possible():
    def reward(x):
        return torch.where(x[:, 0] > 0.0, REWARD(x), -torch.inf)

    for options in ({}, {"select": "argmax"}, {"replace": 1.0}):
        result = search.svdd(process(), reward, particles=4, candidates=8, batch=2, **options)
        assert bool((result.x[..., 0] > 0).all())
    forbidding = functools.partial(torch.full_like, fill_value=-torch.inf)
    nowhere = search.svdd(process(), lambda x: forbidding(x[:, 0]), particles=4, candidates=2, replace=1.0)
    assert bool((nowhere.reward == -torch.inf).all())


def test_a_deterministic_process_needs_no_candidates():
    deterministic = process(transition=steer.ode())
    with pytest.raises(steer.NotStochasticError, match=r"ddim\(eta=1.0\).*noise_search"):
        search.svdd(deterministic, REWARD, candidates=4)
    assert search.svdd(deterministic, REWARD, particles=3, candidates=1).cost.nfe == 15


def test_a_step_without_noise_gets_one_candidate():
    half = process(6, transition=steer.churn(0.3, highest=1.0))
    quiet = [not half.stochastic(k) for k in range(6)]
    assert 0 < sum(quiet) < 6
    result = search.svdd(half, REWARD, particles=2, budget=101)
    widths = [seen.score.shape[1] for seen in result.seen]
    assert all((width == 2) == q for width, q in zip(widths[1:], quiet, strict=True))
    assert 99 <= result.cost.nfe <= 101


def test_unknown_rules_are_named():
    with pytest.raises(steer.SteerError, match="categorical, argmax"):
        search.svdd(process(), REWARD, select="best")
    with pytest.raises(steer.SteerError, match="share of chains"):
        search.svdd(process(), REWARD, replace=1.5)
