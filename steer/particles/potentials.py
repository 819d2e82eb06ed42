"""How intermediate values of the reward weight particles on the way, without changing where they end.

At the levels in `at`, the value v = r(x0_hat) / temperature of each particle enters a log-potential g(v, path). What
was multiplied in so far is remembered per particle, and the last step *closes*: it multiplies in
r(x_0) / temperature minus all of it. The weights of every choice below therefore target p(x) exp(r(x) / temperature)
exactly; they differ in variance only. (Released FK-steering closes its max and sum potentials on the statistic
instead, which targets another law.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.trajectory import Trajectory
from .tempering import Tempering

Combine = Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
"""(value, memory) -> (log-potential, memory to keep)."""


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


def _weight(
    combine: Combine, at: Collection[int] | None, tempering: Tempering | None, telescopes: bool = False
) -> Weight:
    return Weight(combine, None if at is None else frozenset(at), tempering, telescopes)
