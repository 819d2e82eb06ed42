"""Depth-first search: when it goes back, what it keeps, what it spends."""

import math

import pytest
import torch
from exact import Linear, exact_chain, mixture_2d

import steer
from steer import search

REWARD = Linear([0.7, -0.5])


def process(steps=8, **options):
    mixture = mixture_2d()
    return steer.models.gaussian_mixture(
        mixture.means, mixture.covs, mixture.weights, steps=steps, dtype=torch.float64, **options
    )


def visited(**options):
    """The levels a chain is predicted at, in order, and its result."""
    inner, levels = process(), []

    def denoise(x, t):
        levels.append(inner.times.index(t))
        return inner.denoiser(x, t)

    spied = steer.from_denoiser(denoise, inner.schedule, inner.times, event=(2,), dtype=torch.float64)
    return levels, search.depth_first(spied, REWARD, **options)


def test_the_first_sample_is_the_rollout():
    chain = process()
    result = search.depth_first(chain, REWARD, particles=4, budget=4 * 8, batch=2, key=3)
    torch.testing.assert_close(result.x, steer.rollout(chain, REWARD, particles=4, batch=2, key=3).x)


def test_without_a_budget_it_has_rows_for_sixteen_samples_a_chain():
    assert search.depth_first(process(), REWARD, particles=2).cost.nfe == 2 * 16 * 8


def test_a_low_threshold_never_goes_back_before_the_data():
    levels, result = visited(budget=20, threshold=-1e9, back=5, every=2)
    assert levels == [*range(8), *range(3, 8), *range(3, 8), 6, 7]
    assert result.cost.nfe == 20


def test_a_high_threshold_goes_back_whenever_the_data_stays_in_reach():
    levels, _ = visited(budget=18, threshold=1e9, back=2, every=4)
    # Looks at level 4. Two levels back costs two predictions more; with 18 rows that is affordable three times.
    assert levels == [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3, 4, 5, 6, 7, 7]


@pytest.mark.parametrize("budget", [8, 9, 57, 200])
@pytest.mark.parametrize("threshold", [None, 0.5, lambda k: 0.1 * k], ids=["record", "number", "function"])
def test_the_budget_is_used_exactly(budget, threshold):
    result = search.depth_first(process(), REWARD, budget=budget, threshold=threshold, batch=3)
    assert result.cost.nfe == 3 * budget


def test_the_best_finished_sample_is_kept():
    """On an exact chain finished samples are scored by themselves: the best of those scores is returned."""
    finished = []

    def reward(x):
        scores = REWARD(x)
        finished.append(scores)
        return scores

    chain = exact_chain(mixture_2d(), "vp", 6)
    best = search.depth_first(chain, reward, budget=100)
    calls = torch.cat(finished)
    assert len(calls) > 100  # predictions, and samples
    assert best.reward.item() == pytest.approx(REWARD(best.x[0]).item())
    assert best.reward.item() > search.depth_first(chain, REWARD, budget=6).reward.item()


@pytest.mark.slow
def test_it_runs_on_deterministic_processes():
    result = search.depth_first(process(transition=steer.ode()), REWARD, budget=200, batch=10)
    first = search.depth_first(process(transition=steer.ode()), REWARD, budget=8, batch=10)
    assert (result.reward >= first.reward).all()
    assert result.reward.mean() > first.reward.mean() + 0.3


def test_from_the_data_it_goes_back_from_its_best(monkeypatch):
    """The first sample scores highest: every later attempt begins from it."""
    sources, noise = [], steer.GaussianProcess.noise

    def watched(self, x, k_from, k_to, key):
        sources.append((k_from, x[0, 0]))
        return noise(self, x, k_from, k_to, key)

    monkeypatch.setattr(steer.GaussianProcess, "noise", watched)
    numbers = iter(range(0, -1000, -1))
    falling = search.depth_first(process(), lambda x: torch.tensor([float(next(numbers))]), budget=40, threshold=-1e9)
    assert [k for k, _ in sources] == [8] * 8
    assert all(torch.equal(x, falling.x[0, 0]) for _, x in sources)


def test_going_back_draws_new_noise_every_time():
    inner, seen = process(), []

    def denoise(x, t):
        seen.append(x.flatten())
        return inner.denoiser(x, t)

    spied = steer.from_denoiser(denoise, inner.schedule, inner.times, event=(2,), dtype=torch.float64)
    search.depth_first(spied, REWARD, budget=150, threshold=1e9)
    states = torch.stack(seen)
    assert len(torch.unique(states, dim=0)) == 150


def test_stopped_early_it_returns_its_best_sample_or_else_a_prediction():
    def stopping(at):
        calls = []

        def watch(event):
            calls.append(event.level)
            if len(calls) == at:
                raise steer.Stop

        return search.depth_first(process(), REWARD, budget=100, on_step=watch, key=1)

    early, late = stopping(3), stopping(50)
    assert early.interrupted
    assert late.interrupted
    assert early.cost.nfe == 3
    assert late.cost.nfe == 50
    assert late.reward >= search.depth_first(process(), REWARD, budget=8, key=1).reward


@pytest.mark.parametrize("options", [{"back": -1}, {"every": -2}])
def test_bad_options_are_named(options):
    with pytest.raises(steer.SteerError, match="at least 1"):
        search.depth_first(process(), REWARD, **options)
    with pytest.raises(steer.BudgetError):
        search.depth_first(process(), REWARD, budget=7)
    assert math.isnan(search.depth_first(process(), REWARD, budget=8).log_evidence.item())


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("every", "back"), [(1, 1), (1, 3), (2, 5)])
def test_chains_that_restart_go_back_to_what_is_noisier(every, back, guided):
    """There the level `back` before may be the cleaner one."""
    chain = steer.guidance.restart(process(20), [(0.2, 0.6, 2)])
    chain = steer.guide(chain, steer.guidance.Hooks()) if guided else chain
    for key in range(3):
        run = search.depth_first(chain, REWARD, budget=4 * chain.steps, every=every, back=back, key=key)
        assert 3 * chain.steps < run.cost.nfe <= 4 * chain.steps
