"""Rollover budget forcing: Algorithm 2 written out, and its accounting."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from exact import Linear, exact_chain, mixture_2d

import steer
from steer import search

REWARD = Linear([0.7, -0.5])


def process(steps=5, **options):
    mixture = mixture_2d()
    return steer.models.gaussian_mixture(
        mixture.means, mixture.covs, mixture.weights, steps=steps, dtype=torch.float64, **options
    )


def algorithm_2(process, reward, quota, key, chains, slot, current=False):
    """The paper's box for one chain, one call at a time, with candidate j named j chains + slot. Calls per level."""
    calls, left, record, here = [], 0, -math.inf, None
    for k in range(process.steps):
        left, tried = left + quota[k], []
        for j in range(left):
            name = key.fold("prior" if k == 0 else "step").shifted(slot=j * chains + slot)
            y = process.prior(name, 1, 1) if k == 0 else process.transition(*here, k - 1).sample(name.at(k - 1))
            y0 = process.denoise(y, k)
            tried.append((reward(y0.flatten(0, 1)).item(), y, y0))
            if 0 < k < process.steps - 1 and tried[-1][0] > record:
                break
        calls.append(len(tried))
        left -= len(tried)
        score, y, y0 = max(tried, key=lambda found: found[0])
        here, record = (y, y0), score if current else max(record, score)
    return here[1][0, 0], score, calls


@pytest.mark.parametrize("threshold", ["running_max", "current"])
@pytest.mark.parametrize("chains", [1, 2, 3])
def test_it_is_algorithm_2(threshold, chains):
    result = search.rbf(process(), REWARD, budget=30 * chains, particles=chains, threshold=threshold, key=6)
    for slot in range(chains):
        x, score, calls = algorithm_2(
            process(), REWARD, [6] * 5, steer.Key(6), chains, slot, current=threshold == "current"
        )
        assert sum(calls) == 30
        torch.testing.assert_close(result.x[0, slot], x)
        assert result.reward[0, slot].item() == pytest.approx(score)


@pytest.mark.slow
def test_thresholds_differ():
    runs = [search.rbf(process(10), REWARD, budget=40, threshold=name, batch=30) for name in ("running_max", "current")]
    changed = (runs[0].x != runs[1].x).any(2)
    assert 0 < int(changed.sum()) < 30  # only chains that fell back


@pytest.mark.parametrize("budget", [10, 11, 99, 500])
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("initial", [None, 3])
def test_the_budget_is_used_exactly(budget, particles, initial):
    if budget < particles * (4 + (initial or 1)):
        with pytest.raises(steer.BudgetError):
            search.rbf(process(), REWARD, budget=budget, particles=particles, initial=initial)
        return
    result = search.rbf(process(), REWARD, budget=budget, particles=particles, initial=initial, batch=3)
    assert result.cost.nfe == result.cost.rewards == 3 * budget


def levels_of(run, process):
    """How many states each level of the network saw."""
    counts = [0] * process.steps

    def denoise(x, t):
        counts[process.times.index(t)] += x.shape[0] * x.shape[1]
        return process.denoiser(x, t)

    spied = steer.from_denoiser(denoise, process.schedule, process.times, event=(2,), dtype=torch.float64)
    return run(spied), counts


def scripted(values):
    """A reward that gives each call's row the next number."""
    numbers = iter(values)
    return lambda x: torch.tensor([next(numbers) for _ in range(len(x))], dtype=torch.float64)


def test_steady_improvement_takes_one_call_per_level():
    run = functools.partial(search.rbf, reward=scripted(range(10_000)), budget=60, particles=1, initial=4)
    _, counts = levels_of(lambda p: run(p), process(6))
    assert counts == [4, 1, 1, 1, 1, 52]  # the last level spends what was saved


def test_no_improvement_spends_each_level_where_it_is():
    run = functools.partial(search.rbf, reward=scripted(range(0, -10_000, -1)), budget=60, particles=1)
    _, counts = levels_of(lambda p: run(p), process(6))
    assert counts == [10] * 6


def test_an_equal_value_is_no_improvement():
    run = functools.partial(search.rbf, reward=scripted([1.0] * 200), budget=60, particles=1)
    _, counts = levels_of(lambda p: run(p), process(6))
    assert counts == [10] * 6


def test_rollover_moves_to_the_next_level_only():
    """An improvement at the third call of level 1 leaves 7 of its 10 calls to level 2."""
    scores = [0.0] * 10 + [-1.0, -1.0, 5.0] + [-2.0] * 100
    run = functools.partial(search.rbf, reward=scripted(scores), budget=50, particles=1)
    _, counts = levels_of(lambda p: run(p), process(5))
    assert counts == [10, 3, 17, 10, 10]


def test_the_running_maximum_is_not_lowered_and_the_current_sample_is():
    # Level 0 reaches 9. Level 1 falls back to 3 at best. In level 2 the first 4 beats the sample, not the maximum.
    scores = [9.0, 0.0, 3.0, 0.0, 4.0] + [0.0] * 100
    for threshold, expected in (("running_max", [2, 2, 2, 2, 2]), ("current", [2, 2, 1, 3, 2])):
        run = functools.partial(search.rbf, reward=scripted(scores), budget=10, particles=1, threshold=threshold)
        _, counts = levels_of(lambda p, run=run: run(p), process(5))
        assert counts == expected


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("finish", ["prediction", "integration"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_constant_reward_makes_it_argmax_svdd(particles, finish, exact):
    """Bitwise the same samples: same candidates with the same key."""
    chain = exact_chain(mixture_2d(), "vp", 5) if exact else process()

    def constant(x):
        return torch.zeros(len(x))

    rollover = search.rbf(chain, constant, particles=particles, quota=4, finish=finish, batch=2, key=8)
    svdd = search.svdd(chain, constant, particles=particles, candidates=4, select="argmax", batch=2, key=8)
    assert rollover.cost.nfe == svdd.cost.nfe
    if finish == "integration" or not exact:
        torch.testing.assert_close(rollover.x, svdd.x)  # one row at a time, or all at once: rounding differs
    budget = search.rbf(chain, constant, particles=particles, budget=5 * 4 * particles, finish=finish, batch=2, key=8)
    assert torch.equal(budget.x, rollover.x)


def test_the_initial_best_of():
    result = search.rbf(process(), REWARD, particles=1, quota=2, initial=30, batch=20)
    assert result.cost.nfe == 20 * (30 + 2 * 4)
    x = process().prior(steer.Key(0).fold("prior"), 20, 30)
    predicted = process().denoise(x, 0)
    best = REWARD(predicted.flatten(0, 1)).view(20, 30).argmax(1)
    assert torch.equal(result.root[:, 0], best)


def test_predictions_and_integration_end_alike_where_the_last_step_is_deterministic():
    runs = [search.rbf(process(), REWARD, budget=60, finish=how, batch=3) for how in ("prediction", "integration")]
    torch.testing.assert_close(runs[0].x, runs[1].x)
    assert runs[0].cost.nfe == runs[1].cost.nfe
    torch.testing.assert_close(runs[0].reward, REWARD(runs[0].x.flatten(0, 1)).view(3, 2))


def test_two_chains_are_run_where_the_budget_affords_them():
    assert search.rbf(process(), REWARD, budget=9).x.shape[1] == 1
    assert search.rbf(process(), REWARD, budget=10).x.shape[1] == 2
    assert search.rbf(process(), REWARD).x.shape[1] == 1


def test_flows_need_a_stochastic_rule():
    flow = process(schedule=steer.RectifiedFlow(), transition=steer.ode())
    with pytest.raises(steer.NotStochasticError, match=r"ddim\(eta=1.0\)"):
        search.rbf(flow, REWARD, budget=60)
    for chain in (
        flow.with_rule(steer.euler_maruyama(lambda level: 3.0 * level.t**2)),
        steer.convert(flow, steer.VP()).with_rule(steer.ddim()),
    ):
        assert search.rbf(chain, REWARD, budget=60).cost.nfe == 60


def test_steps_without_noise_hand_their_quota_on():
    half = process(6, transition=steer.churn(0.3, highest=1.0))
    assert not all(half.stochastic(k) for k in range(5))
    assert search.rbf(half, REWARD, budget=101, batch=2).cost.nfe == 2 * 101


@pytest.mark.parametrize("method", [search.rbf, search.depth_first])
@pytest.mark.parametrize("name", ["digits", "digits-flow"])
def test_problems_of_a_conditioned_process_are_each_alone(name, method):
    def opened(labels):
        model = steer.load(name, steps=4, labels=labels)
        return model if name == "digits" else steer.convert(model, steer.VP(), 4)

    def brightness(images):
        return images.mean((1, 2, 3))

    both = method(opened([3, 8]), brightness, budget=15, particles=2)
    assert both.cost.nfe == 30
    for problem, label in enumerate((3, 8)):
        alone = method(opened(label), brightness, budget=15, particles=2, key=steer.Key(0).shifted(problem=problem))
        torch.testing.assert_close(both.x[problem], alone.x[0])
        torch.testing.assert_close(both.reward[problem], alone.reward[0])


def test_a_denoiser_that_cannot_be_asked_about_one_problem_is_refused():
    with pytest.raises(steer.ShapeError, match=r"give it a method only\(problem\)"):
        search.rbf(replace(process(), problems=3), REWARD, budget=60)
    assert search.rbf(replace(process(), problems=1), REWARD, budget=60).cost.nfe == 60


def test_a_stop_returns_every_chains_current_prediction():
    def watch(state):
        watch.calls += 1
        if watch.calls == 3:
            raise steer.Stop

    watch.calls = 0
    result = search.rbf(process(), REWARD, budget=500, batch=2, on_step=watch)
    assert result.interrupted
    assert result.x.shape == (2, 2, 2)
    assert result.cost.nfe < 2 * 500
    torch.testing.assert_close(result.reward, REWARD(result.x.flatten(0, 1)).view(2, 2))


@pytest.mark.slow
def test_a_longer_budget_finds_more():
    means = [search.rbf(process(10), REWARD, budget=b, batch=30).mean_reward.mean() for b in (20, 200, 1000)]
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize(("name", "value"), [("threshold", "max"), ("finish", "later"), ("quota", 0), ("initial", 0)])
def test_bad_options_are_named(name, value):
    with pytest.raises(steer.SteerError, match=name):
        search.rbf(process(), REWARD, **{name: value})
