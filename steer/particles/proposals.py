"""Proposals: what particles move by, and the gradients that guide them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from ..core.objective import Objective, at_level
from ..core.population import per_particle
from ..core.trajectory import Trajectory
from ..errors import SteerError
from ..key import Key
from ..processes.gaussian import need_gaussian
from ..types import GaussianTransition, ReverseProcess, Transition
from .tempering import GeometricTempering


class Proposal(Protocol):
    """What particles move by: a distribution of the next state, from the state and the model's own transition.

    Called at every step that draws noise. A step without noise has no density to correct by, and is the model's own.
    """

    @property
    def needs_gradient(self) -> bool:
        """Whether `state.cache.gradient` must hold the gradient of r(x0_hat) / temperature, [B, N, *event]."""
        ...

    def __call__(self, state: Trajectory, model: GaussianTransition) -> GaussianTransition:
        """The proposal from a state that caches its prediction; `model` itself where nothing is to change."""
        ...


class EvaluatingProposal(Proposal, Protocol):
    """A proposal that evaluates the network itself, where it needs more than the gradient of the reward."""

    def evaluate(
        self, state: Trajectory, objective: Objective, weighted: bool, key: Key, /
    ) -> tuple[Trajectory, Tensor | None]:
        """The state caching its prediction x0 and what the proposal needs; its scores [B, N] where it is weighted.

        key: names what is drawn on the way.
        """
        ...


@runtime_checkable
class CheckedProposal(Protocol):
    """A proposal that can say beforehand that it does not fit."""

    def check(self, process: ReverseProcess, /) -> object:
        """Raises where the process is none that it can move."""
        ...


ProposalFunction = Callable[[Trajectory, GaussianTransition], Transition]
"""A proposal that needs no gradient, as a plain function: lambda state, model: model.shift(...)."""


@dataclass(frozen=True)
class Bootstrap:
    """Proposes from the model's own transition: no gradients."""

    @property
    def needs_gradient(self) -> bool:
        return False

    def __call__(self, state: Trajectory, model: GaussianTransition) -> GaussianTransition:
        return model


@dataclass(frozen=True)
class Guided:
    """Proposes from the transition shifted by scale * std^2 * gradient of the (tempered) value r(x0_hat(x)) / T.

    The shift of TDS (Wu et al. 2023) and DAS (Kim et al. 2025) in transition form. Weights correct for it, so it
    changes the variance and not the distribution.
    """

    scale: float = 1.0

    @property
    def needs_gradient(self) -> bool:
        return self.scale != 0.0

    def __call__(self, state: Trajectory, model: GaussianTransition) -> GaussianTransition:
        if self.scale == 0.0:
            return model
        return model.shift(tempered_gradient(state) * (self.scale * model.std**2))


def gradient_of(state: Trajectory) -> Tensor:
    """The gradient [B, N, *event] that a state caches; a named error where it has none."""
    if state.cache.gradient is None:
        raise SteerError(
            "this proposal follows the gradient of the reward, and its state has none: give the proposal a property "
            "needs_gradient that is True"
        )
    return state.cache.gradient


def tempered_gradient(state: Trajectory) -> Tensor:
    """Gradient [B, N, *event] of the tempered value at a state that caches one."""
    gradient = gradient_of(state)
    if state.path.exponent is None:
        return gradient
    return gradient * per_particle(state.path.exponent, gradient)


bootstrap = Bootstrap()


def guided(scale: float = 1.0) -> Guided:
    """A proposal that follows the gradient of the reward; needs a differentiable reward and network.

    The shift of TDS (Wu et al. 2023) and DAS (Kim et al. 2025) in transition form; weights correct for it.

    Args:
        scale: multiple of std^2 times the gradient of r(x0_hat) / temperature; 0 is `bootstrap`.

    Returns:
        What `steer.smc(proposal=...)` takes.

    Cost: one backward pass per network row, at every step that draws noise.
    """
    return Guided(scale)


def check_proposal(proposal: Proposal | ProposalFunction, process: ReverseProcess, objective: Objective) -> None:
    """Raises what a run would raise of its proposal at the first step that draws noise."""
    if not any(process.stochastic(k) for k in range(process.steps)):
        return
    if isinstance(proposal, CheckedProposal):
        proposal.check(process)
    elif getattr(proposal, "needs_gradient", False):  # a plain function has no such property
        _need_gaussian(process)
        objective.check_differentiable()


def predict_and_score(
    state: Trajectory,
    objective: Objective,
    temperature: float,
    proposal: Proposal | ProposalFunction,
    weighted: bool,
    key: Key,
) -> tuple[Trajectory, Tensor | None]:
    """The state caching its prediction (and gradient, where it is needed), and its scores where it is weighted."""
    process, k = state.process, state.k
    if process.stochastic(k):
        evaluate = getattr(proposal, "evaluate", None)  # isinstance of a protocol took a tenth of a cheap step
        if evaluate is not None:
            return evaluate(state, objective, weighted, key)
        if getattr(proposal, "needs_gradient", False):  # a plain function has no such property
            _need_gaussian(process)
            x0, scores, gradient = objective.value_and_grad(state.x, k, 1.0 / temperature, key)
            state = state.with_step_cache(x0=x0, score=scores, gradient=gradient)
            return state, scores if weighted else None
    with torch.no_grad():
        x0 = process.denoise(state.x, k, key)
        if not weighted:
            return state.with_step_cache(x0=x0), None
        scores = objective(process.complete(state.x, x0), at_level(process, k))
        return state.with_step_cache(x0=x0, score=scores), scores


def _need_gaussian(process: ReverseProcess) -> None:
    need_gaussian(process, "a proposal that follows a gradient", cure="use proposal=steer.bootstrap")


def propose(proposal: Proposal | ProposalFunction, state: Trajectory, model: Transition) -> Transition:
    """What a state that caches its prediction moves by: the proposal, wherever the step draws noise."""
    # Asked of the process: a step that a corrector follows draws noise, and has no density that a proposal could use.
    if isinstance(proposal, Bootstrap) or not state.process.stochastic(state.k):
        return model
    return proposal(state, cast(GaussianTransition, model))


@dataclass(frozen=True)
class Twisted:
    """Proposes the model's step as if it had predicted x0 + scale (sigma^2 / alpha) G, G = gradient of r(x0_hat) / T.

    That is Tweedie's formula with the score of the tilted distribution. The step's mean is affine in x0, with
    coefficient c = alpha' - alpha sqrt(sigma'^2 - std^2) / sigma in a rule that keeps marginals, so the mean moves by
    scale c (sigma^2 / alpha) G. `guided` moves it by scale std^2 G instead. For ancestral sampling the ratio of the two
    is (alpha' sigma^2) / (alpha sigma'^2) > 1: the same in the limit of small steps, but stronger in a long one and
    unbounded in the last (which adds no noise, and so is never shifted). At alpha = 0, where the formula divides by
    zero, the step is the model's own.
    """

    scale: float = 1.0

    @property
    def needs_gradient(self) -> bool:
        return self.scale != 0.0

    def __call__(self, state: Trajectory, model: GaussianTransition) -> GaussianTransition:
        here, there = need_gaussian(state.process, "a twisted proposal").levels[state.k : state.k + 2]
        if here.alpha <= 0.0 or self.scale == 0.0:
            return model
        carried = math.sqrt(max(0.0, there.sigma**2 - model.std**2)) / here.sigma
        coefficient = there.alpha - carried * here.alpha
        return model.shift(tempered_gradient(state) * (self.scale * coefficient * here.sigma**2 / here.alpha))


def twisted(scale: float = 1.0) -> Twisted:
    """A proposal that follows the gradient of the reward through x_0, as TDS does; see `Twisted` for the formula.

    Args:
        scale: strength of the twist; weights correct for any. 0 is `bootstrap`.

    Returns:
        What `steer.smc(proposal=...)` takes; the process must be on a Gaussian path.

    Cost: one backward pass per network row, at every step that draws noise.
    """
    return Twisted(scale)


@dataclass(frozen=True)
class TemperedGuided:
    """Proposes like `guided`, but with the value tempered as it will be at the next level, where the step is judged."""

    tempering: GeometricTempering
    scale: float = 1.0

    @property
    def needs_gradient(self) -> bool:
        return self.scale != 0.0

    def __call__(self, state: Trajectory, model: GaussianTransition) -> GaussianTransition:
        if self.scale == 0.0:
            return model
        strength = self.scale * self.tempering.at(state.k + 1) * model.std**2
        return model.shift(gradient_of(state) * strength)
