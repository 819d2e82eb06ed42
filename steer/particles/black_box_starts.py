"""Starts by MCMC on the tilted prior that only call the reward: pCN, and elliptical slice sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.population import broadcast_like, gather
from ..errors import SteerError
from ..key import Key
from .mcmc_start import MCMCStart, MCMCStep
from .metropolis_hastings import MetropolisHastings, ProposalCoefficients
from .tilted_prior import Predictor, TiltedPrior, TiltedState, norm

_LARGEST = 0.8  # nearly independent draws would be accepted often, and their rare excursions would stick


def autoregressive(step: Tensor) -> ProposalCoefficients:
    """pCN: sqrt(1 - b^2) x + b nu, which leaves N(0, I) as it is."""
    return ProposalCoefficients(keep=(1.0 - step**2).sqrt(), pull=torch.zeros_like(step), variance=step**2)


def pcn(
    *,
    temperature: float | None = None,
    chains: int = 5,
    burn_in: int | None = None,
    kept: int | None = None,
    step_size: float = 0.5,
    acceptance: float | None = 0.35,
    x0_predictor: Predictor | None = None,
    predictor_rows: int = 1,
) -> MCMCStart:
    """A start from the tilted prior by preconditioned Crank-Nicolson (pCN): for rewards without a gradient.

    Args:
        temperature, chains, burn_in, kept, x0_predictor, predictor_rows: as `steer.pcnl`.
        step_size: b in (0, 1] to begin with; a proposal is sqrt(1 - b^2) x + b nu, with nu of the prior.
        acceptance: mean acceptance that b is led to in burn-in, per problem and up to .8, and then frozen; None to
            leave it alone.

    Returns:
        A start for `steer.psi(start=...)`, `steer.smc(start=...)` and every other sampler, with `diagnostics` as of
        `steer.pcnl`, without a gradient. The run's log_evidence is NaN.

    Raises:
        StateSpaceError: without a Gaussian prior, and where the prediction is the same for every x, as an exact
            posterior mean is where alpha = 0: give an x0_predictor.
        SteerError: for numbers out of range; and what rewards raise.

    Cost: per problem C (1 + burn_in + kept) network rows and rewards, no backward pass.

    Source: Cotter et al. 2013; Beskos et al. 2008.
    Differs: adapted step size, kept at .8 or below: led to an acceptance of .25 on a linear reward, b becomes .91, and
    the mean found was 1.909 +- .026 for 2.
    """
    if not 0.0 < step_size <= 1.0:
        raise SteerError(f"step_size is b of sqrt(1 - b^2) x + b nu, in (0, 1], got {step_size}")
    return MCMCStart(
        MetropolisHastings(autoregressive, step_size, acceptance, gradient=False, largest=_LARGEST),
        temperature=temperature,
        chains=chains,
        burn_in=burn_in,
        kept=kept,
        x0_predictor=x0_predictor,
        predictor_rows=predictor_rows,
    )


@dataclass(frozen=True)
class EllipticalSlice:
    """Moves along an ellipse through the state and a draw of the prior, to a point above a random height.

    calls: points that are tried, at most; a chain that has found none stays. Reversible all the same: the tries that
    lead from x to x' in some number of rounds lead from x' to x with the same density in as many.
    """

    calls: int = 8
    gradient: bool = False
    corrected: bool = True

    def __post_init__(self) -> None:
        if self.calls < 1:
            raise SteerError(f"elliptical slice sampling tries at least one point a step, got tries={self.calls}")

    def first_size(self, at: TiltedState) -> None:
        """There is no step size."""
        del at

    def adapted(self, log_size: None, rate: Tensor, i: int) -> None:
        """Nothing is adapted."""
        del log_size, rate, i

    def step(self, tilt: TiltedPrior, at: TiltedState, log_size: None, key: Key) -> tuple[TiltedState, MCMCStep]:
        """One draw of the ellipse and the height; the bracket of angles shrinks to a refused one until one is found."""
        del log_size
        where, device = at.value.shape, at.x.device

        def uniform(name: str) -> Tensor:
            return key.fold(name).uniform(where, device=device)

        other = key.fold("noise").normal(at.x.shape, device=device)
        height = at.value + uniform("height").log()
        angle = 2.0 * math.pi * uniform("angle")
        low, high = angle - 2.0 * math.pi, angle
        reached, open_ = at, torch.ones_like(height, dtype=torch.bool)
        for tries in range(self.calls):
            if tries:
                low, high = torch.where(angle < 0.0, angle, low), torch.where(angle < 0.0, high, angle)
                angle = low + (high - low) * uniform(f"angle {tries}")
            columns = _first(open_)  # a problem's chains that look on, and others to fill its row
            turn = broadcast_like(angle, at.x)
            point = (turn.cos() * at.x + turn.sin() * other).to(at.x.dtype)
            tried, _ = tilt(gather(point, columns))
            found = open_.gather(1, columns) & (tried.value > height.gather(1, columns))
            reached = _put(reached, columns, tried.where(found, _take(reached, columns)))
            open_ = open_.scatter(1, columns, open_.gather(1, columns) & ~found)
            if not bool(open_.any()):
                break
        return reached, MCMCStep(norm=norm(at.gradient), rate=(~open_).double(), held=reached.value)


def elliptical_slice(
    *,
    temperature: float | None = None,
    chains: int = 5,
    burn_in: int | None = None,
    kept: int | None = None,
    tries: int = 8,
    x0_predictor: Predictor | None = None,
    predictor_rows: int = 1,
) -> MCMCStart:
    """A start from the tilted prior by elliptical slice sampling: for rewards without a gradient, nothing to tune.

    Args:
        temperature, chains, burn_in, kept, x0_predictor, predictor_rows: as `steer.pcnl`.
        tries: points of the ellipse that a step tries at most; a chain that has found none stays where it is.

    Returns:
        A start as `steer.pcn` is. `diagnostics["acceptance"]` is how often a step found a point.

    Raises:
        As `steer.pcn`.

    Cost: per problem at most C (1 + tries (burn_in + kept)) network rows and rewards, which a budget sets aside; about
    three predictions a step are made. pCN gets an independent state for a third of the rows; this needs no
    burn-in to find its step size. The device is read once a try.

    Source: Murray, Adams & MacKay 2010 (1001.0175), Figure 2.
    Differs: a limit to the tries, which keeps the distribution.
    """
    return MCMCStart(
        EllipticalSlice(tries),
        temperature=temperature,
        chains=chains,
        burn_in=burn_in,
        kept=kept,
        x0_predictor=x0_predictor,
        predictor_rows=predictor_rows,
    )


def _first(chosen: Tensor) -> Tensor:
    """Columns [B, n] of the chosen entries of [B, C], n the most that a problem has, others after them."""
    order = torch.sort(chosen.int(), dim=1, descending=True, stable=True).indices
    return order[:, : int(chosen.sum(1).max())]


def _take(at: TiltedState, columns: Tensor) -> TiltedState:
    return TiltedState(*(gather(tensor, columns) for tensor in at))


def _put(at: TiltedState, columns: Tensor, new: TiltedState) -> TiltedState:
    """The states with those at columns [B, n] replaced."""
    replaced = (
        old.scatter(1, broadcast_like(columns, old).expand(*columns.shape, *old.shape[2:]), value)
        for old, value in zip(at, new, strict=True)
    )
    return TiltedState(*replaced)
