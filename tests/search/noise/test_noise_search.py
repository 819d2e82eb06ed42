"""Search over noise: random, zero-order, over paths, epsilon-greedy."""

import math

import pytest
import torch
from exact import Linear, exact_chain, mixture_2d

import steer
from steer import search
from steer.core.chain import run_chain
from steer.core.loop import Loop
from steer.core.run import Run
from steer.key import Key
from steer.search.noise.paths import PathSearch

REWARD = Linear([0.7, -0.5])
STRATEGIES = [search.zero_order(), search.random_search(), search.paths(), search.epsilon_greedy()]


def process(steps=5, **options):
    mixture = mixture_2d()
    return steer.models.gaussian_mixture(
        mixture.means, mixture.covs, mixture.weights, steps=steps, dtype=torch.float64, **options
    )


def found(chain, strategy, **options):
    return search.noise_search(chain, REWARD, strategy=strategy, **options)


@pytest.mark.parametrize("strategy", [search.zero_order(0), *STRATEGIES], ids=str)
def test_without_a_budget_to_search_with_it_is_the_rollout(strategy):
    plain = steer.rollout(process(), REWARD, particles=4, batch=2, key=3)
    result = found(process(), strategy, particles=4, budget=20, batch=2, key=3)
    assert torch.equal(result.x, plain.x)
    assert torch.equal(result.reward, plain.reward)
    assert torch.equal(result.root, plain.root)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("budget", [10, 57, 203])
def test_the_budget_is_used_up_to_a_move(strategy, budget):
    result = found(process(), strategy, particles=2, budget=budget, batch=3)
    move = 2 if isinstance(strategy, PathSearch) or "Epsilon" in str(strategy) else 2 * 5
    assert budget - move < result.cost.nfe / 3 <= budget
    with pytest.raises(steer.BudgetError, match="raise the budget to 10"):
        found(process(), strategy, particles=2, budget=9)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_more_budget_finds_more(strategy):
    means = [found(process(10), strategy, budget=b, batch=60).mean_reward.mean() for b in (20, 100, 500)]
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("strategy", STRATEGIES[:3], ids=str)
def test_noise_is_searched_on_deterministic_processes(strategy):
    ode = process(10, transition=steer.ode())
    few, many = (found(ode, strategy, budget=b, batch=40).mean_reward.mean() for b in (20, 400))
    assert many > few + 0.3


def test_random_search_is_best_of_n():
    best = search.best_of_n(process(), REWARD, particles=23, batch=2, key=4)
    for chunk in (256, 7):
        result = found(process(), search.random_search(), budget=23 * 5 + 4, batch=2, key=4, chunk=chunk)
        torch.testing.assert_close(result.x, best.x, rtol=1e-12, atol=1e-12)
        assert torch.equal(result.best, best.best)
        assert torch.equal(result.root, best.root)


def test_neighbours_have_the_law_of_the_noise():
    """(z + r u) / sqrt(1 + r^2) is standard normal again, also for a prior with a mean."""
    from dataclasses import replace

    for chain in (process(2), replace(process(2), initial=(torch.tensor([3.0, -1.0]).double(), 0.5))):
        starts = []

        def denoise(x, t, chain=chain, starts=starts):
            if t == chain.times[0]:
                starts.append(x)
            return chain.denoiser(x, t)

        spied = replace(chain, denoiser=denoise)
        found(spied, search.zero_order(2, 0.7), particles=4000, budget=4000 * 2 * 3, chunk=1 << 20)
        mean, std = chain.initial or (torch.zeros(2).double(), chain.levels[0].sigma)
        pivot, near = starts[0][0], starts[1][0].view(2, 4000, 2)
        for one in near:
            z = (one - mean) / std
            torch.testing.assert_close(z.mean(0), torch.zeros(2).double(), atol=0.07, rtol=0)
            torch.testing.assert_close(z.std(0), torch.ones(2).double(), atol=0.05, rtol=0)
            both = torch.stack([z[:, 0], ((pivot - mean) / std)[:, 0]])
            assert torch.corrcoef(both)[0, 1].item() == pytest.approx(1 / math.sqrt(1.49), abs=0.05)


def test_zero_order_moves_to_the_best_and_never_back():
    """Three rounds by hand on an ODE: pivots, neighbours, scores."""
    ode, key = process(transition=steer.ode()), Key(5)

    def score(z):
        state = steer.Trajectory.begin(ode, z)
        run = Run.open("test", ode, REWARD, batch=1, temperature=1.0, key=key)
        x = run_chain(Loop(run), state).x
        return x, REWARD(x.flatten(0, 1)).view(x.shape[:2])

    pivot = ode.prior(key.fold("prior"), 1, 1)
    x, r = score(pivot)
    for turn in range(3):
        u = ode.prior(key.fold("neighbour", turn), 1, 2)
        near = (pivot + 0.5 * u) / math.sqrt(1.25)
        y, s = score(near)
        if s.max() > r.max():
            best = s.argmax(1)
            pivot, x, r = near[:, best], y[:, best], s[:, best]
    result = found(ode, search.zero_order(2, 0.5), budget=7 * 5, key=key)
    torch.testing.assert_close(result.x, x)
    torch.testing.assert_close(result.reward, r)


def test_candidates_of_a_chain_share_the_noise_of_its_steps():
    """With a vanishing radius a neighbour is the pivot, also on a stochastic process."""
    plain = found(process(), search.zero_order(0), particles=3, budget=15)
    near = found(process(), search.zero_order(2, 1e-9), particles=3, budget=15 * 5)
    torch.testing.assert_close(near.x, plain.x, atol=1e-6, rtol=0)


def levels_of(strategy, **options):
    inner, levels = process(10), []

    def denoise(x, t):
        levels.append((inner.times.index(t), x.shape[1]))
        return inner.denoiser(x, t)

    spied = steer.from_denoiser(denoise, inner.schedule, inner.times, event=(2,), dtype=torch.float64)
    return levels, found(spied, strategy, **options)


def test_paths_go_back_and_forth_and_end_at_the_data():
    strategy = search.paths(3, first=0.2, back=0.4, ahead=0.5)
    levels, result = levels_of(strategy, particles=2, budget=2 * 8 + 6 * 6 + 6 * 5 + 2 * 6 * 4)
    descent = [(k, 2) for k in range(8)]
    to_nine = [(k, 6) for k in range(4, 10)]  # five steps, and the prediction at level 9 that ranks
    to_data = [(k, 6) for k in range(5, 10)]  # from there four back, and to the data
    rounds = [(k, 6) for k in range(6, 10)]
    assert levels == descent + to_nine + to_data + rounds + rounds
    assert result.x.shape == (1, 2, 2)


def test_paths_spend_the_rest_in_shorter_rounds():
    levels, result = levels_of(search.paths(3, first=0.2, back=0.4, ahead=0.5), particles=2, budget=2 * 10 + 2 * 3)
    assert levels[:10] == [(k, 2) for k in range(10)]  # no round pays for itself and for finishing: finish first
    assert levels[10:] == [(7, 2), (8, 2), (9, 2)]
    assert result.cost.nfe == 26


@pytest.mark.slow
def test_finished_paths_are_never_lost():
    last = -math.inf
    for budget in range(9 + 5 + 4, 400, 40):  # to near the data, one round to it; every four rows more add a candidate
        result = found(process(10), search.paths(1, back=0.4), particles=1, budget=budget, key=2)
        assert result.reward.item() >= last
        last = max(last, result.reward.item())
    assert torch.equal(REWARD(result.x[0]), result.reward[0])


def test_roots_of_paths_lead_to_their_noise():
    """With nothing to rank by, the first of equals goes on: path 0 and, later, only it."""
    result = search.noise_search(
        process(10), lambda x: torch.zeros(len(x)), particles=3, budget=600, strategy=search.paths(2), key=1
    )
    assert result.root.tolist() == [[0, 1, 2]]
    # Going back by one fine step moves a sample so little that it stays nearest to the one its noise first led to.
    chain = process(100)
    first = steer.rollout(chain, REWARD, particles=6, batch=5, key=2)
    later = found(chain, search.paths(2, first=0.0, back=0.01), particles=6, budget=6 * 110, batch=5, key=2)
    assert later.cost.nfe == 5 * 6 * 110
    assert torch.equal(torch.cdist(later.x, first.x).argmin(2), later.root)
    assert not torch.equal(later.root, first.root)


def test_epsilon_greedy_counts_as_the_paper_less_one():
    """20 rounds of 4 at each of T levels: T (20 x 4) rows, where the paper says T (20 x 4 + 1)."""
    levels, result = levels_of(search.epsilon_greedy(), budget=80 * 10)
    assert levels == [(k, 4) for k in range(10) for _ in range(20)]
    assert result.cost.rewards == 800


def test_epsilon_greedy_keeps_to_the_radius_unless_fresh():
    pivot = Key(0).normal((2, 3, 8))
    run = Run.open("test", process(), REWARD, batch=2, temperature=1.0, key=1)
    centre = torch.cat([pivot] * 4, 1)
    for epsilon, radius in ((0.0, 0.15), (0.0, 2.0), (1.0, 0.15)):
        noise = search.epsilon_greedy(epsilon=epsilon, radius=radius)._draw_near(run, pivot, 1, 0, 4)
        length = (noise - centre).norm(dim=2)
        assert noise.shape == (2, 12, 8)
        assert len(torch.unique(length)) == 24
        if epsilon == 0.0:
            assert float(length.max()) <= radius * math.sqrt(8)
            assert float(length.max()) > 0.7 * radius * math.sqrt(8)
        else:
            assert float(length.min()) > radius * math.sqrt(8)


def test_epsilon_greedy_says_what_it_needs():
    with pytest.raises(steer.NotStochasticError, match="zero_order"):
        found(process(transition=steer.ode()), search.epsilon_greedy())
    with pytest.raises(steer.StateSpaceError, match="mean \\+ std noise"):
        found(exact_chain(mixture_2d(), "vp", 5), search.epsilon_greedy())


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_an_interrupt_in_the_reward_keeps_the_best_so_far(strategy):
    def reward(x):
        reward.calls += 1
        if reward.calls == 25:
            raise KeyboardInterrupt
        return REWARD(x)

    reward.calls = 0
    result = search.noise_search(process(), reward, strategy=strategy, budget=1000, chunk=8, key=1)
    assert reward.calls >= 25
    assert result.interrupted
    assert bool(result.reward.isfinite().all())
    torch.testing.assert_close(result.reward.flatten(), REWARD(result.x.flatten(0, 1)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: search.zero_order(-1),
        lambda: search.zero_order(radius=0.0),
        lambda: search.paths(0),
        lambda: search.paths(ahead=0.1),
        lambda: search.epsilon_greedy(0),
        lambda: search.epsilon_greedy(epsilon=1.5),
    ],
)
def test_bad_options_are_named(build):
    with pytest.raises(steer.SteerError, match="takes"):
        build()
