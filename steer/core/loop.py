"""The steps of a population, with what ends them early: `Stop`, Ctrl-C, an error."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from ..cost import Meter
from ..errors import NonFiniteError, keep_partial
from ..processes.second_order import noisy
from ..types import Stop
from .run import Run
from .trajectory import Trajectory


class Reached:
    """The last states of a run, for an error to leave: three, as what is not finite may be found a step late."""

    def __init__(self) -> None:
        self._states: deque[Trajectory] = deque(maxlen=3)

    @property
    def last(self) -> Trajectory | None:
        return self._states[-1] if self._states else None

    def note(self, state: Trajectory) -> None:
        """A state that the run can be resumed from."""
        if self._states and self._states[-1].cache.x0 is not None:  # of an earlier state it would only take memory
            self._states[-1] = self._states[-1].without_cache()
        self._states.append(state)

    @contextmanager
    def keeping_partial(self, meter: Meter) -> Iterator[None]:
        """Whatever is raised leaves the last good state in its `.partial`. At the end, the meter's flags are read."""
        try:
            yield
            meter.finite.settle()
        except BaseException as error:
            late = isinstance(error, NonFiniteError)
            good = (state for state in reversed(self._states) if not late or _is_finite(state))
            keep_partial(error, next(good, None))
            raise


class Loop:
    """What every sampler and search puts around its steps.

        loop = Loop(run)
        with loop.keeping_partial():            # an error leaves `loop.partial` in its `.partial`
            loop.partial = state = ...          # the start
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
        self.run, self._reached = run, Reached()
        if state is not None:
            self.partial = state
        self.last_predicted: Trajectory | None = None
        self.interrupted = False

    @property
    def partial(self) -> Trajectory | None:
        return self._reached.last

    @partial.setter
    def partial(self, state: Trajectory) -> None:
        self._reached.note(state)

    def predicted(self, state: Trajectory, partial: Trajectory | None = None) -> Trajectory:
        """Notes a state that carries its predictions. partial: what an error is to leave instead of it."""
        self.last_predicted, self.partial = state, partial or state
        return state

    def stepped(
        self, before: Trajectory, after: Trajectory, chunk: int = 0, *, partial: Trajectory | None = None
    ) -> Trajectory:
        """Reports a step to `on_step`, which may end the run by raising `Stop`.

        partial: what an error is to leave from here on, where that is more than the state with the predictions.
        """
        if partial is not None:
            self.partial = partial
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

    def keeping_partial(self) -> AbstractContextManager[None]:
        """Whatever is raised leaves what was paid for in its `.partial`."""
        return self._reached.keeping_partial(self.run.meter)

    def ended(self, state: Trajectory) -> Trajectory:
        """The state that the run ends with: where it was interrupted, the clean states that were last predicted."""
        if not self.interrupted:
            return state
        assert self.last_predicted is not None
        return completed(self.last_predicted)


@contextmanager
def keeping(finished: Any) -> Iterator[None]:
    """Whatever is raised leaves what is finished in its `.partial`, in place of what was under way; None: nothing yet.

    For methods of several runs: passes, sweeps, rounds. finished: a Result or Trajectory, or a function that gives one.
    """
    try:
        yield
    except BaseException as error:
        keep_partial(error, finished() if callable(finished) else finished, instead=True)
        raise


def completed(state: Trajectory) -> Trajectory:
    """A state that carries its predictions, standing at the clean states they mean."""
    assert state.cache.x0 is not None
    return replace(state, x=state.process.complete(state.x, state.cache.x0))


def _is_finite(state: Trajectory) -> bool:
    """Whether a run can go on from a state: no NaN in its weights, states or predictions. Reads the device."""
    x = noisy(state.process, state.x)  # a memory of nothing is NaN by right
    tensors = (state.log_weight, *(t for t in (x, state.cache.x0) if t is not None and t.is_floating_point()))
    return not any(bool(tensor.isnan().any()) for tensor in tensors)
