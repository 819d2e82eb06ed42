"""Starts by Langevin MCMC on the tilted prior: pCNL, MALA, ULA. They follow the gradient of the reward."""

from __future__ import annotations

from torch import Tensor

from .mcmc_start import MCMCStart
from .metropolis_hastings import MetropolisHastings, ProposalCoefficients
from .tilted_prior import Predictor


def crank_nicolson(step: Tensor) -> ProposalCoefficients:
    """pCNL: the Crank-Nicolson discretisation of dx = (G - x) / 2 dt + dw. Leaves N(0, I) as it is at every step."""
    keep = (1.0 - 0.25 * step) / (1.0 + 0.25 * step)
    return ProposalCoefficients(keep=keep, pull=1.0 - keep, variance=1.0 - keep**2)


def euler(step: Tensor) -> ProposalCoefficients:
    """MALA and ULA: the Euler discretisation of the same equation."""
    return ProposalCoefficients(keep=1.0 - 0.5 * step, pull=0.5 * step, variance=step)


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
        MetropolisHastings(crank_nicolson, step_size, acceptance),
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
        MetropolisHastings(euler, step_size, acceptance),
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
        MetropolisHastings(euler, step_size, None, corrected=False),
        temperature=temperature,
        chains=chains,
        burn_in=burn_in,
        kept=kept,
        clip=clip,
        x0_predictor=x0_predictor,
        predictor_rows=predictor_rows,
    )
