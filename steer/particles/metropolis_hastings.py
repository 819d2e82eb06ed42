"""Steps of Markov chains by Gaussian proposals, accepted by Metropolis and Hastings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.population import broadcast_like
from ..errors import SteerError
from ..key import Key
from .mcmc_start import MCMCStep, always
from .tilted_prior import TiltedPrior, TiltedState, norm


class ProposalCoefficients(NamedTuple):
    """The proposal N(keep x + pull G, variance I): float64 tensors [B], one step size per problem."""

    keep: Tensor
    pull: Tensor
    variance: Tensor


def log_acceptance(move: ProposalCoefficients, here: TiltedState, there: TiltedState) -> Tensor:
    """Log Metropolis-Hastings ratio [B, C], float64, of the step from here to there, from states of any dtype."""
    return _one_way(move, there, here) - _one_way(move, here, there)


def _one_way(move: ProposalCoefficients, a: TiltedState, b: TiltedState) -> Tensor:
    """log pi(a) q(b | a), without what is symmetric in a and b: at 65,536 coordinates that is nearly all of it.

    Of -|a|^2/2 and -|b - keep a|^2 / (2 variance), `radius` |a|^2 remains; for Crank-Nicolson that is zero too.
    """
    keep, pull, variance = (coefficient[:, None] for coefficient in move)
    start, end, gradient = (tensor.flatten(2).double() for tensor in (a.x, b.x, a.gradient))
    radius = -0.5 * (1.0 - (1.0 - keep**2) / variance)
    inner = ((end - keep[..., None] * start) * gradient).sum(2)
    lost = 0.5 * pull**2 / variance * gradient.square().sum(2)
    return a.value + radius * start.square().sum(2) + pull / variance * inner - lost


@dataclass(frozen=True)
class MetropolisHastings:
    """A proposal that is accepted by Metropolis and Hastings, or always.

    move:       coefficients of the proposal at a step size. pull: 0 for one that takes no gradient.
    step_size:  to begin with. largest: what adaptation may lead it to.
    acceptance: mean acceptance that adaptation leads to; None for none.
    corrected:  whether the Metropolis-Hastings decision is made.
    gradient:   whether the proposal is pulled by the gradient.
    """

    move: Callable[[Tensor], ProposalCoefficients]
    step_size: float
    acceptance: float | None
    corrected: bool = True
    gradient: bool = True
    largest: float = 4.0  # beyond it Crank-Nicolson turns back on itself (keep < 0)
    calls: int = 1

    def __post_init__(self) -> None:
        if not self.step_size > 0.0:
            raise SteerError(f"step_size must be positive, got {self.step_size}")

    def first_size(self, at: TiltedState) -> Tensor:
        """The same for every problem."""
        return torch.full_like(at.value[:, 0], math.log(self.step_size))

    def adapted(self, log_size: Tensor, rate: Tensor, i: int) -> Tensor:
        """Robbins-Monro, per problem."""
        if self.acceptance is None:
            return log_size
        log_size = log_size + (rate - self.acceptance) * (i + 1) ** -0.6
        return log_size.clamp(max=math.log(max(self.largest, self.step_size)))

    def step(self, tilt: TiltedPrior, at: TiltedState, log_size: Tensor, key: Key) -> tuple[TiltedState, MCMCStep]:
        """One proposal and its decision. Arithmetic is float64; states are rounded once, before densities see them."""
        move = self.move(log_size.exp())
        keep, pull, variance = (broadcast_like(coefficient, at.x) for coefficient in move)
        noise = key.fold("noise").normal(at.x.shape, device=at.x.device)
        to, _ = tilt((keep * at.x + pull * at.gradient + variance.sqrt() * noise).to(at.x.dtype))
        if not self.corrected:
            return to, always(to)
        # Out of a state that is forbidden, where only a prior draw can be, every move is accepted.
        ratio = log_acceptance(move, at, to).masked_fill(at.value == -torch.inf, torch.inf)
        accepted = key.fold("accept").uniform(ratio.shape, device=ratio.device).log() < ratio
        chosen = to.where(accepted, at)
        return chosen, MCMCStep(norm=norm(to.gradient), rate=ratio.exp().clamp(max=1.0), held=chosen.value)
