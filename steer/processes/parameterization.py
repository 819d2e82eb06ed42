"""What networks predict, and the one thing samplers see: x0 = E[x_0 | x_t].

Each function wraps a network `f(x, t)` of one prediction type into a `Denoiser`. All are linear in (x, output), so
gradients pass through. Divisions by alpha are only where the prediction type leaves no choice (eps and score): such
models must not be run at alpha = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..errors import ModelError, ShapeError
from ..types import Coeffs, Denoiser, Level, Schedule

Network = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True, eq=False)
class NetworkDenoiser:
    """The denoiser around a network: solve(x, output, schedule, t) is the x0 that its output stands for."""

    network: Network
    schedule: Schedule
    solve: Callable[[Tensor, Tensor, Coeffs], Tensor]
    needs_signal: str = ""

    def __call__(self, x: Tensor, t: float) -> Tensor:
        at = self.schedule(t)
        if self.needs_signal and at.alpha <= 0.0:
            raise ModelError(
                f"a model that predicts {self.needs_signal} says nothing about x0 where alpha = 0, got t = {t} on "
                f"{self.schedule}; start the time grid at or below {self.schedule.start} "
                "(times=steer.uniform_times(schedule, steps))"
            )
        what = "the network must return its prediction in the shape of x, {shape} = (B, N, *event)"
        output = checked_output(self.network(x, t), x, x.shape, what)
        return self.solve(x, output, at)

    def only(self, problem: int) -> NetworkDenoiser:
        """The denoiser of one problem, where the network is conditioned on several: see `only`."""
        return replace(self, network=only(self.network, problem))


def checked_output(output: Any, x: Tensor, shape: Sequence[int], what: str) -> Tensor:
    """What a network returned for states x, if it is a tensor of numbers of that shape, where x is.

    Raises ModelError, or ShapeError for another shape, before arithmetic could broadcast or truncate it. what: which
    function must return what of {shape}, for the message.
    """
    what = what.replace("{shape}", str(tuple(shape)))
    if not isinstance(output, Tensor):
        kind, inside = type(output).__name__, ""
        if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
            inside = "; return its first entry, if that is the prediction"
        elif isinstance(getattr(output, "sample", None), Tensor):
            inside = "; return its .sample, if that is the prediction"
        raise ModelError(f"{what}, a tensor; got {kind}{inside}")
    if tuple(output.shape) != tuple(shape):
        raise ShapeError(f"{what}, got {tuple(output.shape)}")
    if output.device != x.device or not output.is_floating_point():
        raise ModelError(
            f"{what}, floating-point numbers on the device of x, {x.device}; got {output.dtype} on {output.device}; "
            "convert them in the function given to steer"
        )
    return output


def from_eps(network: Network, schedule: Schedule) -> Denoiser:
    """x0 = (x - sigma eps) / alpha for a network that predicts the noise."""
    return NetworkDenoiser(network, schedule, _from_eps, "eps")


def from_score(network: Network, schedule: Schedule) -> Denoiser:
    """x0 = (x + sigma^2 score) / alpha for a network that predicts the gradient of log p_t (Tweedie)."""
    return NetworkDenoiser(network, schedule, _from_score, "score")


def from_v(network: Network, schedule: Schedule) -> Denoiser:
    """x0 = (alpha x - sigma v) / (alpha^2 + sigma^2) for v = alpha eps - sigma x_0 (Salimans & Ho 2022)."""
    return NetworkDenoiser(network, schedule, _from_v)


def from_velocity(network: Network, schedule: Schedule) -> Denoiser:
    """x0 for a network that predicts the velocity E[d_alpha x_0 + d_sigma eps | x_t], which grows towards noise.

    A model trained for data minus noise has the opposite sign: negate it first.
    """
    return NetworkDenoiser(network, schedule, _from_velocity)


# Functions of the module, and no lambdas: a process is pickled on its way to another process.


def _from_eps(x: Tensor, out: Tensor, at: Coeffs) -> Tensor:
    return (x - at.sigma * out) / at.alpha


def _from_score(x: Tensor, out: Tensor, at: Coeffs) -> Tensor:
    return (x + at.sigma**2 * out) / at.alpha


def _from_v(x: Tensor, out: Tensor, at: Coeffs) -> Tensor:
    return (at.alpha * x - at.sigma * out) / (at.alpha**2 + at.sigma**2)


def _from_velocity(x: Tensor, out: Tensor, at: Coeffs) -> Tensor:
    return (at.sigma * out - at.d_sigma * x) / (at.d_alpha * at.sigma - at.d_sigma * at.alpha)


def only(function: Any, problem: int) -> Any:
    """A function closed over several conditionings, restricted to one of them by its own method `only(problem)`.

    Searches whose problems move at their own pace ask about one at a time. Raises ShapeError where there is no method.
    """
    restrict = getattr(function, "only", None)
    if restrict is None:
        name = getattr(function, "__name__", type(function).__name__)
        raise ShapeError(
            f"this search asks about one problem at a time, and {name} is closed over several: give it a method "
            "only(problem) that returns the function of that problem, or run one conditioning at a time"
        )
    return restrict(problem)


def eps(x: Tensor, x0: Tensor, at: Level) -> Tensor:
    """The noise E[eps | x_t] that goes with a prediction x0."""
    return (x - at.alpha * x0) / at.sigma


def score(x: Tensor, x0: Tensor, at: Level) -> Tensor:
    """The score of p_t that goes with a prediction x0."""
    return (at.alpha * x0 - x) / at.sigma**2


def velocity(x: Tensor, x0: Tensor, at: Level) -> Tensor:
    """The probability-flow velocity dx/dt (t grows towards noise) that goes with a prediction x0."""
    return at.d_alpha * x0 + at.d_sigma * eps(x, x0, at)


def v_prediction(x: Tensor, x0: Tensor, at: Level) -> Tensor:
    """alpha eps - sigma x0."""
    return at.alpha * eps(x, x0, at) - at.sigma * x0
