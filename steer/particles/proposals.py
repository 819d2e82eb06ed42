"""Proposals: what particles move by, and the gradients that guide them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from ..core.objective import Objective
from ..core.trajectory import Trajectory
from ..errors import StateSpaceError
from ..processes.gaussian import GaussianProcess
from ..types import GaussianTransition
from .tempering import GeometricTempering


class Proposal(Protocol):
    """What particles move by: a law for the next state from the state and the model's own transition."""

    @property
    def scale(self) -> float:
        """Strength of the guidance; where it is not 0 the state carries the gradient of r(x0_hat) / temperature."""
        ...

    def __call__(self, state: Trajectory, model: GaussianTransition) -> GaussianTransition: ...


@runtime_checkable
class LookingProposal(Proposal, Protocol):
    """A proposal that evaluates the network itself, where it needs more than the gradient of the reward."""

    def look(self, state: Trajectory, objective: Objective, weighted: bool, /) -> tuple[Trajectory, Tensor | None]:
        """The state carrying its prediction "x0" and what the proposal needs, and scores where it is weighted."""
        ...


@dataclass(frozen=True)
class Bootstrap:
    """Proposes from the model's own transition: no gradients."""

    scale: float = 0.0

    def __call__(self, state: Trajectory, model: GaussianTransition) -> GaussianTransition:
        return model


@dataclass(frozen=True)
class Guided:
    """Proposes from the transition shifted by scale * std^2 * gradient of the (tempered) value r(x0_hat(x)) / T.

    The shift of TDS (Wu et al. 2023) and DAS (Kim et al. 2025) in transition form. Weights correct for it, so it
    changes the variance and not the law.
    """

    scale: float = 1.0

    def __call__(self, state: Trajectory, model: GaussianTransition) -> GaussianTransition:
        return model.shift(pull(state) * (self.scale * model.std**2))


def pull(state: Trajectory) -> Tensor:
    """Gradient (B, N, *event) of the tempered value at a state that carries one."""
    gradient = state.carried["gradient"]
    if "exponent" not in state.memory:
        return gradient
    exponent = state.memory["exponent"].to(gradient.dtype)
    return gradient * exponent.view(*exponent.shape, *(1 for _ in gradient.shape[2:]))


bootstrap = Bootstrap()


def guided(scale: float = 1.0) -> Guided:
    """A proposal that follows the gradient of the reward; needs a differentiable reward and network."""
    return Guided(scale)


def evaluated(
    state: Trajectory, objective: Objective, temperature: float, proposal: Proposal, weighted: bool
) -> tuple[Trajectory, Tensor | None]:
    """The state carrying its prediction (and gradient, where it is needed), and its scores where it is weighted."""
    process, k = state.process, state.k
    if proposal.scale and process.stochastic(k):
        if not hasattr(process, "levels"):
            raise StateSpaceError(
                f"a proposal that follows a gradient needs states on a Gaussian path, got {type(process).__name__}; "
                "use proposal=steer.bootstrap"
            )
        if isinstance(proposal, LookingProposal):
            return proposal.look(state, objective, weighted)
        x0, scores, gradient = objective.value_and_grad(state.x, k, 1.0 / temperature)
        return state.carry(x0=x0, gradient=gradient), scores if weighted else None
    with torch.no_grad():
        x0 = process.denoise(state.x, k)
        return state.carry(x0=x0), objective(process.complete(state.x, x0)) if weighted else None


@dataclass(frozen=True)
class Twisted:
    """Proposes the model's step as if it had predicted x0 + scale (sigma^2 / alpha) G, G = gradient of r(x0_hat) / T.

    That is Tweedie's formula with the score of the tilted law. The step's mean is affine in x0, with coefficient
    c = alpha' - alpha sqrt(sigma'^2 - std^2) / sigma in a rule that keeps marginals, so the mean moves by
    scale c (sigma^2 / alpha) G. `guided` moves it by scale std^2 G instead. For ancestral sampling the ratio of the
    two is (alpha' sigma^2) / (alpha sigma'^2) > 1: the same in the limit of small steps, but stronger in a long
    one and unbounded in the last (which adds no noise, and so is never shifted). At alpha = 0, where the formula
    divides by zero, the step is the model's own.
    """

    scale: float = 1.0

    def __call__(self, state: Trajectory, model: GaussianTransition) -> GaussianTransition:
        here, there = cast(GaussianProcess, state.process).levels[state.k : state.k + 2]
        if here.alpha <= 0.0:
            return model
        carried = math.sqrt(max(0.0, there.sigma**2 - model.std**2)) / here.sigma
        coefficient = there.alpha - carried * here.alpha
        return model.shift(pull(state) * (self.scale * coefficient * here.sigma**2 / here.alpha))


def twisted(scale: float = 1.0) -> Twisted:
    """A proposal that follows the gradient of the reward through x_0, as TDS does; see `Twisted` for the formula."""
    return Twisted(scale)


@dataclass(frozen=True)
class Ahead:
    """Proposes like `guided`, but with the value tempered as it will be at the next level, where the step is judged."""

    tempering: GeometricTempering
    scale: float = 1.0

    def __call__(self, state: Trajectory, model: GaussianTransition) -> GaussianTransition:
        strength = self.scale * self.tempering.at(state.k + 1) * model.std**2
        return model.shift(state.carried["gradient"] * strength)
