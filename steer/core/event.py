"""What `on_step` is called with: one step of a run, the same from every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from ..cost import Cost, Meter
from ..types import ReverseProcess
from .trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class Event:
    """A population has taken a step.

    run:      which method, and which of its passes where there are several ("driftlite, pass 2"): levels start again
              from noise in each.
    live_state, live_x0, live_scores: what `state`, `x0` and `scores` are copies of. Nobody may write to these.
    problems: index of the prompt of every row of `state`, as long as its axis 0.
    chunk:    index of its first particle among those of the run, where a run goes in chunks.
    earlier:  what earlier passes of the method have spent.
    completed: whether the predictions are clean states already, as those of searches of single chains are.
    cost:     what the method had spent when it took the step, in all its passes.
    """

    run: str
    live_state: Trajectory
    live_x0: Tensor | None
    live_scores: Tensor | None
    problems: range
    chunk: int
    meter: Meter
    earlier: Cost = field(default_factory=Cost)
    completed: bool = False
    cost: Cost = field(init=False)

    def __post_init__(self) -> None:
        # At once: the meter runs on, and events are kept.
        object.__setattr__(self, "cost", self.earlier + self.meter.cost())

    @cached_property
    def state(self) -> Trajectory:
        """The population after the step, [B, N, *event]: a copy, made when first asked for, to do with as you like."""
        return self.live_state.copied()

    @cached_property
    def x0(self) -> Tensor | None:
        """A copy of the predictions that its particles stepped from, [B, N, ...]; None where a step needed none."""
        return None if self.live_x0 is None else self.live_x0.clone()

    @property
    def clean(self) -> Tensor | None:
        """The clean states that `x0` stands for, [B, N, *event], as `process.decode` takes them; not to be changed."""
        x0 = self.live_x0
        return x0 if x0 is None or self.completed else self.process.complete(self.live_state.x, x0)

    @cached_property
    def scores(self) -> Tensor | None:
        """A copy of the rewards of those predictions, [B, N]; None at levels where nothing was scored."""
        return None if self.live_scores is None else self.live_scores.clone()

    @property
    def process(self) -> ReverseProcess:
        """What the population is moved by."""
        return self.live_state.process

    @property
    def level(self) -> int:
        """Timestep index that the population has reached, 0 = noise, `process.steps` = data."""
        return self.live_state.k

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the weights carried, [B]."""
        return self.live_state.ess


OnStep = Callable[[Event], None] | Sequence[Callable[[Event], None]]
"""Called after every step, or several that are, in turn: progress, trackers, previews. Raise `Stop` to end the run."""


def as_one(on_step: OnStep | None) -> Callable[[Event], None] | None:
    """`on_step` as one function; None where there is nothing to call."""
    if on_step is None or callable(on_step):
        return on_step
    called = tuple(on_step)

    def in_turn(event: Event) -> None:
        for each in called:
            each(event)

    return in_turn if called else None


def of_pass(on_step: OnStep | None, name: str, earlier: Cost) -> OnStep | None:
    """`on_step` for one of several passes of a method: its events are called `name`, and count what came before."""
    called = as_one(on_step)
    return called and (lambda event: called(replace(event, run=name, earlier=earlier)))


def after(on_step: OnStep | None, earlier: Cost) -> OnStep | None:
    """`on_step` for what a method does after it has spent `earlier`, which its events count."""
    called = as_one(on_step)
    return called and (lambda event: called(replace(event, earlier=earlier + event.earlier)))
