"""Paths and grids: derivatives against differences, the ends, inverse of the angle, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler

import steer
from steer.processes import schedules
from steer.processes.schedules import VE, VP, Cosine, RectifiedFlow, Tabulated

ALPHAS_CUMPROD = DDPMScheduler(num_train_timesteps=50, beta_end=0.2).alphas_cumprod.double().tolist()
SCHEDULES = {
    "vp": VP(),
    "vp-other": VP(0.5, 12.0),
    "cosine": Cosine(),
    "ve": VE(),
    "ve-small": VE(3.0),
    "flow": RectifiedFlow(),
    "tabulated": Tabulated(ALPHAS_CUMPROD),
}
each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@each
def test_derivatives_equal_central_differences(schedule):
    """Relative error below 1e-6 of a fourth-order difference, away from the kinks of a table."""
    h = 2e-4
    for t in (0.0505, 0.173, 0.35, 0.51, 0.731, 0.93):
        at = schedule(t)
        for i, derivative in ((0, at.d_alpha), (1, at.d_sigma)):
            near = schedule(t + h)[i] - schedule(t - h)[i]
            far = schedule(t + 2 * h)[i] - schedule(t - 2 * h)[i]
            assert derivative == pytest.approx((8 * near - far) / (12 * h), rel=1e-6, abs=1e-9), (t, i)


@each
def test_data_end_and_direction(schedule):
    """alpha(0) = 1, sigma(0) = 0; towards noise alpha never rises and sigma always does."""
    assert schedule(0.0)[:2] == (pytest.approx(1.0, abs=1e-15), pytest.approx(0.0, abs=1e-7))
    grid = [i / 200 for i in range(201)]
    for a, b in itertools.pairwise(schedule(t) for t in grid):
        assert b.alpha <= a.alpha
        assert b.sigma > a.sigma
    if not isinstance(schedule, VE | RectifiedFlow):
        for t in grid:
            assert math.hypot(*schedule(t)[:2]) == pytest.approx(1.0, abs=1e-12)


def test_published_values():
    """VP: log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2. Cosine: alpha ~ cos(pi/2 (t + s)/(1 + s))."""
    assert VP()(1.0).alpha == pytest.approx(math.exp(-0.25 * 19.9 - 0.05), rel=1e-14)
    assert VP()(0.3).alpha == pytest.approx(math.exp(-0.25 * 0.09 * 19.9 - 0.015), rel=1e-14)
    expected = math.cos(math.pi / 2 * 0.408 / 1.008) / math.cos(math.pi / 2 * 0.008 / 1.008)
    assert Cosine()(0.4).alpha == pytest.approx(expected, rel=1e-14)
    assert VE()(0.25)[:2] == (1.0, 20.0)
    assert RectifiedFlow()(0.3) == (0.7, 0.3, -1.0, 1.0)
    assert RectifiedFlow()(1.0)[:2] == (0.0, 1.0)


def test_tabulated_reproduces_its_table():
    """alpha^2 is the table at t = (i + 1) / len, and the geometric mean of neighbours half-way."""
    schedule, length = SCHEDULES["tabulated"], len(ALPHAS_CUMPROD)
    for i, entry in enumerate(ALPHAS_CUMPROD):
        at = schedule((i + 1) / length)
        assert at.alpha == pytest.approx(math.sqrt(entry), rel=1e-13)
        assert at.sigma == pytest.approx(math.sqrt(1.0 - entry), rel=1e-12)
    between = schedule(7.5 / length).alpha
    assert between == pytest.approx((ALPHAS_CUMPROD[6] * ALPHAS_CUMPROD[7]) ** 0.25, rel=1e-13)


def test_tabulated_is_a_value():
    same, other = Tabulated(ALPHAS_CUMPROD), Tabulated(ALPHAS_CUMPROD[:-1])
    assert same == SCHEDULES["tabulated"]
    assert hash(same) == hash(SCHEDULES["tabulated"])
    assert same != other
    assert same != Tabulated(ALPHAS_CUMPROD, start=0.9)
    assert "50 levels" in repr(same)
    assert Tabulated(torch.tensor(ALPHAS_CUMPROD, dtype=torch.float64)) == same


@pytest.mark.parametrize(
    "table", [[], [0.5, 0.6], [0.9, 0.9], [0.9, 0.0], [0.9, -0.1], [1.1, 0.5], [1.0, 0.5], [0.9, math.nan]]
)
def test_tabulated_refuses_a_bad_table(table):
    with pytest.raises(steer.SteerError, match=r"fall strictly from below 1 and stay above 0.*drop the last entry"):
        Tabulated(table)


@each
def test_time_at_inverts_the_angle(schedule):
    for t in (0.02, 0.1, 0.37, 0.5, 0.8, 0.97, schedule.start):
        assert schedules.time_at(schedule, schedules.angle(schedule, t)) == pytest.approx(t, abs=1e-9)
    assert schedules.time_at(schedule, 0.0) == 0.0
    assert schedules.time_at(schedule, math.pi) == pytest.approx(1.0)  # clamped to the interval
    assert schedules.time_at(schedule, math.pi, highest=0.5) == pytest.approx(0.5)
    assert schedules.angle(schedule, 0.0) == pytest.approx(0.0, abs=1e-7)
    assert schedules.angle(RectifiedFlow(), 0.5) == pytest.approx(math.pi / 4)


GRIDS = {
    "uniform": schedules.uniform_times,
    "log-snr": schedules.log_snr_times,
    "sigma": schedules.sigma_times,
}


@each
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 18])
def test_grids_fall_from_the_start_to_the_data(schedule, grid, steps):
    times = grid(schedule, steps)
    assert len(times) == steps + 1
    assert times[0] == schedule.start
    assert times[-1] == 0.0
    assert all(a > b for a, b in itertools.pairwise(times))
    assert schedules.check_times(times) == times


def test_grids_are_spaced_as_they_say():
    vp = VP()
    assert schedules.uniform_times(vp, 4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert schedules.uniform_times(vp, 2, start=0.5) == (0.5, 0.25, 0.0)

    def log_snr(t):
        return math.log(vp(t).alpha / vp(t).sigma)

    times = schedules.log_snr_times(vp, 7, end=1e-2)
    assert times[-2] == 1e-2
    gaps = [log_snr(b) - log_snr(a) for a, b in itertools.pairwise(times[:-1])]
    assert gaps == pytest.approx([gaps[0]] * 6, rel=1e-6)
    assert schedules.log_snr_times(vp, 7, start=0.6)[0] == 0.6

    # Karras et al. 2022, Eq. 5, at their defaults
    n, low, high, rho = 18, 0.002, 80.0, 7.0
    expected = [
        (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho / high for i in range(n)
    ]
    assert schedules.sigma_times(VE(), n) == pytest.approx([*expected, 0.0], rel=1e-9)
    ratios = [vp(t).sigma / vp(t).alpha for t in schedules.sigma_times(vp, 5, sigma_max=10.0, sigma_min=0.1)[:-1]]
    assert ratios[0] == pytest.approx(10.0, rel=1e-9)
    assert ratios[-1] == pytest.approx(0.1, rel=1e-9)


@pytest.mark.parametrize(
    "times",
    [
        (),
        (1.0,),
        (1.0, 1.0, 0.0),
        (1.0, 0.5, 0.6),
        (1.0, 0.2, 0.3, 0.0),
        (0.0, 0.5, 1.0),
        (1.5, 0.0),
        (1.0, -0.1),
        (1.0, math.nan, 0.0),
        (math.nan, 0.0),
        (1.0, math.nan),
    ],
)
def test_check_times_refuses(times):
    with pytest.raises(steer.SteerError, match=r"times must fall strictly .* got .*uniform_times"):
        schedules.check_times(times)


def test_check_times_accepts_grids_that_end_above_the_data():
    assert schedules.check_times([1, 0.5, 0.02]) == (1.0, 0.5, 0.02)
    assert schedules.check_times([1, 0.02, 0.02]) == (1.0, 0.02, 0.02)  # as DDIM's grids with set_alpha_to_one=False
    assert all(type(t) is float for t in schedules.check_times(torch.tensor([1.0, 0.5, 0.0])))


def test_nearest():
    times = (1.0, 0.6, 0.3, 0.0)
    cases = {1.0: 0, 2.0: 0, 0.81: 0, 0.79: 1, 0.6: 1, 0.46: 1, 0.44: 2, 0.16: 2, 0.14: 3, 0.0: 3, -1.0: 3}
    for t, k in cases.items():
        assert schedules.nearest(times, t) == k


@each
def test_level_is_the_path_at_a_time(schedule):
    assert schedules.level(schedule, 0.4) == (0.4, *schedule(0.4))
