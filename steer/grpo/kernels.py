"""Transitions as collectors need them: stochastic in some rows only, with correlated noise, rounded to a dtype."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..key import Key
from ..processes import parameterization
from ..processes.gaussian import GaussianProcess, need_gaussian_process
from ..processes.second_order import SecondOrder, SecondOrderProcess, Tau, beside
from ..processes.transitions import DDIM, ClippedPrediction, TransformedTransition
from ..torch_modes import autocast_of
from ..types import Denoiser, GaussianTransition, Level, ReverseProcess, Rule


@dataclass(frozen=True, eq=False)
class StochasticInSomeRows:
    """A transition that draws noise for some particles and takes the ODE's step for the others.

    noisy:    the stochastic transition, of all particles.
    ode:      the deterministic one, of all particles.
    noisy_at: [P, N] bool, which particles take the stochastic one.

    The log-density is that of what was drawn: 0 where nothing was.
    """

    noisy: GaussianTransition
    ode: GaussianTransition
    noisy_at: Tensor

    @property
    def stochastic(self) -> bool:
        """Whether the stochastic transition adds noise."""
        return self.noisy.stochastic

    def sample(self, key: Key) -> Tensor:
        """States [P, N, *event]: a draw where `noisy_at`, the ODE's state elsewhere."""
        drawn = self.noisy.sample(key)
        where = self.noisy_at.view(*self.noisy_at.shape, *(1 for _ in drawn.shape[2:]))
        return torch.where(where, drawn, self.ode.sample(key))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of x, [P, N] float64; 0 where nothing was drawn."""
        return torch.where(self.noisy_at, self.noisy.log_prob(x), 0.0)


@dataclass(frozen=True, eq=False)
class CorrelatedSiblings:
    """A transition whose noise is correlated between siblings: (common + spread * own) / sqrt(1 + spread^2).

    base:    the transition of all particles; siblings are `ways` neighbours on axis 1.
    ways:    number of siblings of a family.
    spread:  of the noise of one's own, relative to the noise that a family shares.
    storage: dtype that draws are rounded to.

    The noise has unit variance, so each draw on its own is distributed as `base`, and its density is that of `base`.
    Source: the formula in the BranchGRPO paper; its released code adds the shared part unscaled and computes the
    density as if it had not.
    """

    base: GaussianTransition
    ways: int
    spread: float
    storage: torch.dtype

    @property
    def stochastic(self) -> bool:
        """As the base transition."""
        return self.base.stochastic

    def sample(self, key: Key) -> Tensor:
        """One draw per particle, [P, N, *event]."""
        mean = self.base.mean
        own = key.normal(mean.shape, dtype=mean.dtype, device=mean.device)
        shape = (mean.shape[0], mean.shape[1] // self.ways, *mean.shape[2:])
        common = key.fold("family").normal(shape, dtype=mean.dtype, device=mean.device)
        noise = (common.repeat_interleave(self.ways, 1) + self.spread * own) / (1.0 + self.spread**2) ** 0.5
        return beside(self.base, rounded(torch.add(mean, noise, alpha=self.base.std), self.storage))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of each draw, [P, N] float64."""
        return self.base.log_prob(x)


@dataclass(frozen=True)
class Windowed:
    """A transition rule at some times of the grid, and the ODE at the others.

    rule:  the stochastic rule. times: the times at which it is used.
    """

    rule: Rule
    times: frozenset[float]

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> GaussianTransition:
        return self._at(here)(x, x0, here, there)

    def std(self, here: Level, there: Level) -> float:
        return self._at(here).std(here, there)

    def _at(self, here: Level) -> Rule:
        return self.rule if here.t in self.times else ode_of(self.rule)


@dataclass(frozen=True)
class WindowedTau:
    """The tau of a second-order rule at some times of the grid, and 0, the ODE's, at the others."""

    tau: Tau
    times: frozenset[float]

    def __call__(self, here: Level) -> float:
        if here.t not in self.times:
            return 0.0
        return self.tau(here) if callable(self.tau) else self.tau


def windowed(rule: Rule, times: frozenset[float]) -> Rule:
    """A stochastic rule at some times of the grid, and its ODE at the others."""
    return SecondOrder(WindowedTau(rule.tau, times)) if isinstance(rule, SecondOrder) else Windowed(rule, times)


def ode_of(rule: Rule) -> Rule:
    """The ODE's rule in place of a stochastic one; predictions are clipped where those of the stochastic one are."""
    if isinstance(rule, SecondOrder):
        return SecondOrder(0.0)
    return ClippedPrediction(DDIM(0.0), rule.limit) if isinstance(rule, ClippedPrediction) else DDIM(0.0)


def stored_as(process: GaussianProcess, dtype: torch.dtype) -> GaussianProcess:
    """The process on states rounded to a storage dtype, before every prediction and after every draw.

    The chain then continues from exactly the states that are stored, so the densities of stored states are exact.
    """
    if process.dtype == dtype:
        return process
    if isinstance(process, SecondOrderProcess):  # what is remembered follows from the states before, as they are stored
        return cast(Any, process.around(lambda base: stored_as(base, dtype)))
    return replace(process, denoiser=_RoundedDenoiser(process.denoiser, dtype), rule=_RoundedRule(process.rule, dtype))


def rounded(x: Tensor, storage: torch.dtype) -> Tensor:
    """States rounded to the values of a storage dtype, in the dtype that they had."""
    return x.to(storage).to(x.dtype)


@dataclass(frozen=True, eq=False)
class _RoundedDenoiser:
    denoiser: Denoiser
    storage: torch.dtype

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return self.denoiser(rounded(x, self.storage), t)

    def only(self, problem: int) -> _RoundedDenoiser:
        return replace(self, denoiser=parameterization.only(self.denoiser, problem))


@dataclass(frozen=True, eq=False)
class _RoundedRule:
    rule: Rule
    storage: torch.dtype

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> TransformedTransition:
        return TransformedTransition(
            self.rule(rounded(x, self.storage), x0, here, there), partial(rounded, storage=self.storage)
        )

    def std(self, here: Level, there: Level) -> float:
        return self.rule.std(here, there)


def describe_kernel(
    process: GaussianProcess, *, window: Any = None, storage: torch.dtype | None = None
) -> Mapping[str, Any]:
    """What draws the steps of a process, in plain types: `RolloutBatch.kernel`.

    "hash" covers everything that changes a density except the network: rule, schedule, times, and the autocast that the
    network is called in.
    """
    rule, autocast = process.rule, autocast_of(process.device)
    full = repr((rule, process.schedule, process.times, autocast))
    schedule, settings = repr(process.schedule), getattr(rule, "__dict__", {}).items()
    return {
        "rule": type(rule).__name__,
        "parameters": {
            name: value if isinstance(value, int | float | str) else repr(value) for name, value in settings
        },
        "schedule": schedule if len(schedule) < 200 else type(process.schedule).__name__,
        "times": tuple(process.times),
        "autocast": autocast,
        "window": repr(window),
        "storage": str(storage).removeprefix("torch."),
        "hash": hashlib.blake2b(full.encode(), digest_size=8).hexdigest(),
    }


def need_policy(process: ReverseProcess) -> GaussianProcess:
    """The process, where it is one whose denoiser and rule this package can wrap; StateSpaceError otherwise."""
    if isinstance(process, SecondOrderProcess):
        return cast(Any, process.around(need_policy))
    return need_gaussian_process(
        process,
        "a rollout for GRPO",
        cure="open the model by steer.from_pipeline, steer.from_velocity or another of the from_ functions",
    )
