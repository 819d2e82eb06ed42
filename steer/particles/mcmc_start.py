"""Starts that know the reward: MCMC on the prior tilted by it, at the noisiest level of a process.

A chain of a diffusion begins at x ~ N(0, sigma^2 I), and what it begins with decides much of what it ends with. These
starts draw instead from

    N(x; 0, sigma^2 I) exp(r(x0_predictor(x)) / T_m)

(Ψ-Sampler, Yoon et al. 2025, Eq. 4), and say so in `path.log_potential = r(x0_predictor(x)) / T_m`. That is all an
exact run needs: the target is p(path) exp(r(x_0) / T), the population at hand is p(path) exp(v) with that v, and every
`Potential` multiplies in what lies between, in whatever portions, since it closes on r(x_0) / T - v. At the first level
that is nothing where T_m = T and r / T - r / T_m elsewhere, with nothing to configure. What stays unknown is the
normalizing constant of the tilted prior, and with it that of the run: log_evidence is NaN.

Starts that follow the reward's gradient are in `langevin`, those that only call it in `black_box_starts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..core.diagnostics import split_rhat
from ..core.loop import keeping
from ..core.objective import Objective
from ..core.start import Start
from ..core.trajectory import Trajectory
from ..errors import SteerError
from ..key import Key
from ..types import ReverseProcess
from .tilted_prior import Predictor, TiltedPrior, TiltedState, given, norm, predicting, prior_moments


class MCMCStep(NamedTuple):
    """What is recorded of a step of all chains, [B, C] float64 each."""

    norm: Tensor  # of the proposal's gradient
    rate: Tensor  # probability to accept it
    held: Tensor  # log-tilt of the state after the decision


class Kernel(Protocol):
    """A step of all chains.

    gradient: whether it follows the gradient of the tilt. corrected: whether it leaves the tilted prior as it is.
    calls: predictions of a state that a step makes, at most.
    """

    @property
    def gradient(self) -> bool: ...

    @property
    def corrected(self) -> bool: ...

    @property
    def calls(self) -> int: ...

    def first_size(self, at: TiltedState) -> Any:
        """Log of each problem's step size to begin with, [B] float64; None for a kernel that has none."""
        ...

    def step(self, tilt: TiltedPrior, at: TiltedState, log_size: Any, key: Key) -> tuple[TiltedState, MCMCStep]:
        """The states after a step of that size."""
        ...

    def adapted(self, log_size: Any, rate: Tensor, i: int) -> Any:
        """The same after step i of burn-in, which had that mean rate of acceptance [B]."""
        ...


@dataclass(frozen=True)
class MCMCStart:
    """A start by Markov chains on the tilted prior. Built by `pcnl`, `pcn` and others; `pcnl` says what fields mean."""

    kernel: Kernel
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

    @property
    def lengths(self) -> tuple[int, int]:
        """Steps of burn-in and steps kept; 50 each (the released layout configuration) where nothing says otherwise."""
        return 50 if self.burn_in is None else self.burn_in, 50 if self.kept is None else self.kept

    def rows(self, process: ReverseProcess) -> int:
        """Network rows per problem for one prediction of all chains."""
        return self.chains * (process.rows if self.x0_predictor is None else self.predictor_rows)

    def steps_for(self, process: ReverseProcess, rows: int) -> int:
        """Steps, burn-in and kept together, that so many network rows per problem surely pay for."""
        return (rows // self.rows(process) - 1) // self.kernel.calls

    def prepare(self, process: ReverseProcess, temperature: float) -> tuple[Start, int]:
        """The start at its own or else the run's temperature, and the network rows per problem it spends at most."""
        own = temperature if self.temperature is None else self.temperature
        return replace(self, temperature=own), self.rows(process) * (1 + self.kernel.calls * sum(self.lengths))

    def check(self, process: ReverseProcess, objective: Objective, particles: int) -> None:
        """Raises where the process has no Gaussian prior, or the reward no gradient that is followed."""
        del particles
        prior_moments(process)
        if self.kernel.gradient:
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
            gradient=self.kernel.gradient,
            clip=self.clip,
            key=key,
        )
        rounds = math.ceil(particles / self.chains)
        reached: list[TiltedState] = []
        with keeping(lambda: replace(_population(process, tilt, reached), biased_start=True) if reached else first):
            record, stops, log_size = self._run_chains(tilt, first.x, key.fold("mcmc"), rounds, reached)
        kept = record[-self.lengths[1] :]
        more = {} if log_size is None else {"step_size": log_size.exp()}
        if self.kernel.gradient:
            more["gradient"] = torch.stack([step.norm for step in kept]).mean((0, 2))
        return replace(
            _population(process, tilt, stops, particles),
            biased_start=not self.kernel.corrected,
            diagnostics={
                "acceptance": torch.stack([step.rate for step in kept]).mean((0, 2)),
                "split_rhat": split_rhat(torch.stack([step.held for step in kept], 1)),
                **more,
            },
        )

    def _run_chains(
        self, tilt: TiltedPrior, first: Tensor, key: Key, rounds: int, reached: list[TiltedState]
    ) -> tuple[list[MCMCStep], list[TiltedState], Any]:
        """Every step, the states at the end of each of `rounds` even stretches, and the log of the last step sizes.

        All chains of all problems move in one network call. The device is read once, at the first state. reached: is
        made to hold where the chains are, for an error on the way.
        """
        burn_in, kept = self.lengths
        ends = [burn_in + math.ceil((j + 1) * kept / rounds) - 1 for j in range(rounds)]
        at, x0 = tilt(tilt.units(first))
        tilt.check(at, x0)
        log_size = self.kernel.first_size(at)
        reached[:] = [at]
        record = [always(at)]
        stops: dict[int, TiltedState] = {}
        for i in range(burn_in + kept):
            at, step = self.kernel.step(tilt, at, log_size, key.at(i))
            reached[:] = [at]
            record.append(step)
            if i < burn_in:
                log_size = self.kernel.adapted(log_size, step.rate.mean(1), i)
            if i in ends:
                stops[i] = at._replace(gradient=at.value)  # its gradient is not needed any more
        return record, [stops[i] for i in ends], log_size


def always(at: TiltedState) -> MCMCStep:
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
