"""`steer.second_order`: a second-order stochastic rule with an exact density, and the process that remembers for it.

With lambda = log(alpha / sigma), the reverse SDE of noise tau >= 0 is, in its prediction D,

    dx = [(d log sigma / d lambda - tau^2) x + (1 + tau^2) alpha D] d lambda + sqrt(2) tau sigma dw.

A step of length h = lambda' - lambda solves its linear part exactly and holds D at what the last two predictions say it
is in the middle of the step, with r = lambda_k - lambda_(k-1):

    D   = D_k + h / (2 r) (D_k - D_(k-1))
    x'  = e^(-tau^2 h) sigma' / sigma x + alpha' (1 - e^(-(1 + tau^2) h)) D + sigma' sqrt(1 - e^(-2 tau^2 h)) z

Given x_k and D_(k-1) that is a normal distribution, exactly. The chain is Markov in the pair alone, so the pair is the
state: [B, N, 2, *event], entry 0 of axis 2 the noisy state, entry 1 the prediction of the step before, NaN where there
is none. Whatever moves, copies, stores or sends a state takes both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..cost import Meter
from ..errors import ShapeError, SteerError
from ..key import Key
from ..types import GaussianPath, GaussianTransition, Level, ReverseProcess, Rule
from .delegation import of_base
from .switched import Switched
from .transitions import Normal, keep_marginal

Tau = float | Callable[[Level], float]
"""A number, or a function of the Level that a step leaves."""


def second_order(tau: Tau = 0.5) -> SecondOrder:
    """A second-order rule for any Gaussian path: better samples at few steps, with the exact density of every step.

    Args:
        tau: noise of the steps, >= 0: a number, or a function of the Level that a step leaves. 0 is the ODE, by
            DPM-Solver++ 2M; 1 draws as much noise as ancestral sampling. Methods that resample need some.

    Returns:
        A transition rule, for `transition=` and `process.with_rule`. The process it makes remembers the prediction of
        the step before beside every state, which on the way is [B, N, 2, *event]; samples are [B, N, *event] as ever.

    Raises:
        SteerError: a negative tau.

    Cost: K network rows a chain, as under any rule; twice the memory for states.
    Source: the predictor of SA-Solver (Xue et al. 2023, 2309.05019) at order 2, held at the middle of the step as in
        DPM-Solver++ (Lu et al. 2022, 2211.01095), for any (alpha, sigma).
    Differs: the first step is of first order, and so is the last, to sigma = 0, and the first after states were noised
        back (search.paths, search.depth_first, restarts): what was predicted at a cleaner level is forgotten. No
        corrector. diffusers' SA-Solver replaces a coefficient by its limit for small steps.
    """
    if not callable(tau):
        _checked(tau)
    return SecondOrder(tau)


def _checked(tau: float) -> float:
    if not 0.0 <= tau < math.inf:
        raise SteerError(f"tau is the noise of a step and must be at least 0 and finite, got {tau}; the default is .5")
    return float(tau)


def span(here: Level, there: Level) -> float:
    """lambda' - lambda, the length of a step in the log of signal over noise; infinite from alpha = 0, to sigma = 0."""
    if here.alpha <= 0.0 or there.sigma <= 0.0:
        return math.inf
    return math.log(there.alpha / here.alpha) + math.log(here.sigma / there.sigma)


@dataclass(frozen=True)
class ScaledNoise:
    """The step of the reverse SDE that holds the prediction as it is: of first order, and all of its marginals kept."""

    tau: Tau = 0.5

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> Normal:
        return keep_marginal(x, x0, here, there, self.std(here, there))

    def std(self, here: Level, there: Level) -> float:
        tau = _checked(self.tau(here)) if callable(self.tau) else self.tau
        if tau == 0.0 or there.sigma <= 0.0:
            return 0.0
        return there.sigma * math.sqrt(-math.expm1(-2.0 * tau**2 * span(here, there)))


@dataclass(frozen=True)
class SecondOrder:
    """The rule of `second_order`. Called by itself, it takes the step from a state that remembers nothing."""

    tau: Tau = 0.5

    @property
    def first(self) -> Rule:
        """The rule of a step without a memory, which second-order steps evaluate at another prediction."""
        return ScaledNoise(self.tau)

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> GaussianTransition:
        return self.first(x, x0, here, there)

    def std(self, here: Level, there: Level) -> float:
        return self.first.std(here, there)

    def on(self, process: GaussianPath) -> Any:
        """A process under this rule."""
        return SecondOrderProcess(process.with_rule(self.first), self)


@dataclass(frozen=True, eq=False)
class Remembering:
    """The distribution of a step of which a prediction is remembered: [B, N, 2, *event], drawn in entry 0 alone.

    law:    of the noisy state.
    memory: the prediction that the step was made with, [B, N, *event]; NaN: nothing is to be remembered.
    """

    law: GaussianTransition
    memory: Tensor

    @property
    def mean(self) -> Tensor:
        """Of the noisy state, [B, N, *event]."""
        return self.law.mean

    @property
    def std(self) -> float:
        return self.law.std

    @property
    def stochastic(self) -> bool:
        return self.law.stochastic

    def sample(self, key: Key) -> Tensor:
        return self.beside(self.law.sample(key))

    def beside(self, x: Tensor) -> Tensor:
        """Noisy states [B, N, *event] with what is remembered."""
        return torch.stack([x, self.memory.to(x.dtype)], 2)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.law.log_prob(self._noisy(x))

    def shift(self, delta: Tensor) -> Remembering:
        """The noisy state moved, by delta of its shape or of the whole state's; what is remembered is the model's."""
        return replace(self, law=self.law.shift(self._noisy(delta)))

    def _noisy(self, x: Tensor) -> Tensor:
        return x[:, :, 0] if x.ndim > self.memory.ndim else x


def normal_of(step: Any) -> Normal | None:
    """The normal distribution that a step draws the noisy state from; None where it is drawn by another."""
    law = step.law if isinstance(step, Remembering) else step
    return law if isinstance(law, Normal) else None


def beside(step: Any, x: Tensor) -> Tensor:
    """The states that noisy ones [B, N, *event], drawn from a step, stand for."""
    return step.beside(x) if isinstance(step, Remembering) else x


@dataclass(frozen=True, eq=False)
class SecondOrderProcess:
    """A process whose states hold the prediction of the step before. Made by `process.with_rule(second_order())`.

    base:     the model under the rule's first-order step: a GaussianProcess, or one that is guided or goes back.
    rule:     what extrapolates.

    States at a level before the last are [B, N, 2, *event]; clean ones have nothing to remember: [B, N, *event].
    Predictions, hooks, rewards and decoders see noisy or clean states alone.
    """

    base: GaussianPath
    rule: SecondOrder

    steps = of_base("steps")
    event = of_base("event")
    problems = of_base("problems")
    prompts = of_base("prompts")
    rows = of_base("rows")
    rows_at = of_base("rows_at")
    meter = of_base("meter")
    levels = of_base("levels")
    times = of_base("times")
    schedule = of_base("schedule")
    reference = of_base("reference")
    device = of_base("device")
    dtype = of_base("dtype")
    decoder = of_base("decoder")
    denoiser = of_base("denoiser")
    key = of_base("key")
    visits = of_base("visits")
    text = of_base("text")
    hooks = of_base("hooks")
    log = of_base("log")
    prior_moments = of_base("prior_moments")
    returns = of_base("returns")

    def __repr__(self) -> str:
        return f"SecondOrderProcess({self.rule} on {self.base})"

    # -- states

    def noisy(self, x: Tensor) -> Tensor:
        """The noisy states alone, [B, N, *event], of states with or without what they remember."""
        return x[:, :, 0] if x.ndim > 2 + len(self.event) else x

    def begun(self, x: Tensor) -> Tensor:
        """Noisy states [B, N, *event] that remember nothing, [B, N, 2, *event]: their first step is of first order."""
        return torch.stack([x, torch.full_like(x, math.nan)], 2)

    def recalled(self, x: Tensor, before: Tensor, k: int) -> Tensor:
        """States at level k of noisy ones x and those before them, [B, N, *event]: predicted anew where it matters."""
        if self._factors[k] == 0.0:
            return self.begun(x)
        return torch.stack([x, self.complete(before, self.denoise(before, k - 1))], 2)

    def state_shape(self, k: int) -> tuple[int, ...]:
        """Shape of a state at level k."""
        return self.event if k == self.steps else (2, *self.event)

    # -- the chain

    def prior(self, key: Key, batch: int, particles: int) -> Tensor:
        return self.begun(self.base.prior(key, batch, particles))

    def denoise(self, x: Tensor, k: int, key: Key | None = None) -> Tensor:
        return self.base.denoise(self.noisy(x), k, key)

    def complete(self, x: Tensor, x0: Tensor) -> Tensor:
        return self.base.complete(self.noisy(x), x0)

    def transition(self, x: Tensor, x0: Tensor, k: int) -> GaussianTransition:
        """The step from level k: the first-order rule's, from the prediction extrapolated to the middle of it."""
        if tuple(x.shape[2:]) != self.state_shape(k):
            raise ShapeError(
                f"a state at level {k} of {self.steps} holds what it remembers: (B, N, 2, *event) with event "
                f"{tuple(self.event)}, got {tuple(x.shape)}; move states by the model's own transition "
                "(model.shift(delta)), or begin from noisy ones alone by process.begun(x)"
            )
        noisy, memory = x.unbind(2)
        clean = self.base.complete(noisy, x0)
        law = self.base.transition(noisy, self._extrapolated(clean, memory, x0, k), k)
        if k + 1 == self.steps:
            return law
        return Remembering(law, torch.full_like(clean, math.nan) if self._goes_back(k) else clean)

    def stochastic(self, k: int) -> bool:
        return self.base.stochastic(k)

    def noise(self, x: Tensor, k_from: int, k_to: int, key: Key) -> Tensor:
        """States noised back, which remember nothing."""
        return x if k_from == k_to else self.begun(self.base.noise(self.noisy(x), k_from, k_to, key))

    def decode(self, x: Tensor) -> Tensor:
        return self.base.decode(self.noisy(x))

    def _extrapolated(self, clean: Tensor, memory: Tensor, x0: Tensor, k: int) -> Tensor:
        """Predictions x0 with their clean states moved on by the factor of the step, where something is remembered."""
        factor = self._factors[k]
        if factor == 0.0:
            return x0
        wide = torch.promote_types(clean.dtype, torch.float32)  # the two are close: their difference would be rounded
        now, before = clean.to(wide), memory.to(wide)
        ahead = (now + factor * (now - torch.where(before.isnan(), now, before))).to(clean.dtype)
        # Mean hooks put the displacement of the mean beside the prediction.
        return torch.cat([ahead[:, :, None], x0[:, :, 1:]], 2) if x0.ndim > clean.ndim else ahead

    @cached_property
    def _factors(self) -> list[float]:
        """h / 2r of the step from every level; 0 where it is of first order."""
        return [self._factor(k) for k in range(self.steps)]

    def _factor(self, k: int) -> float:
        if k == 0 or self._goes_back(k - 1):
            return 0.0
        before, here, there = self.levels[k - 1 : k + 2]
        if self._switches(before, here):
            return 0.0
        if self._goes_back(k):  # down to the next level first
            there = max((level for level in self.levels if level.t < here.t), key=lambda level: level.t)
        length, since = span(here, there), span(before, here)
        return 0.5 * length / since if math.isfinite(length) else 0.0

    def _switches(self, before: Level, here: Level) -> bool:
        """Whether another model predicts there: the slope would be a difference of two models."""
        denoiser = getattr(self.base, "denoiser", None)
        return isinstance(denoiser, Switched) and denoiser.at(before.t) is not denoiser.at(here.t)

    def _goes_back(self, k: int) -> bool:
        """Whether the step from level k ends at one no less noisy."""
        return self.levels[k + 1].t >= self.levels[k].t

    # -- other processes made of it

    def around(self, change: Callable[[Any], Any]) -> SecondOrderProcess:
        """The same rule around another base."""
        return replace(self, base=change(self.base))

    def metered(self, meter: Meter) -> SecondOrderProcess:
        return self.around(lambda base: base.metered(meter))

    def only(self, problem: int) -> SecondOrderProcess:
        return self.around(lambda base: base.only(problem))

    def with_rule(self, rule: Rule) -> Any:
        """The base under another rule, which remembers nothing unless it is one of second order itself."""
        return self.base.with_rule(rule)

    def with_times(self, times: Sequence[float]) -> SecondOrderProcess:
        return self.around(lambda base: base.with_times(times))

    def exact(self, reward: Any, temperature: float = 1.0) -> Any:
        return self.base.exact(reward, temperature)


# -- states of any process


def model_of(process: Any) -> Any:
    """The process of noisy states alone: the base of one whose steps remember, else the process itself."""
    return process.base if isinstance(process, SecondOrderProcess) else process


def noisy(process: ReverseProcess, x: Tensor) -> Tensor:
    """States [B, N, *event] without what they remember."""
    return process.noisy(x) if isinstance(process, SecondOrderProcess) else x


def begun(process: ReverseProcess, x: Tensor) -> Tensor:
    """The states of a process that noisy ones [B, N, *event] are the beginning of: nothing is remembered yet."""
    return process.begun(x) if isinstance(process, SecondOrderProcess) else x


def beginning(process: ReverseProcess, law: Normal) -> Normal | Remembering:
    """The distribution of states whose noisy part is drawn from a normal one, and that remember nothing yet."""
    return Remembering(law, torch.full_like(law.mean, math.nan)) if isinstance(process, SecondOrderProcess) else law


def state_shape(process: ReverseProcess, k: int) -> tuple[int, ...]:
    """Shape of one state of a process at level k."""
    return process.state_shape(k) if isinstance(process, SecondOrderProcess) else tuple(process.event)
