"""What `on_step` is called with: one step of a run, the same from every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

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
    earlier:  what earlier passes of the method have spent.
    cost:     what the method had spent when it took the step, in all its passes.
    """

    run: str
    state: Trajectory
    x0: Tensor | None
    scores: Tensor | None
    problems: range
    chunk: int
    meter: Meter
    earlier: Cost = field(default_factory=Cost)
    cost: Cost = field(init=False)

    def __post_init__(self) -> None:
        # At once: the meter runs on, and events are kept.
        object.__setattr__(self, "cost", self.earlier + self.meter.cost())

    @property
    def level(self) -> int:
        """Timestep index that the population has reached, 0 = noise, `state.process.steps` = data."""
        return self.state.k

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the weights carried, [B]."""
        return self.state.ess


OnStep = Callable[[Event], None]
"""Called after every step: progress bars, checkpoints. Raise `Stop` to end the run early."""


def of_pass(on_step: OnStep | None, name: str, earlier: Cost) -> OnStep | None:
    """`on_step` for one of several passes of a method: its events are called `name`, and count what came before."""
    if on_step is None:
        return None
    return lambda event: on_step(replace(event, run=name, earlier=earlier))
