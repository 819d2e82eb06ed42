"""Laws of steps as collectors need them: mixed stochastic and deterministic, rounded as they are stored, described."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..key import Key
from ..processes import parameterization
from ..processes.gaussian import GaussianProcess, need_gaussian_process
from ..processes.transitions import DDIM, ClippedPrediction, TransformedTransition
from ..types import Denoiser, GaussianTransition, Level, ReverseProcess, Rule


@dataclass(frozen=True, eq=False)
class Mixed:
    """One law for some particles and its deterministic twin for the others; noisy_at (B, N) says which.

    The density is that of what was drawn: zero (log of one) where nothing was.
    """

    noisy: GaussianTransition
    still: GaussianTransition
    noisy_at: Tensor

    @property
    def stochastic(self) -> bool:
        """Whether the noisy law is."""
        return self.noisy.stochastic

    def sample(self, key: Key) -> Tensor:
        """One draw per particle, the deterministic state elsewhere."""
        where = self.noisy_at.view(*self.noisy_at.shape, *(1 for _ in self.noisy.mean.shape[2:]))
        return torch.where(where, self.noisy.sample(key), self.still.sample(key))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of what was drawn, (B, N)."""
        return torch.where(self.noisy_at, self.noisy.log_prob(x), 0.0)


@dataclass(frozen=True, eq=False)
class Siblings:
    """A law whose draws share noise by families of `ways` neighbours: (common + spread * own) / sqrt(1 + spread^2).

    Unit variance, so that each draw alone follows the law, and its density is the law's. Source: the paper's form of
    BranchGRPO's branch noise; its released code adds the shared part unscaled and scores it as if it had not.
    """

    law: GaussianTransition
    ways: int
    spread: float
    storage: torch.dtype

    @property
    def stochastic(self) -> bool:
        """As the law itself."""
        return self.law.stochastic

    def sample(self, key: Key) -> Tensor:
        """One draw per particle; families are neighbours on axis 1."""
        mean = self.law.mean
        own = key.normal(mean.shape, dtype=mean.dtype, device=mean.device)
        shape = (mean.shape[0], mean.shape[1] // self.ways, *mean.shape[2:])
        common = key.fold("family").normal(shape, dtype=mean.dtype, device=mean.device)
        noise = (common.repeat_interleave(self.ways, 1) + self.spread * own) / (1.0 + self.spread**2) ** 0.5
        return rounded(torch.add(mean, noise, alpha=self.law.std), self.storage)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of each draw, (B, N)."""
        return self.law.log_prob(x)


@dataclass(frozen=True)
class Windowed:
    """A rule at some times of the grid and its ODE at the others."""

    rule: Rule
    times: frozenset[float]

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> GaussianTransition:
        return self._at(here)(x, x0, here, there)

    def std(self, here: Level, there: Level) -> float:
        return self._at(here).std(here, there)

    def _at(self, here: Level) -> Rule:
        return self.rule if here.t in self.times else ode_of(self.rule)


def ode_of(rule: Rule) -> Rule:
    """The deterministic rule to go with a stochastic one: the flow's ODE, with its clipping where it clips."""
    return ClippedPrediction(DDIM(0.0), rule.limit) if isinstance(rule, ClippedPrediction) else DDIM(0.0)


def stored_as(process: GaussianProcess, dtype: torch.dtype) -> GaussianProcess:
    """The process on states rounded to a storage dtype, before every prediction and after every draw.

    What is stored is then what the chain went on from, and the densities of stored states are exact.
    """
    if process.dtype == dtype:
        return process
    return replace(process, denoiser=_RoundedDenoiser(process.denoiser, dtype), rule=_RoundedRule(process.rule, dtype))


def rounded(x: Tensor, storage: torch.dtype) -> Tensor:
    """States in their dtype, with the values that a storage dtype has for them."""
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


def describe(process: GaussianProcess, *, window: Any = None, storage: torch.dtype | None = None) -> Mapping[str, Any]:
    """What draws a process's steps, in plain types; "hash" is of all that changes a density but the network."""
    rule = process.rule
    full = repr((rule, process.schedule, process.times))
    schedule, settings = repr(process.schedule), getattr(rule, "__dict__", {}).items()
    return {
        "rule": type(rule).__name__,
        "parameters": {
            name: value if isinstance(value, int | float | str) else repr(value) for name, value in settings
        },
        "schedule": schedule if len(schedule) < 200 else type(process.schedule).__name__,
        "times": tuple(process.times),
        "window": repr(window),
        "storage": str(storage).removeprefix("torch."),
        "hash": hashlib.blake2b(full.encode(), digest_size=8).hexdigest(),
    }


def need_policy(process: ReverseProcess) -> GaussianProcess:
    """The process, where it is one whose denoiser and rule this package can wrap; StateSpaceError otherwise."""
    return need_gaussian_process(
        process,
        "a rollout for GRPO",
        cure="open the model by steer.from_pipeline, steer.from_velocity or another of the from_ functions",
    )
