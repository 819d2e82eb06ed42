"""The steps of a population, with what ends them early: `Stop`, Ctrl-C, an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..errors import SteerError
from ..types import Stop
from .run import Run
from .trajectory import Trajectory


class Loop:
    """What every sampler and search puts around its steps.

        loop = Loop(run, state)
        with loop.keeping_partial():            # an error leaves `loop.partial` in its `.partial`
            with loop.steps():                  # Stop and Ctrl-C end here, once there is something to return
                for k in range(...):
                    state = loop.predicted(...)         # carries its predictions
                    state = loop.stepped(state, ...)    # is reported to `on_step`
            state = loop.ended(state)           # the last predictions, where it was interrupted

    partial:        the last state that a run can be resumed from.
    last_predicted: the last state that carries its predictions; None before the first.
    interrupted:    whether the steps were ended early.
    """

    def __init__(self, run: Run, state: Trajectory | None = None) -> None:
        self.run, self.partial = run, state
        self.last_predicted: Trajectory | None = None
        self.interrupted = False

    def predicted(self, state: Trajectory, partial: Trajectory | None = None) -> Trajectory:
        """Notes a state that carries its predictions. partial: what an error is to leave instead of it."""
        self.last_predicted, self.partial = state, partial or state
        return state

    def stepped(self, before: Trajectory, after: Trajectory, chunk: int = 0) -> Trajectory:
        """Reports a step to `on_step`, which may end the run by raising `Stop`."""
        self.run.report(before, after, chunk)
        return after

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Ends early on `Stop` and Ctrl-C; before the first prediction there is nothing to return, and they go on."""
        try:
            yield
        except (Stop, KeyboardInterrupt):
            if self.last_predicted is None:
                raise
            self.interrupted = True

    @contextmanager
    def keeping_partial(self) -> Iterator[None]:
        """Errors leave what was paid for in their `.partial`."""
        try:
            yield
        except SteerError as error:
            error.keep(self.partial)
            raise

    def ended(self, state: Trajectory) -> Trajectory:
        """The state that the run ends with: where it was interrupted, the clean states that were last predicted."""
        if not self.interrupted:
            return state
        assert self.last_predicted is not None
        return completed(self.last_predicted)


def completed(state: Trajectory) -> Trajectory:
    """A state that carries its predictions, standing at the clean states they mean."""
    assert state.cache.x0 is not None
    return replace(state, x=state.process.complete(state.x, state.cache.x0))
