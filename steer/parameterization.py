"""What networks predict, and the one thing samplers see: x0 = E[x_0 | x_t].

Each function wraps a network `f(x, t)` of one prediction type into a `Denoiser`. All are linear in (x, output), so
gradients pass through. Divisions by alpha are only where the prediction type leaves no choice (eps and score): such
models must not be run at alpha = 0.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .errors import ModelError
from .types import Denoiser, Level, Schedule

Network = Callable[[Tensor, float], Tensor]


def from_eps(network: Network, schedule: Schedule) -> Denoiser:
    """x0 = (x - sigma eps) / alpha for a network that predicts the noise."""

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma, _, _ = _with_signal(schedule, t, "eps")
        return (x - sigma * network(x, t)) / alpha

    return denoise


def from_score(network: Network, schedule: Schedule) -> Denoiser:
    """x0 = (x + sigma^2 score) / alpha for a network that predicts the gradient of log p_t (Tweedie)."""

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma, _, _ = _with_signal(schedule, t, "score")
        return (x + sigma**2 * network(x, t)) / alpha

    return denoise


def from_v(network: Network, schedule: Schedule) -> Denoiser:
    """x0 = (alpha x - sigma v) / (alpha^2 + sigma^2) for v = alpha eps - sigma x_0 (Salimans & Ho 2022)."""

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma, _, _ = schedule(t)
        return (alpha * x - sigma * network(x, t)) / (alpha**2 + sigma**2)

    return denoise


def from_velocity(network: Network, schedule: Schedule) -> Denoiser:
    """x0 for a network that predicts the velocity E[d_alpha x_0 + d_sigma eps | x_t], which grows towards noise.

    A model trained for data minus noise has the opposite sign: negate it first.
    """

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = schedule(t)
        return (sigma * network(x, t) - d_sigma * x) / (d_alpha * sigma - d_sigma * alpha)

    return denoise


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


def _with_signal(schedule: Schedule, t: float, kind: str):
    coeffs = schedule(t)
    if coeffs.alpha <= 0.0:
        raise ModelError(
            f"a model that predicts {kind} says nothing about x0 where alpha = 0, got t = {t} on {schedule}; "
            f"start the time grid at or below {schedule.start} (times=steer.uniform_times(schedule, steps))"
        )
    return coeffs
