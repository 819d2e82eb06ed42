"""Every error steer raises on purpose. Each message says what was expected, what came, and the cure."""

from __future__ import annotations

from contextlib import suppress
from pickle import dumps
from typing import Any, TypeVar

Raised = TypeVar("Raised", bound=BaseException)


class SteerError(ValueError):
    """Root of all steer's errors.

    partial: what was already paid for when the error arose (a Trajectory or a Result), or None. It goes along when the
             error is sent from one process to another, unless it holds what cannot be sent, a lambda say: then the
             message says so.
    """

    partial: Any = None

    def __reduce__(self) -> Any:
        """How a pool of processes sends the error: without what cannot be sent, for which it would be lost itself."""
        try:
            dumps(self.partial)
        except Exception as error:
            left = (
                f"{self} (.partial, which holds what was paid for, stayed behind in the process that raised this: "
                f"{type(error).__name__}: {error}; save it there, or make network and reward of functions of a module)"
            )
            return type(self), (left,), {k: v for k, v in self.__dict__.items() if k != "partial"}
        return super().__reduce__()


def keep_partial(error: Raised, partial: Any, *, instead: bool = False) -> Raised:
    """The error, with what was paid for attached as `.partial`, unless an inner call has, or `instead` of what it has.

    An error of the user's code (network, reward, decoder, on_step) keeps its type, KeyboardInterrupt too.
    """
    if partial is not None and (instead or getattr(error, "partial", None) is None):
        with suppress(AttributeError):  # a class that has made `partial` something else
            object.__setattr__(error, "partial", partial)
    return error


class ShapeError(SteerError):
    """A tensor has another shape than the axes (B problems, N particles, *event) ask for."""


class NonFiniteError(SteerError):
    """NaN or +inf where a number is needed. The message names step, problem and particle."""


class CollapsedWeightsError(SteerError):
    """Every particle of a problem has weight zero."""


class NotDifferentiableError(SteerError):
    """A gradient was asked of a reward or a model that gives none."""


class NotStochasticError(SteerError):
    """A sampler needs noise (or a density), and the transition rule adds none."""


class BudgetError(SteerError):
    """The budget cannot pay for the smallest possible run."""


class RewardError(SteerError):
    """A reward raised, timed out, or returned something that is not one number per sample."""


class RemoteError(RewardError):
    """A reward behind a URL cannot be reached, refused the request, or is no reward."""


class StateSpaceError(SteerError):
    """A method was asked to run on a state space that it cannot handle."""


class ModelError(SteerError):
    """A pretrained model cannot be turned into a reverse process."""


class PromptError(SteerError):
    """A file of prompts cannot be read, or has a column or row that the model cannot be called with."""


class RunDirectoryError(SteerError):
    """A directory is of another run, or of none."""


class DistributedError(SteerError):
    """A rank of a process group failed, was lost, or has drifted apart from the others."""


class JournalError(SteerError):
    """A journal is damaged, in use, or of another run, model or reward."""
