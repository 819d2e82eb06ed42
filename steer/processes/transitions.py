"""Transition rules: how a step is drawn between two levels of a Gaussian path.

Every rule is a small frozen value that works with any Gaussian process, and gives the exact distribution of its step.
Two families cover them all. *Marginal-keeping* rules re-noise the prediction,

    x' = alpha' x0 + sqrt(sigma'^2 - std^2) eps + std z,       eps = (x - alpha x0) / sigma,

and differ only in std (DDIM, CPS, churn). *Euler-Maruyama* rules discretise the reverse SDE

    dx = (u - g^2 s / 2) dt + g dw

with velocity u, score s and any diffusion coefficient g (Flow-SDE, Dance-SDE).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NotStochasticError, SteerError
from ..key import Key
from ..types import GaussianTransition, Level

_LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True, eq=False)
class Normal:
    """The distribution N(mean, std^2 I) of a step; mean has shape [B, N, *event]."""

    mean: Tensor
    std: float

    @property
    def stochastic(self) -> bool:
        """Whether std > 0."""
        return self.std > 0.0

    def sample(self, key: Key) -> Tensor:
        """One draw per particle, named by the key; the mean itself where std = 0."""
        if self.std == 0.0:
            return self.mean
        noise = key.normal(self.mean.shape, dtype=self.mean.dtype, device=self.mean.device)
        return torch.add(self.mean, noise, alpha=self.std)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density summed over the event, shape [B, N], float64."""
        if self.std == 0.0:
            raise NotStochasticError(
                "a step with std = 0 has no density; use a stochastic rule such as steer.ddim(eta=1.0), "
                "or leave this step out"
            )
        residual = (x - self.mean).double().reshape(*x.shape[:2], -1)
        size = residual.shape[2]
        return residual.square().sum(2) * (-0.5 / self.std**2) - size * (math.log(self.std) + 0.5 * _LOG_2PI)

    def shift(self, delta: Tensor) -> Normal:
        """The distribution of the step moved by delta."""
        return Normal(self.mean + delta, self.std)


@dataclass(frozen=True, eq=False)
class TransformedTransition:
    """A transition whose draws [B, N, *event] go through a function before anyone sees them; all else is its own."""

    law: GaussianTransition
    change: Callable[[Tensor], Tensor]

    @property
    def mean(self) -> Tensor:
        return self.law.mean

    @property
    def std(self) -> float:
        return self.law.std

    @property
    def stochastic(self) -> bool:
        return self.law.stochastic

    def sample(self, key: Key) -> Tensor:
        return self.change(self.law.sample(key))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.law.log_prob(x)

    def shift(self, delta: Tensor) -> TransformedTransition:
        return TransformedTransition(self.law.shift(delta), self.change)


def keep_marginal(x: Tensor, x0: Tensor, here: Level, there: Level, std: float) -> Normal:
    """The step that re-noises the prediction with std z of fresh noise, and the rest along the predicted eps."""
    carried = math.sqrt(max(0.0, there.sigma**2 - std**2)) / here.sigma
    return Normal(torch.add(x * carried, x0, alpha=there.alpha - carried * here.alpha), std)


@dataclass(frozen=True)
class DDIM:
    """DDIM(eta): 0 is the deterministic ODE step, 1 is ancestral (DDPM) sampling. Use through `steer.ddim(eta)`.

    Source: Song et al. 2021 (DDIM), Eqs. 12 and 16, written for any (alpha, sigma), so that it serves flows and
    variance-exploding paths too. The last step, to sigma = 0, adds no noise.
    """

    eta: float = 1.0

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> Normal:
        return keep_marginal(x, x0, here, there, self.std(here, there))

    def std(self, here: Level, there: Level) -> float:
        kept = (here.alpha * there.sigma / (there.alpha * here.sigma)) ** 2
        return self.eta * there.sigma * math.sqrt(max(0.0, 1.0 - kept))


@dataclass(frozen=True)
class CPS:
    """Coefficient-preserving sampling: std = sigma' sin(pi eta / 2). Use through `steer.cps(eta)`.

    Source: Wang & Yu 2025 (Flow-CPS): keeps the marginal's coefficients exactly, unlike Flow-SDE, so no noise is left
    at t = 0. eta in [0, 1]; 1 redraws all the noise. Needs no diffusion coefficient.
    """

    eta: float = 0.7

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> Normal:
        return keep_marginal(x, x0, here, there, self.std(here, there))

    def std(self, here: Level, there: Level) -> float:
        return there.sigma * math.sin(0.5 * math.pi * self.eta)


@dataclass(frozen=True)
class Churn:
    """EDM's churn, written on the states the network sees. Use through `steer.churn(gamma)`.

    EDM raises the noise of x from sigma to (1 + gamma) sigma, evaluates the network there and integrates down. The
    states of a process are what its network sees, so here a step integrates from this level to sigma' / (1 + gamma)
    and then adds noise up to sigma': the same chain with an exact density, where the noise of the usual form passes
    through the network. The grid therefore holds EDM's raised levels; its nominal ones are lower by 1 + gamma.
    Source: Karras et al. 2022, Algorithm 2 (first order, S_noise = 1); gamma <= sqrt(2) - 1 there. lowest, highest:
    raised noise-to-signal ratios between which to churn, (1 + gamma) times their S_tmin and S_tmax.
    """

    gamma: float = math.sqrt(2.0) - 1.0
    lowest: float = 0.0
    highest: float = math.inf

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> Normal:
        return keep_marginal(x, x0, here, there, self.std(here, there))

    def std(self, here: Level, there: Level) -> float:
        if not self.lowest <= there.sigma / there.alpha <= self.highest:
            return 0.0
        return there.sigma * math.sqrt(1.0 - (1.0 + self.gamma) ** -2)


@dataclass(frozen=True)
class EulerMaruyama:
    """One Euler-Maruyama step of dx = (u - g^2 s / 2) dt + g dw. Use through `steer.euler_maruyama(g)`.

    g: the diffusion coefficient as a function of the Level a step starts from, None for the path's own,
    g^2 = 2 sigma^2 d/dt log(sigma / alpha). Every g has the right marginals as steps shrink; none has them at finite
    steps (unlike `ddim`), and noise is left at t = 0 unless g vanishes there. Song et al. 2021, Eq. 6 for the
    path's own g; Dance-SDE is a constant g.
    """

    g: Callable[[Level], float] | None = None

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> Normal:
        span, g2 = here.t - there.t, self._g2(here, there)
        # velocity = d_alpha x0 + d_sigma eps and score = -eps / sigma, with eps written out in x and x0
        on_eps = -span * (here.d_sigma + 0.5 * g2 / here.sigma)
        on_x0 = -span * here.d_alpha
        mean = torch.add(x * (1.0 + on_eps / here.sigma), x0, alpha=on_x0 - on_eps * here.alpha / here.sigma)
        return Normal(mean, math.sqrt(g2 * span))

    def std(self, here: Level, there: Level) -> float:
        return math.sqrt(self._g2(here, there) * (here.t - there.t))

    def _g2(self, here: Level, there: Level) -> float:
        if self.g is not None:
            return self.g(here) ** 2
        if here.alpha <= 0.0:
            raise SteerError(
                f"the path's own diffusion coefficient diverges at t = {here.t}, where alpha = 0; start the grid "
                "lower (steer.uniform_times does), or give euler_maruyama a g of your own"
            )
        return 2.0 * here.sigma * (here.d_sigma - here.sigma * here.d_alpha / here.alpha)


@dataclass(frozen=True)
class FlowSDE:
    """Flow-GRPO's SDE: Euler-Maruyama with g = a sqrt(sigma / alpha). Use through `steer.flow_sde(a)`.

    Source: Liu et al. 2025 (Flow-GRPO), a = .7. Where alpha = 0 the released code takes alpha from the next
    level inside g, and so does this. Residual noise stays at t = 0 (about a tenth at 20 steps); `cps` has none.
    """

    a: float = 0.7

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> Normal:
        return self._step(there)(x, x0, here, there)

    def std(self, here: Level, there: Level) -> float:
        return self._step(there).std(here, there)

    def _step(self, there: Level) -> EulerMaruyama:
        return EulerMaruyama(lambda at: self.a * math.sqrt(at.sigma / (at.alpha if at.alpha > 0.0 else there.alpha)))


@dataclass(frozen=True)
class DanceSDE:
    """DanceGRPO's SDE: Euler-Maruyama with a constant g = eta. Use through `steer.dance_sde(eta)`.

    Source: Xue et al. 2025 (DanceGRPO), eta = .3. `euler_maruyama(lambda at: eta)` with a name that can be written
    down. Residual noise of eta sqrt(last step) stays at t = 0.
    """

    eta: float = 0.3

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> Normal:
        return self._step()(x, x0, here, there)

    def std(self, here: Level, there: Level) -> float:
        return self._step().std(here, there)

    def _step(self) -> EulerMaruyama:
        return EulerMaruyama(lambda at: self.eta)


@dataclass(frozen=True)
class ClippedPrediction:
    """A marginal-keeping rule with x0 clipped to [-limit, limit] and eps left as predicted (diffusers' DDIM)."""

    rule: DDIM | CPS | Churn
    limit: float = 1.0

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> Normal:
        std = self.std(here, there)
        carried = math.sqrt(max(0.0, there.sigma**2 - std**2)) / here.sigma
        clipped = x0.clamp(-self.limit, self.limit)
        return Normal(torch.add((x - here.alpha * x0) * carried, clipped, alpha=there.alpha), std)

    def std(self, here: Level, there: Level) -> float:
        return self.rule.std(here, there)


def ddim(eta: float = 1.0) -> DDIM:
    """DDIM(eta): eta = 1 is ancestral sampling, eta = 0 the deterministic ODE.

    Args:
        eta: share of the ancestral step's noise, in [0, 1].

    Returns:
        A transition rule for any Gaussian path. The last step, to sigma = 0, adds no noise.

    Raises:
        SteerError: eta outside [0, 1].

    Source: Song et al. 2021 (DDIM), Eqs. 12 and 16, for any (alpha, sigma).
    """
    return DDIM(_within("eta", eta, 0.0, 1.0))


def ode() -> DDIM:
    """The deterministic probability-flow step (DDIM with eta = 0; plain Euler on a rectified flow)."""
    return DDIM(0.0)


def cps(eta: float = 0.7) -> CPS:
    """Coefficient-preserving sampling: each step draws noise of std sigma' sin(pi eta / 2).

    Args:
        eta: noise share, in [0, 1]; 1 redraws all the noise.

    Returns:
        A transition rule, see `CPS`; it leaves no noise at t = 0.

    Raises:
        SteerError: eta outside [0, 1].

    Source: Wang & Yu 2025 (Flow-CPS).
    """
    return CPS(_within("eta", eta, 0.0, 1.0))


def churn(gamma: float = math.sqrt(2.0) - 1.0, *, lowest: float = 0.0, highest: float = math.inf) -> Churn:
    """EDM churn by a factor 1 + gamma between two noise-to-signal ratios.

    Args:
        gamma: the noise is raised by a factor of 1 + gamma, >= 0; at most sqrt(2) - 1, the default, in the paper.
        lowest, highest: noise-to-signal ratios sigma / alpha of the level reached between which to churn, both raised,
            that is (1 + gamma) times the paper's S_tmin and S_tmax; everywhere by default.

    Returns:
        A transition rule, see `Churn`: the grid holds EDM's raised levels. Elsewhere its steps are deterministic.

    Raises:
        SteerError: a negative gamma.

    Source: Karras et al. 2022, Algorithm 2 (first order, S_noise = 1).
    """
    return Churn(_within("gamma", gamma, 0.0, math.inf), lowest, highest)


def euler_maruyama(g: Callable[[Level], float] | None = None) -> EulerMaruyama:
    """Euler-Maruyama on the reverse SDE, with any diffusion coefficient.

    Args:
        g: diffusion coefficient as a function of the Level that a step starts from; None for the path's own,
            g^2 = 2 sigma^2 d/dt log(sigma / alpha).

    Returns:
        A transition rule, see `EulerMaruyama`. Its marginals are right as steps shrink, and noise is left at t = 0
        unless g vanishes there. The path's own g diverges where alpha = 0: a step from there raises SteerError.

    Source: Song et al. 2021, Eq. 6 for the path's own g.
    """
    return EulerMaruyama(g)


def flow_sde(a: float = 0.7) -> FlowSDE:
    """Flow-GRPO's SDE: Euler-Maruyama with g = a sqrt(sigma / alpha).

    Args:
        a: noise level, >= 0; .7 in the paper.

    Returns:
        A transition rule, see `FlowSDE`. Noise is left at t = 0; `cps` leaves none.

    Raises:
        SteerError: a negative a.

    Source: Liu et al. 2025 (Flow-GRPO).
    """
    return FlowSDE(_within("a", a, 0.0, math.inf))


def dance_sde(eta: float = 0.3) -> DanceSDE:
    """DanceGRPO's SDE: Euler-Maruyama with a constant g = eta.

    Args:
        eta: diffusion coefficient, >= 0; .3 in the paper.

    Returns:
        A transition rule, see `DanceSDE`. Noise of eta sqrt(last step) is left at t = 0.

    Raises:
        SteerError: a negative eta.

    Source: Xue et al. 2025 (DanceGRPO).
    """
    return DanceSDE(_within("eta", eta, 0.0, math.inf))


def _within(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise SteerError(f"{name} must be in [{low}, {high}], got {value}")
    return float(value)
