"""Birth-death clocks: a selection that replaces few particles at a time, beside resampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.resampling import multinomial
from ..core.trajectory import Trajectory
from ..key import Key


@dataclass(frozen=True)
class BirthDeath:
    """Particles die by clocks that weights below the mean run down, and are replaced by those above it.

    With w the weights of a step over their mean, a particle's clock adds (-log w)+. When it passes an Exp(1) deadline,
    so with probability (1 - w)+ in this step whatever came before, the particle becomes a copy of one drawn in
    proportion to (w - 1)+, with a new deadline. The expected number of copies of each is w, so this is an unbiased
    resampling at every step, of as few particles as possible. As steps shrink it becomes the jump process of rate
    (g - E g)- and destinations in proportion to (g - E g)+, for a rate g of the log-weights, which keeps their
    distribution (Skreta et al. 2025, Prop. 4.1). Weights are used up at every step, and their mean goes into
    log_evidence.

    Differs: in the released code destinations are drawn by what each particle gained since the one that dies was last
    replaced; states have moved on since, and the distribution is another one (a test has it as a mutant).
    """

    def __call__(self, state: Trajectory, key: Key) -> Trajectory:
        """The state with the particles whose time is up replaced, and weights equal."""
        batch, particles = state.log_weight.shape
        key = key.at(state.k)
        if state.path.deadline is None:
            begun = self._deadline(state, key.fold("first"))
            state = state.with_path_state(clock=torch.zeros_like(begun), deadline=begun)
        clock, deadline = state.path.clock, state.path.deadline
        assert clock is not None
        assert deadline is not None
        relative = state.log_weight - state.log_weight.logsumexp(1, keepdim=True) + math.log(particles)
        clock = clock + (-relative).clamp(min=0.0)
        gain = relative.exp() - 1.0
        # If no weight exceeds the mean, all are equal up to rounding.
        dies = (clock >= deadline) & (gain > 0.0).any(1, keepdim=True)
        source = multinomial(gain.clamp(min=0.0).log(), key.fold("source"), particles)
        place = torch.arange(particles, device=gain.device).expand(batch, particles)
        clock = torch.where(dies, 0.0, clock)
        deadline = torch.where(dies, self._deadline(state, key.fold("next")), deadline)
        return state.resample(torch.where(dies, source, place)).with_path_state(clock=clock, deadline=deadline)

    def _deadline(self, state: Trajectory, key: Key) -> Tensor:
        return -key.uniform(state.log_weight.shape, device=state.log_weight.device).log()


def birth_death() -> BirthDeath:
    """Birth-death clocks as the `selection` of `steer.fkc` and `steer.driftlite`.

    Returns:
        A selection that replaces as few particles as possible at every step; see `BirthDeath` for its rule.
    """
    return BirthDeath()
