"""What `on_step` is called with: one step of a run, the same from every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..cost import Cost, Meter
from .trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class Event:
    """A population has taken a step.

    run:      which method, and which of its passes where there are several ("driftlite, pass 2"): levels start again
              from noise in each.
    state:    the population after the step, [B, N, *event].
    x0:       the predictions that its particles stepped from, [B, N, ...]; None where a step needed none.
    scores:   rewards of those predictions, [B, N]; None at levels where nothing was scored.
    problems: index of the prompt of every row of `state`, as long as its axis 0.
    chunk:    index of its first particle among those of the run, where a run goes in chunks.
    """

    run: str
    state: Trajectory
    x0: Tensor | None
    scores: Tensor | None
    problems: range
    chunk: int
    meter: Meter

    @property
    def level(self) -> int:
        """Timestep index that the population has reached, 0 = noise, `state.process.steps` = data."""
        return self.state.k

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the weights carried, [B]."""
        return self.state.ess

    @property
    def cost(self) -> Cost:
        """What the run has spent so far."""
        return self.meter.cost()


OnStep = Callable[[Event], None]
"""Called after every step: progress bars, checkpoints. Raise `Stop` to end the run early."""
