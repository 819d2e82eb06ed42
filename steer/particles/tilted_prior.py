"""The prior tilted by the reward of what the model predicts from it: its log-density and gradient, for starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..calls import Answer
from ..core.objective import Objective, at_level, check_temperature
from ..core.population import broadcast_like, log_potential
from ..errors import NotDifferentiableError, StateSpaceError, SteerError
from ..key import Key
from ..processes.parameterization import checked_output
from ..types import ReverseProcess

Predictor = Callable[[Tensor], Tensor]
"""States x [B, N, *event] of level 0, in the process's dtype, to clean samples x0 of that shape. Differentiable."""


class TiltedState(NamedTuple):
    """States x [B, C, *event] in units of the prior, their log-tilt r / T_m, [B, C] float64, and its gradient in x."""

    x: Tensor
    value: Tensor
    gradient: Tensor

    def where(self, chosen: Tensor, other: TiltedState) -> TiltedState:
        """These states where chosen [B, C], others elsewhere."""
        pairs = zip(self, other, strict=True)
        return TiltedState(*(torch.where(broadcast_like(chosen, ours), ours, theirs) for ours, theirs in pairs))


@dataclass(frozen=True, eq=False)
class TiltedPrior:
    """The log-tilt and its gradient, as functions of states centred and in units of the prior's standard deviation.

    mean, sigma: moments of the prior; a mean of None is zero.
    gradient: whether it is wanted; zero where it is not.
    clip: largest norm of a state's gradient, longer ones are scaled to it; None for no limit.
    key: names what hooks draw in predictions.
    """

    objective: Objective
    mean: Tensor | None
    sigma: float
    dtype: torch.dtype
    temperature: float
    gradient: bool = True
    clip: float | None = None
    key: Key | None = None

    def units(self, x: Tensor) -> Tensor:
        """States of the process in units of the prior, float32 or better."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x if self.mean is None else x - self.mean.to(x)) / self.sigma

    def latent(self, x: Tensor) -> Tensor:
        """States in units of the prior as states of the process, in its dtype, which is how the predictor gets them."""
        x = x * self.sigma
        return (x if self.mean is None else x + self.mean.to(x)).to(self.dtype)

    def __call__(self, x: Tensor) -> tuple[TiltedState, Tensor]:
        """The tilt at x [B, C, *event], and the prediction x0 there."""
        if not self.gradient:
            return self._value(x)
        x0, scores, gradient = self.objective.value_and_grad(self.latent(x), 0, 1.0 / self.temperature, self.key)
        gradient = gradient.to(x.dtype) * self.sigma
        # Only a chain's first state can be a forbidden one, and its gradient may be anything.
        gradient = torch.where(broadcast_like(scores == -torch.inf, gradient), 0.0, gradient)
        if self.clip is not None:
            gradient = gradient * broadcast_like((self.clip / norm(gradient)).clamp(max=1.0), gradient).to(x.dtype)
        return TiltedState(x=x, value=log_potential(scores, self.temperature), gradient=gradient), x0

    def _value(self, x: Tensor) -> tuple[TiltedState, Tensor]:
        """The tilt where no gradient is wanted."""
        process, latent = self.objective.process, self.latent(x)
        with torch.no_grad():
            x0 = process.denoise(latent, 0, self.key)
            scores = self.objective(process.complete(latent, x0), at_level(process, 0))
        return TiltedState(x, log_potential(scores, self.temperature), torch.zeros_like(x)), x0

    def check(self, at: TiltedState, x0: Tensor) -> None:
        """Raises where the reward depends on the prediction, and the prediction does not depend on the state."""
        if self.gradient:
            self._check_gradient(at, x0)
        elif x0.shape[1] > 1 and bool((x0 == x0[:, :1]).flatten(1).all(1).any()):
            raise StateSpaceError(f"x0_predictor gives the same prediction for every x: {_SAME_PREDICTION}")

    def _check_gradient(self, at: TiltedState, x0: Tensor) -> None:
        strongest = norm(at.gradient).amax(1)
        if not bool((strongest < 1e-4).any()):
            return
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            scores = self.objective(self.objective.process.complete(self.latent(at.x), x0))
            (slope,) = torch.autograd.grad(scores.sum() / self.temperature, x0)
        answer = norm(slope).masked_fill(at.value == -torch.inf, 0.0).amax(1)
        lost = (strongest < 1e-4) & (answer > 1e4 * strongest)
        if bool(lost.any()):
            raise NotDifferentiableError(
                f"the gradient of r(x0_predictor(x)) vanishes at the start of problem {int(lost.nonzero()[0])}: the "
                f"prediction does not depend on x there, {_SAME_PREDICTION}"
            )


_SAME_PREDICTION = (
    "as an exact posterior mean does not where alpha = 0 (flows), so the tilted prior is the prior; give x0_predictor= "
    "a few-step model or a flow map, or start the time grid lower"
)


@dataclass(frozen=True, eq=False)
class _Predicting:
    """A process whose prediction is the user's function; meter and decoder are the process's own."""

    process: ReverseProcess
    predictor: Predictor
    rows: int

    @property
    def meter(self) -> Any:
        return self.process.meter

    @property
    def steps(self) -> int:
        return self.process.steps

    @property
    def prompts(self) -> Sequence[str] | None:
        return self.process.prompts

    @property
    def hooks(self) -> None:
        return None

    def decode(self, x: Tensor) -> Tensor:
        return self.process.decode(x)

    def complete(self, x: Tensor, x0: Tensor) -> Tensor:
        return self.process.complete(x, x0)

    def denoise(self, x: Tensor, k: int, key: Key | None = None) -> Tensor:
        def paid(x: Tensor) -> Answer:
            with self.meter.network(x.shape[0] * x.shape[1] * self.rows):
                return {"x0": self.predictor(x)}

        wanted = "x0_predictor must return samples of the shape of its states, {shape}"
        x0 = checked_output(self.meter.call("denoise", k, paid, x)["x0"], x, x.shape, wanted)
        self.meter.finite.prediction(x, x0, k, self.steps)
        return x0


def predicting(process: ReverseProcess, objective: Objective, predictor: Predictor | None, rows: int) -> Objective:
    """The objective on a process that predicts by the user's function; the objective itself without one."""
    if predictor is None:
        return objective
    return replace(objective, process=cast(Any, _Predicting(process, predictor, rows)))


def prior_moments(process: ReverseProcess) -> tuple[Tensor | None, float]:
    """Mean (None for zero) and standard deviation of the prior of a Gaussian process."""
    moments = process.prior_moments
    if moments is None:
        raise StateSpaceError(
            f"MCMC at the start needs a Gaussian prior, which {type(process).__name__} does not have; "
            "use start=steer.prior, or steer.top_k_of_n"
        )
    if moments[1] == 0.0:
        raise StateSpaceError(
            "MCMC at the start moves the starting noise, and this process starts from given latents; open the pipeline "
            "without latents=, or use start=steer.prior"
        )
    return moments


def given(temperature: float | None) -> float:
    """The temperature of a start, checked to be there."""
    if temperature is None:
        raise SteerError("this sampler does not tell its start the temperature: write it down, pcnl(temperature=1.0)")
    return check_temperature(temperature)


def norm(gradient: Tensor) -> Tensor:
    """Norm of each state's gradient, [B, C] float64."""
    return torch.linalg.vector_norm(gradient.flatten(2), dim=2, dtype=torch.float64)
