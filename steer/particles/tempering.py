"""Tempering: the share of the reward that counts at each level, fixed beforehand or found by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import population
from ..core.trajectory import Trajectory
from ..errors import SteerError
from ..processes.gaussian import need_levels

Tempering = Callable[[Trajectory, Tensor], Tensor | None]
"""(state, value [B, N]) -> exponent [B] in [0, 1] that multiplies the value at this level; None for 1 throughout."""

_KILLED = 8  # the first values are tempered where fewer than one in so many particles would count


@dataclass(frozen=True)
class GeometricTempering:
    """Exponent min(lowest + (1 + gamma)^k - 1, 1) at level k. Built by `geometric_tempering`."""

    gamma: float
    lowest: float = 0.0

    def at(self, k: int) -> float:
        """The exponent at level k."""
        # expm1 and log1p: (1 + gamma)^k - 1 for small gamma, without overflow for large k
        return min(self.lowest + math.expm1(min(k * math.log1p(self.gamma), 1.0)), 1.0)

    def __call__(self, state: Trajectory, value: Tensor) -> Tensor:
        return torch.full_like(value[:, 0], self.at(state.k))


def geometric_tempering(gamma: float = 0.008, *, lowest: float = 0.0) -> GeometricTempering:
    """Exponent min(lowest + (1 + gamma)^k - 1, 1) at level k, for `steer.difference(tempering=...)`.

    Args:
        gamma: growth per level, > 0.
        lowest: exponent to begin from, in [0, 1]. After a start at temperature T_m give it temperature / T_m, or the
            first weights undo what the start has paid for (the target is the same, at a higher variance).

    Returns:
        What the potentials take as `tempering`.

    Raises:
        SteerError: for gamma that is not positive, or lowest outside [0, 1].

    Source: DAS (Kim et al. 2025), gamma = .008 at 100 steps.
    """
    if not gamma > 0.0:
        raise SteerError(f"gamma must be positive, got {gamma}")
    return GeometricTempering(gamma, _share("lowest", lowest))


def adaptive_tempering(share: float = 0.5, *, lowest: float = 0.0) -> Callable[[Trajectory, Tensor], Tensor]:
    """The largest exponent, never falling, that keeps the ESS at or above share * N. For `difference` potentials.

    Args:
        share: of N, in (0, 1], that the ESS is to keep.
        lowest: exponent to begin from, in [0, 1], as in `geometric_tempering`.

    Returns:
        What the potentials take as `tempering`: one exponent per problem and level, by bisection.

    Raises:
        SteerError: for numbers outside their ranges.

    Source: Jasra et al. 2011.
    """
    lowest = _share("lowest", lowest)

    def exponent(state: Trajectory, value: Tensor) -> Tensor:
        begin = torch.full_like(value[:, 0], lowest)
        begin = begin if state.path.exponent is None else state.path.exponent[:, 0]
        forbidden = value == -torch.inf  # predictions that leave their weights as they are, see `Potential.apply`
        value = value.masked_fill(forbidden, 0.0)
        counted = state.path.log_potential_or_zero(value).masked_fill(forbidden, 0.0)
        return population.temper(state.log_weight + begin[:, None] * value - counted, value, begin, share=share)

    return exponent


def snr_share(state: Trajectory, value: Tensor) -> Tensor:
    """The signal's share of a state, alpha^2 / (alpha^2 + sigma^2), as the exponent of its value: a tempering.

        steer.smc(process, reward, weight=steer.difference(tempering=steer.snr_share))

    r(x0_hat) says more at high noise than is known there, so that weights on the way are too far apart. With this
    exponent log_evidence varies less from run to run and more starting noises survive; whoever wants the best sample
    alone gains nothing.

    Args:
        state: a population on a Gaussian path.
        value: its values r(x0_hat) / temperature, [B, N].

    Returns:
        Exponents [B], the same for all problems.

    Raises:
        StateSpaceError: states on no Gaussian path.

    Cost: none.
    Source: the posterior's variance of unit-variance data is 1 minus this share; measured in docs/benchmarks.md.
    """
    here = need_levels(state.process, "tempering by the signal's share", cure=_CURE).levels[state.k]
    return torch.full_like(value[:, 0], here.alpha**2 / (here.alpha**2 + here.sigma**2))


_CURE = "use steer.geometric_tempering(gamma) or steer.adaptive_tempering()"


def cautious_tempering(state: Trajectory, value: Tensor) -> Tensor | None:
    """Exponent 1, except from first values that would leave an ESS below an eighth of N: then `adaptive_tempering()`.

    The default of `steer.smc`. The first predictions of a network may lie far out of the range of the data, and rewards
    of them kill all seeds but one, before anything is known of any. Gone on from a tempered state, it raises the
    exponent found there. Reads the device once in a run.
    """
    if state.path.exponent is None:
        if state.path.log_potential is not None:  # the first values passed, or a start has counted its own
            return None
        forbidden = value == -torch.inf
        full = population.ess(state.log_weight + value.masked_fill(forbidden, 0.0))
        passed = full >= value.shape[1] / _KILLED
        if bool(passed.all()):
            return None
        return torch.where(passed, torch.ones_like(full), _adaptive(state, value))
    return _adaptive(state, value)


def _share(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise SteerError(f"{name} must be in [0, 1], got {value}")
    return float(value)


_adaptive = adaptive_tempering()
