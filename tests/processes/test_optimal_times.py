"""The chosen grid against all grids, and what it costs."""

import itertools

import pytest
import torch
from exact import mixture_2d

import steer
from steer.processes.gaussian import ddim_jump


def ode_end(process, x, chosen):
    """Where deterministic steps through these levels lead."""
    for here, there in itertools.pairwise(chosen):
        x0 = process.complete(x, process.denoise(x, here))
        x = ddim_jump(x, x0, process.levels[here], process.levels[there])
    return x


def errors(process, steps, key=0):
    """Distance to the end of the fine path of every grid of so many steps, by its levels."""
    x = process.prior(steer.Key(key).fold("prior"), 1, 4)
    last = process.steps
    fine = ode_end(process, x, range(last + 1))
    inner = itertools.combinations(range(1, last), steps - 1)
    grids = [(0, *levels, last) for levels in inner]
    return {grid: float((ode_end(process, x, grid) - fine).square().mean()) for grid in grids}


def levels_of(process, times):
    return tuple(process.times.index(t) for t in times)


@pytest.mark.parametrize("schedule", [steer.VP(), steer.RectifiedFlow()], ids=["vp", "flow"])
def test_on_a_gaussian_it_is_the_best_of_all_grids(schedule):
    process = steer.models.gaussian(torch.zeros(3), 0.4, schedule=schedule, steps=12, dtype=torch.float64)
    found = levels_of(process, steer.optimal_times(process, 4))
    every = errors(process, 4)
    assert len(every) == 165
    best = min(every, key=every.get)
    assert every[found] <= 1.001 * every[best], (found, best)
    assert every[found] < 0.9 * every[(0, 3, 6, 9, 12)]


def test_on_a_mixture_it_beats_equal_steps():
    mixture = mixture_2d()
    process = steer.models.gaussian_mixture(mixture.means, mixture.covs, mixture.weights, steps=24)
    found = levels_of(process, steer.optimal_times(process, 6, particles=16, seed=3))
    x = process.prior(steer.Key(9), 1, 64)
    fine = ode_end(process, x, range(25))

    def error(grid):
        return float((ode_end(process, x, grid) - fine).square().mean())

    assert error(found) < 0.8 * error(range(0, 25, 4))  # on other noises than it was chosen by


def test_all_steps_are_the_grid_itself_and_one_is_its_ends():
    process = steer.models.gaussian(torch.zeros(2), 0.4, steps=6)
    assert steer.optimal_times(process, 6) == process.times
    assert steer.optimal_times(process, 1) == (process.times[0], process.times[-1])


def test_the_cost_is_as_said():
    rows = []

    def denoiser(x, t):
        rows.append(x.shape[0] * x.shape[1])
        return 0.5 * x

    process = steer.from_denoiser(denoiser, steer.VP(), 10, event=(2,))
    times = steer.optimal_times(process, 4, particles=3)
    assert 3 * 10 < sum(rows) <= 3 * 4 * 10
    assert process.with_times(times).steps == 4


def test_refusals():
    process = steer.models.gaussian(torch.zeros(2), 0.4, steps=6)
    with pytest.raises(steer.SteerError, match="which has 6; got 7"):
        steer.optimal_times(process, 7)
    with pytest.raises(steer.StateSpaceError, match="choosing times needs a GaussianProcess"):
        steer.optimal_times(process.with_rule(steer.second_order()), 3)
    with pytest.raises(steer.StateSpaceError):
        steer.optimal_times(steer.load("letters"), 3)
