"""How intermediate values of the reward weight particles on the way, without changing where they end.

At the levels in `at`, the value v = r(x0_hat) / temperature of each particle enters a log-potential g(v, path). What
was multiplied in so far is kept per particle, and the last step *closes*: it multiplies in r(x_0) / temperature minus
all of it. The weights of every choice below therefore target p(x) exp(r(x) / temperature) exactly; they differ in
variance only. (Released FK-steering closes its max and sum potentials on the statistic instead, which has another
target.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.trajectory import PathState, Trajectory
from .tempering import Tempering, cautious_tempering

Combine = Callable[[Tensor, PathState], tuple[Tensor, dict[str, Any]]]
"""(value [B, N], what the path remembers) -> (log-potential [B, N], fields of PathState to change)."""


@dataclass(frozen=True)
class Potential:
    """What multiplies particle weights at intermediate levels.

    Built by `difference`, `maximum`, `total`, `final_only`.

    combine:   (value [B, N], what the path remembers) -> the log-potential [B, N], and fields of `PathState` to change.
    at:        timesteps to evaluate and weight at; None for all but the last prediction, which the closing repeats.
    tempering: exponent of the value by level; None for 1 throughout.
    telescopes: whether the weight so far depends on the latest value alone, as `steer.path_moves` needs it.
    """

    combine: Combine
    at: frozenset[int] | None = None
    tempering: Tempering | None = None
    telescopes: bool = False

    def active(self, k: int, steps: int) -> bool:
        """Whether values are evaluated at level k."""
        return k < steps - 1 if self.at is None else k in self.at

    def apply(self, state: Trajectory, value: Tensor) -> Trajectory:
        """The state reweighted by values [B, N] = r(x0_hat) / temperature at its level."""
        exponent = None if self.tempering is None else self.tempering(state, value)
        exponent = None if exponent is None else exponent[:, None].expand_as(value)
        # Also where it is None: a tempered run that this one goes on from has left its own.
        if exponent is not None or state.path.exponent is not None:
            state = state.with_path_state(exponent=exponent)
        value = self.tempered(state, value)
        increment, path = self.combine(value, state.path)
        # A forbidden *prediction* says nothing certain about the sample: leave the weight until the sample is there.
        increment = increment.masked_fill(increment == -torch.inf, 0.0)
        return state.reweight(increment, log_potential=state.path.log_potential_or_zero(value) + increment, **path)

    def tempered(self, state: Trajectory, value: Tensor) -> Tensor:
        """Values [B, N] times the exponent in the state's path; what is forbidden stays so at exponent 0."""
        exponent = state.path.exponent
        return value if exponent is None else torch.where(value == -torch.inf, value, exponent * value)

    def close(self, state: Trajectory, value: Tensor) -> Trajectory:
        """The finished state reweighted so that the product of all potentials is exp(value), value [B, N].

        Marks the trajectory as final; resuming it would count the reward twice.
        """
        return state.reweight(value - state.path.log_potential_or_zero(value), final_applied=True)


def difference(at: Collection[int] | None = None, tempering: Tempering | None = None) -> Potential:
    """Potential exp(v_k - v_previous): the weight so far is always exp(v_k). The default of `steer.smc`.

    Args:
        at: timesteps to weight at, numbered from noise; None for all but the last prediction.
        tempering: exponent of the value by level: `snr_share`, `geometric_tempering`, `adaptive_tempering`; None
            for 1 throughout.

    Returns:
        What `steer.smc(weight=...)` takes.
    """

    def combine(value: Tensor, path: PathState) -> tuple[Tensor, dict[str, Any]]:
        return value - path.log_potential_or_zero(value), {}

    return _potential(combine, at, tempering, telescopes=True)


def default_weight() -> Potential:
    """`difference`, with care for first values that would kill most seeds (`cautious_tempering`)."""
    return difference(tempering=cautious_tempering)


def maximum(at: Collection[int] | None = None, tempering: Tempering | None = None) -> Potential:
    """Potential exp(max of the values so far).

    Args:
        at: timesteps to weight at, numbered from noise; None for all but the last prediction.
        tempering: exponent of the value by level; None for 1 throughout.

    Returns:
        What `steer.smc(weight=...)` takes.

    Source: FK-steering's "max" (Singhal et al. 2025). Differs: closes on r(x_0), so the target is that of `difference`.
    """

    def combine(value: Tensor, path: PathState) -> tuple[Tensor, dict[str, Any]]:
        highest = value if path.highest is None else torch.maximum(path.highest, value)
        return highest, {"highest": highest}

    return _potential(combine, at, tempering)


def total(at: Collection[int] | None = None, tempering: Tempering | None = None) -> Potential:
    """Potential exp(sum of the values so far).

    Args:
        at: timesteps to weight at, numbered from noise; None for all but the last prediction.
        tempering: exponent of the value by level; None for 1 throughout.

    Returns:
        What `steer.smc(weight=...)` takes.

    Source: FK-steering's "sum" (Singhal et al. 2025). Differs: closes on r(x_0), so the target is that of `difference`.
    """

    def combine(value: Tensor, path: PathState) -> tuple[Tensor, dict[str, Any]]:
        summed = value if path.summed is None else path.summed + value
        return summed, {"summed": summed}

    return _potential(combine, at, tempering)


def final_only() -> Potential:
    """No intermediate weights: importance sampling, with or without a guided proposal.

    Returns:
        What `steer.smc(weight=...)` takes.
    """
    return Potential(lambda value, path: (torch.zeros_like(value), {}), at=frozenset(), telescopes=True)


def _potential(
    combine: Combine, at: Collection[int] | None, tempering: Tempering | None, telescopes: bool = False
) -> Potential:
    return Potential(combine, None if at is None else frozenset(at), tempering, telescopes)
