"""How intermediate values of the reward weight particles on the way, without changing where they end.

At the levels in `at`, the value v = r(x0_hat) / temperature of each particle enters a log-potential g(v, path). What
was multiplied in so far is remembered per particle, and the last step *closes*: it multiplies in
r(x_0) / temperature minus all of it. The weights of every choice below therefore target p(x) exp(r(x) / temperature)
exactly; they differ in variance only. (Released FK-steering closes its max and sum potentials on the statistic
instead, which targets another law.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .core import log_weights
from .core.trajectory import Trajectory
from .errors import SteerError

Combine = Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
"""(value, memory) -> (log-potential, memory to keep)."""
Tempering = Callable[[Trajectory, Tensor], Tensor]
"""(state, value (B, N)) -> exponent (B,) in [0, 1] that multiplies the value at this level."""


@dataclass(frozen=True)
class Weight:
    """What multiplies particle weights at intermediate levels. Built by `difference`, `maximum`, `total`, `final_only`.

    combine:   the log-potential of a value and what the path remembers.
    at:        levels to evaluate and weight at; None for all but the last prediction, which the closing repeats.
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
        """The state reweighted by values (B, N) = r(x0_hat) / temperature at its level."""
        spent = state.memory["spent"]
        if self.tempering is not None:
            state = state.remember(exponent=self.tempering(state, value)[:, None].expand_as(value))
        value = self.tempered(state, value)
        increment, memory = self.combine(value, state.memory)
        # A forbidden *prediction* says nothing certain about the sample: leave the weight until the sample is there.
        increment = increment.masked_fill(increment == -torch.inf, 0.0)
        return state.reweight(increment, spent=spent + increment, **memory)

    def tempered(self, state: Trajectory, value: Tensor) -> Tensor:
        """Values (B, N) times the exponent that the state remembers; what is forbidden stays so at exponent 0."""
        exponent = state.memory.get("exponent")
        return value if exponent is None else torch.where(value == -torch.inf, value, exponent * value)

    def close(self, state: Trajectory, value: Tensor) -> Trajectory:
        """The finished state reweighted so that the product of all potentials is exp(value), value (B, N).

        It remembers that: whoever went on from there would count the reward twice.
        """
        return state.reweight(value - state.memory["spent"], closed=torch.ones_like(value, dtype=torch.bool))


def difference(at: Collection[int] | None = None, tempering: Tempering | None = None) -> Weight:
    """Potential exp(v_k - v_previous): the weight so far is always exp(v_k). The default."""
    return _weight(lambda value, memory: (value - memory["spent"], {}), at, tempering, telescopes=True)


def maximum(at: Collection[int] | None = None, tempering: Tempering | None = None) -> Weight:
    """Potential exp(max of the values so far) (FK-steering's "max", Singhal et al. 2025)."""

    def combine(value: Tensor, memory: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        highest = torch.maximum(memory["highest"], value) if "highest" in memory else value
        return highest, {"highest": highest}

    return _weight(combine, at, tempering)


def total(at: Collection[int] | None = None, tempering: Tempering | None = None) -> Weight:
    """Potential exp(sum of the values so far) (FK-steering's "sum")."""

    def combine(value: Tensor, memory: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        summed = memory["summed"] + value if "summed" in memory else value
        return summed, {"summed": summed}

    return _weight(combine, at, tempering)


def final_only() -> Weight:
    """No intermediate weights: importance sampling, with or without a guided proposal."""
    return Weight(lambda value, memory: (torch.zeros_like(value), {}), at=frozenset(), telescopes=True)


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
    """Exponent min(lowest + (1 + gamma)^k - 1, 1) at level k (DAS, Kim et al. 2025, gamma = .008 at 100 steps).

    lowest: exponent to begin from, in [0, 1]. After a start at temperature T_m give it temperature / T_m, or the first
    weights undo what the start has paid for (the law is the same, at a higher variance).
    """
    if not gamma > 0.0:
        raise SteerError(f"gamma must be positive, got {gamma}")
    return GeometricTempering(gamma, _share("lowest", lowest))


def adaptive_tempering(share: float = 0.5, *, lowest: float = 0.0) -> Tempering:
    """The largest exponent, never falling, that keeps the ESS at or above share * N. For `difference` potentials.

    lowest: exponent to begin from, as in `geometric_tempering`.
    """
    lowest = _share("lowest", lowest)

    def exponent(state: Trajectory, value: Tensor) -> Tensor:
        begin = torch.full_like(value[:, 0], lowest)
        begin = state.memory["exponent"][:, 0] if "exponent" in state.memory else begin
        forbidden = value == -torch.inf  # predictions that leave their weights as they are, see `Weight.apply`
        value, spent = value.masked_fill(forbidden, 0.0), state.memory["spent"].masked_fill(forbidden, 0.0)
        return log_weights.temper(state.log_weight + begin[:, None] * value - spent, value, begin, share=share)

    return exponent


def _share(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise SteerError(f"{name} must be in [0, 1], got {value}")
    return float(value)


def _weight(
    combine: Combine, at: Collection[int] | None, tempering: Tempering | None, telescopes: bool = False
) -> Weight:
    return Weight(combine, None if at is None else frozenset(at), tempering, telescopes)
