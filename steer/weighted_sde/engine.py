"""The weighted SDE: one loop for Feynman-Kac correctors, DriftLite and everything between.

The path of targets is pi_t(x), proportional to prod_i q_i(x)^a_i exp(rho(x, t)), with models q_i, S its score, A the
sum of the exponents, and rho the value of a state. In sampling time, towards data, with forward drift f and diffusion
g of the models' path, particles move with any noise V^2 = v g^2 and any further drift b,

    dx = [ -f + (g^2 + V^2) S / 2 + b ] dt + V dw,                                                               (1)

and gain log-weight, which does not depend on V,

    { (A - 1) div f + g^2 / 2 (|S|^2 - sum_i a_i |s_i|^2 + lap rho) - f . grad rho + d_t rho + sum_i a_i' log q_i
      + b . S + div b } dt,                                                                                      (2)

where d_t rho is at fixed x. Sources: Skreta et al. 2025 (Feynman-Kac Correctors, 2503.02819), Props. 3.1 to 3.4; Ren
et al. 2025 (DriftLite, 2509.21655), Eq. 2.1 and Prop. 3.1. Derivation: subtract the Fokker-Planck operator of (1),
divided by pi, from d_t log pi, in which d_t log q = div f + f . s - g^2 / 2 (lap log q + |s|^2); lap log q cancels.

With v = 1 there is a weight without derivatives of rho: the ratio of the composite of the models' own reverse kernels
to what was drawn from (`KernelRatio`).

The last step, to sigma = 0, is the prediction sum_i a_i x0_i / A without noise, as in every other sampler of this
library. Its weight is (2) for the models, and r(x_0) / temperature less what was counted of rho so far, with no
derivative. Both are off by O(sigma^2) of the last noisy level, which the time grid chooses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.trajectory import Trajectory, required
from ..key import Key
from ..particles.potentials import Potential
from ..processes.transitions import Normal
from ..types import Level
from .composite import Composite
from .derivatives import Evaluation, RequiredDerivatives, ValueDerivatives
from .step_integrals import StepIntegrals, span
from .transports import REWARD, ControlBasis, Transport


@dataclass(frozen=True)
class KernelRatio:
    """Weights by ratios of transition densities: no derivative of the reward enters. For v = 1 and no control.

    Every model's reverse kernel is F_i = N((x + Gamma s_i) / ratio, fade Gamma / ratio^2), whose mean is exact;
    particles are drawn from their composite, prod_i F_i^a_i B^(1 - A) with B the noising kernel, moved along grad rho.

    Source: TDS (Wu et al. 2023) for one model; RNE (2506.05668) for composites.
    """


@dataclass(frozen=True)
class FeynmanKac:
    """Weights by (2) of this module, for any noise and drift.

    Its d_t rho costs one more prediction per state where rho needs one.

    probes: Rademacher probes (Hutchinson) for divergences where they are needed, one backward pass each; None sums over
    all coordinates, which is exact. The noise of probes enters the exponent of the weights.
    """

    probes: int | None = None


Noise = float | Callable[[Level, Level], float]
"""v, what is injected over what the models' own SDE injects: a number, or a function of a step's two levels."""


class Terms(NamedTuple):
    """The parts of (2) with b = 0, each integrated over a step: a number, and [B, N]."""

    normaliser: float  # (A - 1) div f
    models: Tensor  # g^2 / 2 (|S_q|^2 - sum a |s|^2)
    cross: Tensor  # g^2 / 2 (|grad rho|^2 + 2 S_q . grad rho)
    laplacian: Tensor  # g^2 / 2 lap rho
    advection: Tensor  # -f . grad rho
    partial: Tensor  # d_t rho
    exponents: Tensor  # sum a' log q

    def total(self) -> Tensor:
        """What a step adds to the log-weight, [B, N]."""
        first, *rest = self
        return sum(rest, torch.zeros_like(self.models)) + first


@dataclass(frozen=True, eq=False)
class WeightedSDE:
    """A run's choices, and its steps as methods on a Trajectory. Run by `weighted_loop`."""

    target: Composite
    derivatives: ValueDerivatives
    transport: Transport
    weight: KernelRatio | FeynmanKac
    noise: Noise
    potential: Potential
    active: tuple[float, float] | None
    sigma_data: float
    key: Key

    @property
    def valued(self) -> bool:
        return self.derivatives.objective is not None

    @property
    def tracks_log_q(self) -> bool:
        return self.target.varying or self.transport.potentials

    def v(self, k: int) -> float:
        """Injected noise over the models' own, in the step from level k; 0 in the last."""
        if self.last(k):
            return 0.0
        return self.noise(self.target.levels[k], self.target.levels[k + 1]) if callable(self.noise) else self.noise

    def span(self, k: int) -> StepIntegrals:
        """Integrated coefficients of the step from level k."""
        return span(self.target.levels[k], self.target.levels[k + 1], self.sigma_data)

    def last(self, k: int) -> bool:
        """Whether the step from level k is the one to the data."""
        return k == self.target.steps - 1

    def theta(self, k: int, like: Tensor) -> Tensor:
        """Coefficients [B, 3] of the transport at level k before control, for log-weights like [B, N]."""
        return self.transport.start(k, self.target.total(k), self.v(k), like)

    def needs(self, k: int) -> RequiredDerivatives:
        """What this run has to know of a population at level k."""
        free = self.transport.control is not None or self.transport.memory is not None
        along_reward, along_score, _ = self.transport.theta(self.target.total(k), self.v(k))
        if isinstance(self.weight, KernelRatio):
            pushed = self.valued and not self.last(k) and self.push(k) != 0.0
            valued = pushed or (self.valued and self.potential.active(k, self.target.steps))
            return RequiredDerivatives(value=valued, gradient=pushed, laplacian=False, divergence=False)
        if self.last(k):
            return RequiredDerivatives(value=self.valued, gradient=False, laplacian=False, divergence=False)
        # b = -g^2 grad rho / 2 takes the Laplacian out of (2); a drift without S_q needs no divergence of it.
        return RequiredDerivatives(
            value=self.valued,
            gradient=self.valued,
            laplacian=self.valued and (free or along_reward != -1.0),
            divergence=free or along_score != 0.0,
        )

    def push(self, k: int) -> float:
        """How much of the gradient of rho the kernel's proposal follows: 1, 1/2 and 0 for score, half and base."""
        return 1.0 + 0.5 * self.transport.theta(self.target.total(k), 1.0)[REWARD]

    def evaluate(self, state: Trajectory, point: Evaluation | None = None) -> tuple[Trajectory, Tensor, Tensor]:
        """The state weighted by its value and ready to move; its scores [B, N]; theta [B, 3], zero without a drift.

        point: its evaluation, where `settled` has made it.
        """
        k, needs = state.k, self.needs(state.k)
        point = point or self.derivatives(state.x, k, needs)
        if needs.value and (isinstance(self.weight, FeynmanKac) or self.potential.active(k, self.target.steps)):
            state = self.potential.apply(state, point.value)
        exponent = _exponent(state)
        state = state.with_step_cache(x0=point.x0, score=point.reward if needs.value else None)
        nowhere = state.log_weight.new_zeros(state.log_weight.shape[0], 3)
        if self.tracks_log_q or isinstance(self.weight, KernelRatio):
            state = state.with_step_cache(components=point.components)
        if self.last(k):
            return self.weighted(state, self.model_terms(state, point).total()), point.reward, nowhere
        if isinstance(self.weight, KernelRatio):
            push = self.push(k) * exponent[..., None] * point.gradient
            return state.with_step_cache(push=push), point.reward, nowhere
        later = self.derivatives.later_value(state.x, point.x0, k) if self.valued else point.value
        partial = exponent * (later - point.value)
        point = point.tempered(exponent)
        state, theta = self.drift(state, point, self.terms(state, point, partial))
        return state, point.reward, theta

    def model_terms(self, state: Trajectory, point: Evaluation) -> Terms:
        """The parts of (2) that come from the models, for the step from a state."""
        target, k, step = self.target, state.k, self.span(state.k)
        power, total = point.components.new_tensor(target.at(k)), target.total(k)
        # |S|^2 - sum a |s|^2 through the average score: differences of models are not lost among large numbers.
        apart = (point.components - point.score[:, :, None] / total).square().sum(3) @ power
        rate = 0.5 * (step.gamma if self.last(k) else step.rate)
        models = rate * ((1.0 - 1.0 / total) * point.score.square().sum(2) - apart)
        nothing = torch.zeros_like(models)
        change = nothing
        if target.varying:
            change = required(state.path.log_q) @ (power.new_tensor(target.at(k + 1)) - power)
        normaliser = (total - 1.0) * point.score.shape[2] * step.log_ratio
        return Terms(
            normaliser=normaliser,
            models=models,
            cross=nothing,
            laplacian=nothing,
            advection=nothing,
            partial=nothing,
            exponents=change,
        )

    def terms(self, state: Trajectory, point: Evaluation, partial: Tensor) -> Terms:
        """The parts of (2) with b = 0 for the step from a state; partial is d_t rho over the step."""
        step, gradient = self.span(state.k), point.gradient
        return self.model_terms(state, point)._replace(
            cross=0.5 * step.rate * (gradient.square().sum(2) + 2.0 * (point.score * gradient).sum(2)),
            laplacian=0.5 * step.rate * point.laplacian,
            advection=-step.log_ratio * (state.x.double().flatten(2) * gradient).sum(2),
            partial=partial,
        )

    def fields(self, state: Trajectory, point: Evaluation, gain: Tensor) -> ControlBasis:
        """Bases and their costs for a control; gain is (2) with b = 0 over a step, [B, N]."""
        x = state.x.double().flatten(2)
        bases = torch.stack([point.gradient, point.score, x], 2)
        size = torch.full_like(point.divergence, float(x.shape[2]))
        divergence = torch.stack([point.laplacian, point.divergence, size], 2)
        cost = torch.einsum("bnjd,bnd->bnj", bases, point.score + point.gradient) + divergence
        potentials = None
        if self.transport.potentials:
            log_q = required(state.path.log_q) @ point.components.new_tensor(self.target.at(state.k))
            potentials = torch.stack([point.value, log_q, 0.5 * x.square().sum(2)], 2)
        rate = gain / (0.5 * self.span(state.k).rate)
        return ControlBasis(bases=bases, cost=cost, rate=rate, potentials=potentials)

    def drift(self, state: Trajectory, point: Evaluation, terms: Terms) -> tuple[Trajectory, Tensor]:
        """The state with its Feynman-Kac weight, carrying the direction u of the drift g^2 u / 2; and theta."""
        k, gain = state.k, terms.total()
        fields = self.fields(state, point, gain)
        theta = self.theta(k, state.log_weight)
        if self.transport.control is not None:
            theta = theta + self.transport.control(fields, state.log_weight, theta)
        gain = gain + 0.5 * self.span(k).rate * (fields.cost * theta[:, None]).sum(2)
        direction = (1.0 + self.v(k)) * (point.score + point.gradient)
        direction = direction + torch.einsum("bj,bnjd->bnd", theta, fields.bases)
        return self.weighted(state, gain).with_step_cache(direction=direction), theta

    def weighted(self, state: Trajectory, gain: Tensor) -> Trajectory:
        """The state with a step's weight; outside an active interval, without."""
        inside = self.active is None or self.active[0] <= self.target.levels[state.k].t <= self.active[1]
        return state.reweight(gain) if inside else state

    def euler(self, state: Trajectory) -> Normal:
        """Where (1) goes from a state that carries its drift."""
        k, x, step, total = state.k, state.x, self.span(state.k), self.target.total(state.k)
        v = self.v(k)
        pull = 1.0 + v * total if self.transport.flow else (1.0 + v) * total
        y = 0.5 * step.drift(pull) * required(state.cache.direction).view(x.shape)
        return Normal(((x + y) / step.ratio).to(x.dtype), math.sqrt(step.noise(pull, v)) / step.ratio)

    def composite_kernel(self, state: Trajectory) -> Normal:
        """prod_i F_i^a_i B^(1 - A), moved along the gradient of rho."""
        k, x, step, total = state.k, state.x, self.span(state.k), self.target.total(state.k)
        variance = step.gamma / (total / step.fade - total + 1.0)
        score = torch.einsum("bnid,i->bnd", required(state.cache.components), x.new_tensor(self.target.at(k)).double())
        y = variance * (score / step.fade + required(state.cache.push)).view(x.shape)
        return Normal(((x + y) / step.ratio).to(x.dtype), math.sqrt(variance) / step.ratio)

    def step(self, state: Trajectory) -> Trajectory:
        """The state one level on, with the weight and the log q that the step adds."""
        noise = self.key.fold("step")
        if self.last(state.k):
            return state.step(Normal(required(state.cache.x0), 0.0), noise)
        if isinstance(self.weight, FeynmanKac):
            after = state.step(self.euler(state), noise)
            return self.followed(state, after)[0] if self.tracks_log_q else after
        kernel, powers = self.composite_kernel(state), self.target.at(state.k)
        after, forward, backward = self.followed(state, state.step(kernel, noise))
        gain = forward @ forward.new_tensor(powers) + (1.0 - math.fsum(powers)) * backward - kernel.log_prob(after.x)
        if self.target.varying:
            change = forward.new_tensor(self.target.at(after.k)) - forward.new_tensor(powers)
            gain = gain + required(after.path.log_q) @ change
        return replace(self.weighted(replace(after, k=state.k), gain), k=after.k)

    def settled(self, state: Trajectory) -> tuple[Trajectory, Evaluation | None]:
        """A state just stepped to, with what of the reward is in its weight as a number; and its evaluation, if made.

        A Feynman-Kac step counts rho up to the state that it leads to. What that is has to be said here, in the terms
        of this run: whoever goes on from the state may have another reward, temperature, tempering or weight.
        """
        if not self.valued or isinstance(self.weight, KernelRatio) or state.k == self.target.steps:
            return state, None
        point = self.derivatives(state.x, state.k, self.needs(state.k))
        return state.with_path_state(log_potential=_exponent(state) * point.value), point

    def followed(self, before: Trajectory, after: Trajectory) -> tuple[Trajectory, Tensor, Tensor]:
        """A step made: the state with log q_i moved on, log F_i [B, N, I] and log B [B, N] of it.

        log q_i(x') - log q_i(x) = log F_i(x' | x) - log B(x | x') where F_i is the exact reverse kernel: the Ito
        estimator of SuperDiff (Skreta et al. 2025, 2412.17762), for noise v = 1.
        """
        step, x = self.span(before.k), before.x
        std = math.sqrt(step.gamma * step.fade) / step.ratio
        forward = torch.stack(
            [
                Normal(((x + step.gamma * s.view(x.shape)) / step.ratio).to(x.dtype), std).log_prob(after.x)
                for s in required(before.cache.components).unbind(2)
            ],
            2,
        )
        backward = Normal(step.ratio * after.x, math.sqrt(step.gamma)).log_prob(x)
        if self.tracks_log_q:
            after = after.with_path_state(log_q=required(before.path.log_q) + forward - backward[..., None])
        return after, forward, backward


def _exponent(state: Trajectory) -> Tensor:
    """Exponent of the tempered value, [B, N]."""
    return torch.ones_like(state.log_weight) if state.path.exponent is None else state.path.exponent
