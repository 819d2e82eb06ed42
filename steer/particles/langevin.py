"""Starts that know the reward: MCMC on the prior tilted by it, at the noisiest level of a process.

A chain of a diffusion begins at x ~ N(0, sigma^2 I), and what it begins with decides much of what it ends with. The
starts below draw instead from

    N(x; 0, sigma^2 I) exp(r(x0_predictor(x)) / T_m)

(Ψ-Sampler, Yoon et al. 2025, Eq. 4), and say so in `path.log_potential = r(x0_predictor(x)) / T_m`. That is all an
exact run needs: the target is p(path) exp(r(x_0) / T), the population at hand is p(path) exp(v) with that v, and every
`Potential` multiplies in what lies between, in whatever portions, since it closes on r(x_0) / T - v. At the first level
that is nothing where T_m = T and r / T - r / T_m elsewhere, with nothing to configure. What stays unknown is the
normalizing constant of the tilted prior, and with it that of the run: log_evidence is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.diagnostics import split_rhat
from ..core.loop import keeping
from ..core.objective import Objective
from ..core.population import broadcast_like
from ..core.start import Start
from ..core.trajectory import Trajectory
from ..errors import SteerError
from ..key import Key
from ..types import ReverseProcess
from .tilted_prior import Predictor, TiltedPrior, TiltedState, given, norm, predicting, prior_moments


class ProposalCoefficients(NamedTuple):
    """The proposal N(keep x + pull G, variance I): float64 tensors [B], one step size per problem."""

    keep: Tensor
    pull: Tensor
    variance: Tensor


class MCMCStep(NamedTuple):
    """What is recorded of a step of all chains, [B, C] float64 each."""

    norm: Tensor  # of the proposal's gradient
    rate: Tensor  # probability to accept it
    held: Tensor  # log-tilt of the state after the decision


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
    """A start by Langevin MCMC. Built by `pcnl`, `mala` and `ula`; `pcnl` says what the fields mean."""

    move: Callable[[Tensor], ProposalCoefficients]
    corrected: bool
    step_size: float
    acceptance: float | None
    temperature: float | None = None
    chains: int = 5
    burn_in: int | None = None
    kept: int | None = None
    clip: float | None = None
    x0_predictor: Predictor | None = None
    predictor_rows: int = 1

    def __post_init__(self) -> None:
        burn_in, kept = self.lengths
        if self.chains < 1 or burn_in < 0 or kept < 1:
            raise SteerError(f"MCMC needs chains >= 1, burn_in >= 0, kept >= 1, got {self.chains}, {burn_in}, {kept}")
        if not self.step_size > 0.0:
            raise SteerError(f"step_size must be positive, got {self.step_size}")

    @property
    def lengths(self) -> tuple[int, int]:
        """Steps of burn-in and steps kept; 50 each (the released layout configuration) where nothing says otherwise."""
        return 50 if self.burn_in is None else self.burn_in, 50 if self.kept is None else self.kept

    def rows(self, process: ReverseProcess) -> int:
        """Network rows per problem for one step of all chains."""
        return self.chains * (process.rows if self.x0_predictor is None else self.predictor_rows)

    def prepare(self, process: ReverseProcess, temperature: float) -> tuple[Start, int]:
        """The start at its own or else the run's temperature, and the network rows per problem it spends."""
        own = temperature if self.temperature is None else self.temperature
        return replace(self, temperature=own), self.rows(process) * (1 + sum(self.lengths))

    def check(self, process: ReverseProcess, objective: Objective, particles: int) -> None:
        """Raises where the process has no Gaussian prior, or the reward no gradient."""
        del particles
        prior_moments(process)
        objective.check_differentiable()

    def __call__(
        self, process: ReverseProcess, objective: Objective, key: Key, batch: int, particles: int
    ) -> Trajectory:
        """Runs the chains and spreads N particles over the states that they keep."""
        first = Trajectory.begin(process, process.prior(key.fold("prior"), batch, self.chains))
        judged = predicting(process, objective, self.x0_predictor, self.predictor_rows)
        mean, sigma = prior_moments(process)
        tilt = TiltedPrior(
            objective=judged,
            mean=mean,
            sigma=sigma,
            dtype=first.x.dtype,
            temperature=given(self.temperature),
            clip=self.clip,
            key=key,
        )
        rounds = math.ceil(particles / self.chains)
        reached: list[TiltedState] = []
        with keeping(lambda: replace(_population(process, tilt, reached), biased_start=True) if reached else first):
            record, stops, log_step = self._run_chains(tilt, first.x, key.fold("mcmc"), rounds, reached)
        kept = record[-self.lengths[1] :]
        return replace(
            _population(process, tilt, stops, particles),
            biased_start=not self.corrected,
            diagnostics={
                "acceptance": torch.stack([step.rate for step in kept]).mean((0, 2)),
                "step_size": log_step.exp(),
                "split_rhat": split_rhat(torch.stack([step.held for step in kept], 1)),
                "gradient": torch.stack([step.norm for step in kept]).mean((0, 2)),
            },
        )

    def _run_chains(
        self, tilt: TiltedPrior, first: Tensor, key: Key, rounds: int, reached: list[TiltedState]
    ) -> tuple[list[MCMCStep], list[TiltedState], Tensor]:
        """Every step, the states at the end of each of `rounds` even stretches, and the log of the last step size.

        All chains of all problems move in one network call. The device is read once, at the first gradient. reached: is
        made to hold where the chains are, for an error on the way.
        """
        burn_in, kept = self.lengths
        ends = [burn_in + math.ceil((j + 1) * kept / rounds) - 1 for j in range(rounds)]
        at, x0 = tilt(tilt.units(first))
        tilt.check_gradient(at, x0)
        log_step = torch.full_like(at.value[:, 0], math.log(self.step_size))
        reached[:] = [at]
        record = [_always(at)]
        stops: dict[int, TiltedState] = {}
        for i in range(burn_in + kept):
            at, step = self._step(tilt, at, self.move(log_step.exp()), key.at(i))
            reached[:] = [at]
            record.append(step)
            if i < burn_in and self.acceptance is not None:
                # Robbins-Monro, per problem. Beyond a step size of 4 Crank-Nicolson turns back on itself (keep < 0).
                log_step = log_step + (step.rate.mean(1) - self.acceptance) * (i + 1) ** -0.6
                log_step = log_step.clamp(max=math.log(max(4.0, self.step_size)))
            if i in ends:
                stops[i] = at._replace(gradient=at.value)  # its gradient is not needed any more
        return record, [stops[i] for i in ends], log_step

    def _step(
        self, tilt: TiltedPrior, at: TiltedState, move: ProposalCoefficients, key: Key
    ) -> tuple[TiltedState, MCMCStep]:
        """One proposal and its decision. Arithmetic is float64; states are rounded once, before densities see them."""
        keep, pull, variance = (broadcast_like(coefficient, at.x) for coefficient in move)
        noise = key.fold("noise").normal(at.x.shape, device=at.x.device)
        to, _ = tilt((keep * at.x + pull * at.gradient + variance.sqrt() * noise).to(at.x.dtype))
        if not self.corrected:
            return to, _always(to)
        # Out of a state that is forbidden, where only a prior draw can be, every move is accepted.
        ratio = log_acceptance(move, at, to).masked_fill(at.value == -torch.inf, torch.inf)
        accepted = key.fold("accept").uniform(ratio.shape, device=ratio.device).log() < ratio
        pairs = zip(to, at, strict=True)
        chosen = TiltedState(*(torch.where(broadcast_like(accepted, new), new, old) for new, old in pairs))
        rate = ratio.exp().clamp(max=1.0)
        return chosen, MCMCStep(norm=norm(to.gradient), rate=rate, held=chosen.value)


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
) -> Langevin:
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
    return Langevin(
        move=crank_nicolson,
        corrected=True,
        step_size=step_size,
        acceptance=acceptance,
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
) -> Langevin:
    """A start from the tilted prior by MALA: exact, but its step must shrink as the dimension grows.

    Args and returns: as `pcnl`.

    Source: Roberts & Tweedie 1996; the comparison of Yoon et al. 2025, epsilon = .05 there.
    """
    return Langevin(
        move=euler,
        corrected=True,
        step_size=step_size,
        acceptance=acceptance,
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
) -> Langevin:
    """A start by unadjusted Langevin: MALA without the decision, of a biased distribution that nothing corrects.

    Args and returns: as `pcnl`, without `acceptance`. For comparisons. The variance of the prior's free directions
    comes out as 1 / (1 - step_size / 4).

    Source: Roberts & Tweedie 1996; the comparison of Yoon et al. 2025.
    """
    return Langevin(
        move=euler,
        corrected=False,
        step_size=step_size,
        acceptance=None,
        temperature=temperature,
        chains=chains,
        burn_in=burn_in,
        kept=kept,
        clip=clip,
        x0_predictor=x0_predictor,
        predictor_rows=predictor_rows,
    )


def _always(at: TiltedState) -> MCMCStep:
    """The record of a step that is accepted whatever it leads to."""
    return MCMCStep(norm=norm(at.gradient), rate=torch.ones_like(at.value), held=at.value)


def _population(
    process: ReverseProcess, tilt: TiltedPrior, stops: Sequence[TiltedState], particles: int | None = None
) -> Trajectory:
    """Particles of the tilted prior, spread over states of the chains; None for all of them.

    Particle n is chain n mod C at the end of stretch n // C: chains share alike, and stretches are even.
    """
    x = tilt.latent(torch.cat([stop.x for stop in stops], 1)[:, :particles])
    value = torch.cat([stop.value for stop in stops], 1)[:, :particles]
    forbidden = value == -torch.inf  # a chain that met nothing but forbidden predictions: its particles weigh nothing
    return replace(
        Trajectory.begin(process, x).with_path_state(log_potential=value.masked_fill(forbidden, 0.0)),
        log_weight=torch.zeros_like(value).masked_fill(forbidden, -torch.inf),
        log_evidence=torch.full_like(value[:, 0], torch.nan),
    )
