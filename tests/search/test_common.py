"""What every search owes besides the contract of all methods: events, errors that keep what was found, seeds."""

import functools
import itertools
import math

import pytest
import torch
from exact import Linear, mixture_2d

import steer
from steer import search
from steer.core.trajectory import Trajectory
from steer.results.result import Result

REWARD = Linear([0.7, -0.5])
STEPS = 5

NOISE = {
    "zero_order": search.zero_order(),
    "random_search": search.random_search(),
    "paths": search.paths(),
    "epsilon_greedy": search.epsilon_greedy(),
}
SEARCHES = {
    "best_of_n": search.best_of_n,
    "best_of_n_chunked": functools.partial(search.best_of_n, chunk=3),
    "svdd": functools.partial(search.svdd, candidates=2),
    "svdd_learned": functools.partial(search.svdd, value=search.values.learned(lambda x, k: REWARD(x))),
    "beam": search.beam,
    "beam_blocks": functools.partial(search.beam, block=2),
    "rbf": functools.partial(search.rbf, quota=2),
    "depth_first": search.depth_first,
    **{name: functools.partial(search.noise_search, strategy=strategy) for name, strategy in NOISE.items()},
}
CHAINS = {"rbf": search.rbf, "depth_first": search.depth_first}


def process(**options):
    mixture = mixture_2d()
    return steer.models.gaussian_mixture(
        mixture.means, mixture.covs, mixture.weights, steps=STEPS, dtype=torch.float64, **options
    )


@pytest.fixture(params=SEARCHES)
def method(request):
    return SEARCHES[request.param]


def fails_at(call, value):
    """A reward whose last score is `value` at some call, and how often it was called."""

    def reward(x):
        reward.calls += 1
        scores = REWARD(x).clone()
        if reward.calls == call:
            scores[-1] = value
        return scores

    reward.calls = 0
    return reward


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_error_at_any_call_keeps_what_was_found(method, value):
    counted = fails_at(0, value)
    method(process(), counted, particles=4, batch=2)
    for call in {1, 2, 3, counted.calls // 2, counted.calls} & set(range(1, counted.calls + 1)):
        with pytest.raises(steer.NonFiniteError) as caught:
            method(process(), fails_at(call, value), particles=4, batch=2)
        partial = caught.value.partial
        assert isinstance(partial, Result | Trajectory)
        assert partial.x.shape[0] == 2
        assert partial.x.shape[2:] == (2,)
        if isinstance(partial, Result):
            assert partial.interrupted
            assert bool(partial.reward.isfinite().all())
            torch.testing.assert_close(partial.reward, REWARD(partial.x.flatten(0, 1)).view(2, -1))


@pytest.mark.parametrize("method", CHAINS.values(), ids=CHAINS)
def test_a_first_call_that_fails_leaves_starting_states_to_resume(method):
    with pytest.raises(steer.NonFiniteError) as caught:
        method(process(), fails_at(1, math.nan), particles=3, budget=150, batch=2, key=4)
    partial = caught.value.partial
    assert torch.equal(partial.x, process().prior(steer.Key(4).fold("prior"), 2, 3))
    assert steer.smc(process(), REWARD, start=partial, batch=2).x.shape == (2, 3, 2)


def test_seed_is_another_name_for_key(method):
    by_key, by_seed, other = (
        method(process(), REWARD, particles=3, **named) for named in ({"key": 5}, {"seed": 5}, {"seed": 6})
    )
    assert torch.equal(by_seed.x, by_key.x)
    assert torch.equal(by_seed.reward, by_key.reward)
    assert by_seed.key == by_key.key == steer.Key(5)
    assert not torch.equal(by_seed.x, other.x)
    with pytest.raises(steer.SteerError, match="give one of them"):
        method(process(), REWARD, particles=3, key=5, seed=5)


def test_a_value_is_fitted_by_seed_as_by_key():
    def fitted(**named):
        network = torch.nn.Linear(2, 1, dtype=torch.float64)
        torch.nn.init.constant_(network.weight, 0.1)
        torch.nn.init.zeros_(network.bias)

        class Value(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.network = network

            def forward(self, x, k):
                return self.network(x)[:, 0]

        search.values.fit(process(), REWARD, Value(), particles=40, epochs=1, **named)
        return network.weight.detach()

    assert torch.equal(fitted(seed=3), fitted(key=3))
    assert not torch.equal(fitted(seed=3), fitted(seed=4))
    with pytest.raises(steer.SteerError, match="give one of them"):
        fitted(key=3, seed=3)


def events_of(method, chain, **options):
    """The events of a run, and what it would have returned had it been stopped at each of them."""
    events, stopped = [], []
    method(chain, REWARD, on_step=events.append, **options)

    def stop_at(count):
        def watch(event):
            watch.calls += 1
            if watch.calls == count:
                raise steer.Stop

        watch.calls = 0
        return method(chain, REWARD, on_step=watch, **options)

    for count in (1, 2, len(events) // 2, len(events)):
        stopped.append((events[count - 1], stop_at(count)))
    return events, stopped


@pytest.mark.parametrize("method", CHAINS.values(), ids=CHAINS)
def test_problems_have_events_of_their_own(method):
    """Chains of two problems share network calls, and each problem is told of its own."""
    events, stopped = events_of(method, process(), particles=2, budget=60, batch=2, key=1)
    assert {tuple(event.problems) for event in events} == {(0,), (1,)}
    for event in events:
        assert event.state.x.shape[0] == len(event.problems) == 1
        assert event.state.x.shape == event.x0.shape == (*event.scores.shape, 2)
        torch.testing.assert_close(event.scores, REWARD(event.x0.flatten(0, 1)).view(event.scores.shape))
    first, second = (  # both problems begin together, one event each
        [event.state.x for event in events[:2] if tuple(event.problems) == (problem,)] for problem in (0, 1)
    )
    assert len(first) == len(second) == 1
    for event, result in stopped:
        (problem,) = event.problems
        assert set(event.scores.flatten().tolist()) <= set(result.reward[problem].tolist())


@pytest.mark.parametrize("method", CHAINS.values(), ids=CHAINS)
def test_a_problem_has_the_same_events_alone(method):
    together, _ = events_of(method, process(), particles=2, budget=60, batch=2, key=1)
    alone, _ = events_of(method, process(), particles=2, budget=60, key=steer.Key(1).shifted(problem=1))
    second = [event for event in together if tuple(event.problems) == (1,)]
    # Levels at which the other problem lingers pass without a call of this one: the order is its own all the same.
    assert [event.level for event in second] == [event.level for event in alone]
    for one, other in zip(second, alone, strict=True):
        torch.testing.assert_close(one.state.x, other.state.x)
        torch.testing.assert_close(one.scores, other.scores)


@pytest.mark.parametrize("particles", [1, 2])
def test_an_events_level_is_the_one_valued_next(particles):
    """With several chains, the noisiest of theirs: those ahead wait."""
    inner, asked, levels = process(), [], []

    def denoise(x, t):
        asked.append(inner.times.index(t))
        return inner.denoiser(x, t)

    def watch(event):
        levels.append(event.level)

    spied = steer.from_denoiser(denoise, inner.schedule, inner.times, event=(2,), dtype=torch.float64)
    search.rbf(spied, REWARD, particles=particles, budget=60 * particles, key=2, on_step=watch)
    assert levels == asked[1:]
    assert levels == sorted(levels)
    assert levels[-1] == STEPS - 1
    asked.clear()
    levels.clear()
    search.depth_first(spied, REWARD, particles=particles, budget=60 * particles, threshold=0.3, every=1, on_step=watch)
    assert [level for level in levels if level < STEPS] == asked[1:]
    assert any(later < earlier for earlier, later in itertools.pairwise(levels))  # it went back
