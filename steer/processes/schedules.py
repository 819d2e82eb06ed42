"""Gaussian paths x_t = alpha(t) x_0 + sigma(t) eps, and time grids on them.

Each schedule gives its time derivatives in closed form, as Python floats: coefficients are scalars of the host, so no
step of a chain waits for the device.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import SteerError
from ..types import Coeffs, Level, Schedule


@dataclass(frozen=True)
class VP:
    """Variance preserving, linear beta(t) from beta_min to beta_max (Song et al. 2021, "VP SDE").

    alpha(1) = .0066 at the defaults, so a chain starts at t = 1.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    start: float = 1.0

    def __call__(self, t: float) -> Coeffs:
        log_alpha = -0.25 * t * t * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        half_beta = 0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))
        return _variance_preserving(log_alpha, -half_beta)


@dataclass(frozen=True)
class Cosine:
    """Variance preserving, alpha(t) proportional to cos(pi/2 (t + s)/(1 + s)) (Nichol & Dhariwal 2021, Eq. 17).

    alpha(1) = 0, where the score's drift diverges: a chain starts at t = .999.
    """

    s: float = 0.008
    start: float = 0.999

    def __call__(self, t: float) -> Coeffs:
        rate = 0.5 * math.pi / (1.0 + self.s)
        angle, angle_at_data = rate * (t + self.s), rate * self.s
        alpha = math.cos(angle) / math.cos(angle_at_data)
        d_alpha = -rate * math.sin(angle) / math.cos(angle_at_data)
        sigma = math.sqrt(max(0.0, 1.0 - alpha * alpha))
        return Coeffs(alpha, sigma, d_alpha, -alpha * d_alpha / sigma if sigma > 0 else math.inf)


@dataclass(frozen=True)
class VE:
    """Variance exploding in EDM's time: alpha = 1, sigma(t) = sigma_max t (Karras et al. 2022, "EDM").

    A geometric schedule of sigmas is the same path on another time grid: see `sigma_times`.
    """

    sigma_max: float = 80.0
    start: float = 1.0

    def __call__(self, t: float) -> Coeffs:
        return Coeffs(1.0, self.sigma_max * t, 0.0, self.sigma_max)


@dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t) x_0 + t eps, velocity E[eps - x_0 | x_t] (Liu et al. 2023; Lipman et al. 2023).

    At t = 1 the state holds no signal: eps and score no longer determine x_0, and the path's own diffusion
    coefficient diverges. A chain therefore starts at t = .999 unless its grid says otherwise; velocity and x_0 models
    may start at 1.
    """

    start: float = 0.999

    def __call__(self, t: float) -> Coeffs:
        return Coeffs(1.0 - t, t, -1.0, 1.0)


@dataclass(frozen=True)
class Trigonometric:
    """x_t = cos(pi t / 2) x_0 + scale sin(pi t / 2) eps: every variance-preserving path, by the angle of its levels.

    A path's clock changes nothing but its time grid, so the tables of variance-preserving schedulers, whatever their
    betas and with or without a zero terminal SNR, are grids on this one path. scale: standard deviation of the noise
    (TrigFlow's sigma_data, Lu & Song 2025). alpha(1) = 0: see `RectifiedFlow`.
    """

    scale: float = 1.0
    start: float = 0.999

    def __call__(self, t: float) -> Coeffs:
        rate = 0.5 * math.pi
        # sin of the complement, so that alpha(1) is 0 and not 6e-17
        alpha, sine = math.sin(rate * (1.0 - t)), math.sin(rate * t)
        return Coeffs(alpha, self.scale * sine, -rate * sine, self.scale * rate * alpha)


class Tabulated:
    """Variance-preserving path through tabulated squared signal rates, as diffusers' `alphas_cumprod`.

    alphas_cumprod: decreasing, entry i at t = (i + 1) / len; alpha = 1 is put at t = 0. Between entries log(alpha^2)
    is linear in t, that is, beta is piecewise constant, as it was in training.
    """

    def __init__(self, alphas_cumprod: Sequence[float], start: float = 1.0):
        table = [1.0, *map(float, alphas_cumprod)]
        if len(table) < 2 or any(not 0.0 < b < a <= 1.0 for a, b in itertools.pairwise(table)):
            raise SteerError(
                "Tabulated expects squared signal rates that fall strictly from below 1 and stay above 0 "
                f"(alphas_cumprod), got {len(table) - 1} values from {table[1:2]} to {table[-1:]}; "
                "for a zero terminal SNR drop the last entry"
            )
        self.start = start
        self._log_alpha = [0.5 * math.log(a) for a in table]

    def __call__(self, t: float) -> Coeffs:
        last = len(self._log_alpha) - 1
        i = min(int(t * last), last - 1)
        slope = (self._log_alpha[i + 1] - self._log_alpha[i]) * last
        return _variance_preserving(self._log_alpha[i] + (t - i / last) * slope, slope)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tabulated) and (self._log_alpha, self.start) == (other._log_alpha, other.start)

    def __hash__(self) -> int:
        return hash((tuple(self._log_alpha), self.start))

    def __repr__(self) -> str:
        return f"Tabulated({len(self._log_alpha) - 1} levels, alpha down to {math.exp(self._log_alpha[-1]):.3g})"


def _variance_preserving(log_alpha: float, d_log_alpha: float) -> Coeffs:
    alpha = math.exp(log_alpha)
    sigma = math.sqrt(-math.expm1(2.0 * log_alpha))
    d_alpha = alpha * d_log_alpha
    return Coeffs(alpha, sigma, d_alpha, -alpha * d_alpha / sigma if sigma > 0 else math.inf)


def level(schedule: Schedule, t: float) -> Level:
    """The point of a path at time t."""
    return Level(t, *schedule(t))


def angle(schedule: Schedule, t: float) -> float:
    """atan2(sigma, alpha): noise-to-signal as a finite number that grows with t, 0 at data, pi/2 at pure noise."""
    alpha, sigma, _, _ = schedule(t)
    return math.atan2(sigma, alpha)


def time_at(schedule: Schedule, target: float, *, lowest: float = 0.0, highest: float = 1.0) -> float:
    """The time at which `angle` reaches a target, by bisection to the last bit of t (clamped to the interval)."""
    for _ in range(80):
        middle = 0.5 * (lowest + highest)
        if angle(schedule, middle) < target:
            lowest = middle
        else:
            highest = middle
    return 0.5 * (lowest + highest) if target > 0 else 0.0


def uniform_times(schedule: Schedule, steps: int, *, start: float | None = None) -> tuple[float, ...]:
    """A time grid of equal steps, from the schedule's start to 0.

    Args:
        schedule: the path.
        steps: number of steps, >= 1.
        start: first time; None for the schedule's own.

    Returns:
        steps + 1 times, falling.
    """
    first = schedule.start if start is None else start
    return (*(first * (1.0 - k / steps) for k in range(steps)), 0.0)


def log_snr_times(
    schedule: Schedule, steps: int, *, start: float | None = None, end: float = 1e-3
) -> tuple[float, ...]:
    """A time grid with steps equal in log(alpha / sigma), hence of equal information, then a last one to 0.

    Args:
        schedule: the path.
        steps: number of steps, >= 1, the last of which goes from `end` to 0.
        start: first time; None for the schedule's own.
        end: the last time before 0; not used by a grid of one step.

    Returns:
        steps + 1 times, falling: `steps` of them equally spaced in log(alpha / sigma) from start to end, then 0.
    """
    first, last = (math.log(math.tan(angle(schedule, t))) for t in (schedule.start if start is None else start, end))
    inner = (first + (last - first) * k / (steps - 1) for k in range(1, steps - 1)) if steps > 1 else ()
    times = [schedule.start if start is None else start]
    times += [time_at(schedule, math.atan(math.exp(v))) for v in inner]
    return (*times, end, 0.0) if steps > 1 else (*times, 0.0)


def sigma_times(
    schedule: Schedule, steps: int, *, sigma_min: float = 0.002, sigma_max: float | None = None, rho: float = 7.0
) -> tuple[float, ...]:
    """A time grid with noise-to-signal ratios from sigma_max to sigma_min, evenly in their 1/rho power, then 0.

    Args:
        schedule: the path.
        steps: number of steps, >= 1, the last of which goes to 0.
        sigma_min, sigma_max: smallest and largest noise-to-signal ratio sigma / alpha; the largest is by default that
            of the schedule's start.
        rho: the larger, the more of the levels are at low noise; 7 in the paper.

    Returns:
        steps + 1 times, falling.

    Source: Karras et al. 2022, Eq. 5 (their sigma is sigma / alpha here).
    """
    most = math.tan(angle(schedule, schedule.start)) if sigma_max is None else sigma_max
    a, b = most ** (1.0 / rho), sigma_min ** (1.0 / rho)
    ratios = [(a + (b - a) * k / max(1, steps - 1)) ** rho for k in range(steps)]
    times = [time_at(schedule, math.atan(r)) for r in ratios]
    if sigma_max is None:
        times[0] = schedule.start
    return (*times, 0.0)


def check_times(times: Sequence[float]) -> tuple[float, ...]:
    """A time grid, checked: two or more times, strictly decreasing within [0, 1].

    It ends at 0, the data, or wherever a pretrained model's own grid ends, whose last step may stay at its level.
    """
    grid = tuple(float(t) for t in times)
    falls = all(a > b for a, b in itertools.pairwise(grid[:-1])) and grid[-1:] == (min(grid, default=None),)
    if len(grid) < 2 or not falls or grid[-1] < 0.0 or grid[0] > 1.0:
        raise SteerError(
            f"times must fall strictly from at most 1 (noise) to 0 (data), got {len(grid)} times "
            f"from {grid[:1]} to {grid[-1:]}; `steer.uniform_times(schedule, steps)` makes such a grid"
        )
    return grid


def nearest(times: Sequence[float], t: float) -> int:
    """Index of the level of a decreasing grid nearest to t."""
    rising = list(reversed(times))
    i = bisect.bisect_left(rising, t)
    best = min((j for j in (i - 1, i) if 0 <= j < len(rising)), key=lambda j: abs(rising[j] - t))
    return len(times) - 1 - best
