"""Starts by Langevin MCMC on the tilted prior: pCNL, MALA, ULA. They follow the gradient of the reward."""

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
from .mcmc_start import MCMCStart, MCMCStep, always
from .tilted_prior import Predictor, TiltedPrior, TiltedState, norm


class ProposalCoefficients(NamedTuple):
    """The proposal N(keep x + pull G, variance I): float64 tensors [B], one step size per problem."""

    keep: Tensor
    pull: Tensor
    variance: Tensor


def crank_nicolson(step: Tensor) -> ProposalCoefficients:
    """pCNL: the Crank-Nicolson discretisation of dx = (G - x) / 2 dt + dw. Leaves N(0, I) as it is at every step."""
    keep = (1.0 - 0.25 * step) / (1.0 + 0.25 * step)
    return ProposalCoefficients(keep=keep, pull=1.0 - keep, variance=1.0 - keep**2)


def euler(step: Tensor) -> ProposalCoefficients:
    """MALA and ULA: the Euler discretisation of the same equation."""
    return ProposalCoefficients(keep=1.0 - 0.5 * step, pull=0.5 * step, variance=step)


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
class Langevin:
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


def pcnl(
    *,
    temperature: float | None = None,
    chains: int = 5,
    burn_in: int | None = None,
    kept: int | None = None,
    step_size: float = 0.5,
    acceptance: float | None = 0.57,
    clip: float | None = None,
    x0_predictor: Predictor | None = None,
    predictor_rows: int = 1,
) -> MCMCStart:
    """A start from the tilted prior by preconditioned Crank-Nicolson Langevin (pCNL), Metropolis-Hastings exact.

    Args:
        temperature: T_m of the tilt, > 0, in units of the reward; None takes the run's. Any other is allowed, and
            weights correct for it.
        chains: C per problem; several, because split R-hat compares them.
        burn_in: steps discarded; None for 50, or in `psi` for what the budget pays.
        kept: steps after those, from which particles are thinned evenly; None as for `burn_in`. With kept * chains = N
            every state is used ("waste-free", Dau & Chopin 2022). With fewer, particles share states and separate at
            the first step that draws noise.
        step_size: epsilon at the start, > 0.
        acceptance: mean acceptance that the step size is led to in burn-in, per problem, and then frozen; None to leave
            the step size alone.
        clip: largest norm of a state's gradient G, in units of the prior; longer ones are scaled to it. Still exact,
            since the clipped G is a function of the state alone.
        x0_predictor: what the reward judges x by, from states [B, C, *event] to clean states of that shape; the model's
            own E[x_0 | x] if None. On a flow at alpha = 0 that is the same for every x: give a few-step model or a flow
            map.
        predictor_rows: network rows (NFE x batch rows) that x0_predictor costs per state, for the cost.

    Returns:
        A start for `steer.smc(start=...)` and every other sampler. Its trajectory's `diagnostics` hold, [B] each:
        `acceptance`, `step_size` (the final one), `split_rhat` of r / T_m over the kept steps, and `gradient`, the mean
        norm of G: far below 1, the tilt is flat and the start is the prior. The run's log_evidence is NaN, since only
        its ratio to the normalizing constant of the tilted prior is seen.

    Raises:
        NotDifferentiableError: where the gradient vanishes.
        StateSpaceError: without a Gaussian prior.
        SteerError: for numbers out of range; and what rewards raise.

    Cost: per problem C (1 + burn_in + kept) network rows, rewards and backward passes. Predictions that the reward
    forbids (-inf) are never visited: a distribution that puts mass behind them is cut.

    Source: Cotter et al. 2013 (pCNL); Yoon et al. 2025 (Ψ-Sampler, 2506.01320), Eqs. 12-13; epsilon = .5 there.
    Differs: adapted step size, states in float32 or better and ratios in float64, clipping per sample and not per
    batch, even thinning, and the reward is not counted again afterwards. Robust to the dimension of x but not to the
    rank of the reward's Hessian: a tilt that curves in thousands of directions forces small steps on any of these.
    """
    return MCMCStart(
        Langevin(crank_nicolson, step_size, acceptance),
        temperature=temperature,
        chains=chains,
        burn_in=burn_in,
        kept=kept,
        clip=clip,
        x0_predictor=x0_predictor,
        predictor_rows=predictor_rows,
    )


def mala(
    *,
    temperature: float | None = None,
    chains: int = 5,
    burn_in: int | None = None,
    kept: int | None = None,
    step_size: float = 0.05,
    acceptance: float | None = 0.57,
    clip: float | None = None,
    x0_predictor: Predictor | None = None,
    predictor_rows: int = 1,
) -> MCMCStart:
    """A start from the tilted prior by MALA: exact, but its step must shrink as the dimension grows.

    Args and returns: as `pcnl`.

    Source: Roberts & Tweedie 1996; the comparison of Yoon et al. 2025, epsilon = .05 there.
    """
    return MCMCStart(
        Langevin(euler, step_size, acceptance),
        temperature=temperature,
        chains=chains,
        burn_in=burn_in,
        kept=kept,
        clip=clip,
        x0_predictor=x0_predictor,
        predictor_rows=predictor_rows,
    )


def ula(
    *,
    temperature: float | None = None,
    chains: int = 5,
    burn_in: int | None = None,
    kept: int | None = None,
    step_size: float = 0.05,
    clip: float | None = None,
    x0_predictor: Predictor | None = None,
    predictor_rows: int = 1,
) -> MCMCStart:
    """A start by unadjusted Langevin: MALA without the decision, of a biased distribution that nothing corrects.

    Args and returns: as `pcnl`, without `acceptance`. For comparisons. The variance of the prior's free directions
    comes out as 1 / (1 - step_size / 4).

    Source: Roberts & Tweedie 1996; the comparison of Yoon et al. 2025.
    """
    return MCMCStart(
        Langevin(euler, step_size, None, corrected=False),
        temperature=temperature,
        chains=chains,
        burn_in=burn_in,
        kept=kept,
        clip=clip,
        x0_predictor=x0_predictor,
        predictor_rows=predictor_rows,
    )
