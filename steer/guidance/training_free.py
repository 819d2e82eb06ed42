"""Training-free guidance: follow a potential on clean states, with DPS, LGD, FreeDoM, MPGD and UGD as settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..core.population import per_particle
from ..errors import SteerError
from ..types import Level, Reward
from .hooks import Hooks, Step, norms

Profile = Callable[[Level, Level], float]
"""Relative strength of a step between two levels; profiles are scaled to mean 1 over a chain."""


def constant(here: Level, there: Level) -> float:
    """A profile that is the same at every step.

    Args:
        here: level that the step starts from.
        there: level that it ends at.

    Returns:
        1.
    """
    return 1.0


def increasing(here: Level, there: Level) -> float:
    """The profile abar / abar', weak in the noise and nearly 1 soon after.

    Args:
        here: level that the step starts from, of abar.
        there: level that it ends at, of abar'.

    Returns:
        abar / abar', at most 1, with abar = alpha^2 / (alpha^2 + sigma^2).

    Source: Ye et al. 2024 (TFG, 2409.15761), where it is alpha_t.
    """
    return min(1.0, _signal(here) / _signal(there))


def decreasing(here: Level, there: Level) -> float:
    """The profile 1 - abar / abar', strong in the noise and nearly 0 at the data.

    Args:
        here: level that the step starts from, of abar.
        there: level that it ends at, of abar'.

    Returns:
        1 - `increasing`.
    """
    return 1.0 - increasing(here, there)


def _signal(at: Level) -> float:
    return at.alpha**2 / (at.alpha**2 + at.sigma**2)


def _noise_level(at: Level) -> float:
    """sigma. Profiles by default are functions of the module, and no lambdas, which are not pickled."""
    return at.sigma


def _noise_share(at: Level) -> float:
    """Standard deviation of the noise in a state scaled to variance 1."""
    return math.sqrt(1.0 - _signal(at))


@dataclass(frozen=True)
class Native:
    """A step size as papers have it: it multiplies the gradient. Built by `native`."""

    value: float


def native(value: float) -> Native:
    """A step size in a paper's own unit, which depends on the scale of the potential; see `tfg`.

    Args:
        value: factor of the gradient.

    Returns:
        A strength that `tfg` and its settings take as rho or mu, in place of a number.
    """
    return Native(value)


Strength = float | Native


@dataclass(frozen=True, eq=False)
class TrainingFree:
    """The mean hook of `tfg`, which says what the fields mean."""

    potential: Reward | Callable[..., Any]
    rho: Strength
    mu: Strength
    sigma: float
    samples: int
    iterations: int
    rho_profile: Profile
    mu_profile: Profile
    sigma_profile: Callable[[Level], float]
    halvings: int
    limit: float | None

    def __call__(self, at: Step) -> Tensor:
        if at.unit == 0.0 and not (isinstance(self.rho, Native) or isinstance(self.mu, Native)):
            return at.mean
        smoothed = self._smoothed(at)
        through = torch.zeros_like(at.x0)
        if _value(self.rho) and at.here.alpha > 0.0:
            value, slope = at.climb(smoothed, at.raw)
            gradient = at.gradient((at.raw * slope).flatten(2).sum(2))
            ratio = at.there.alpha / at.here.alpha
            size = _size(self.rho, at, self.rho_profile)
            through = self._move(at, self.rho, gradient, size, ratio)
            through = through * self._kept(at, smoothed, value, at.raw.detach(), slope, through)
        z, size = at.x0, _size(self.mu, at, self.mu_profile)
        for _ in range(self.iterations if size else 0):
            value, gradient = at.climb(smoothed, z)
            move = self._move(at, self.mu, gradient, size, at.there.alpha)
            z = z + move * self._kept(at, smoothed, value, z, gradient, move) / at.there.alpha
        return at.mean + self._limited(at, through + at.there.alpha * (z - at.x0))

    def _smoothed(self, at: Step) -> Callable[[Tensor], Tensor]:
        """log mean_i exp f(z + e_i), with the same noises e_i throughout a step, in one call."""
        width = self.sigma * self.sigma_profile(at.here)
        if width == 0.0:
            return lambda z: at.value(self.potential, z)
        (problems, particles), event = at.x0.shape[:2], at.x0.shape[2:]
        shape = (problems, particles, self.samples, *event)
        noise = width * at.key.fold("smooth").normal(shape, dtype=at.x0.dtype, device=at.x0.device)

        def smoothed(z: Tensor) -> Tensor:
            values = at.value(self.potential, (z[:, :, None] + noise).flatten(1, 2))
            return values.view(problems, particles, -1).logsumexp(2) - math.log(self.samples)

        return smoothed

    def _move(self, at: Step, strength: Strength, gradient: Tensor, size: float, ratio: float) -> Tensor:
        """The displacement of the transition's mean before backtracking.

        A particle's own gradient sets its length: an average over those at hand would let companions and chunks in.
        """
        if isinstance(strength, Native):
            return gradient * (size * ratio)
        length = norms(gradient)
        scale = torch.where(length > 0.0, size * at.unit / length, 0.0)
        return (gradient.double() * per_particle(scale, gradient.double())).to(gradient.dtype)

    def _kept(
        self, at: Step, smoothed: Callable[[Tensor], Tensor], value: Tensor, z: Tensor, gradient: Tensor, move: Tensor
    ) -> Tensor:
        """The share of a move that backtracking leaves every particle, to multiply it by.

        Where f rises by less than a quarter of what its slope promises, step times curvature is above 3/2 (exactly so
        for a quadratic; at 2 iterations diverge). Such a step is cut to the top of the parabola through what was found,
        at most to half: one cut suffices on a quadratic, so few evaluations do.
        """
        share = torch.ones_like(value)
        if not self.halvings:
            return per_particle(share, move)
        clean = move / at.there.alpha
        with torch.no_grad():
            slope = (gradient * clean).double().flatten(2).sum(2)
            for _ in range(self.halvings):
                risen, promised = smoothed(z + clean * per_particle(share, move)) - value, share * slope
                short = ~(risen >= 0.25 * promised)
                if not bool(short.any()):
                    break
                top = torch.where(risen.isfinite() & short, 0.5 * promised / (promised - risen), 0.5)
                share = torch.where(short, share * top.clamp(0.02, 0.5), share)
        at.note("backtracked", (share < 1.0).double())
        return per_particle(share, move)

    def _limited(self, at: Step, move: Tensor) -> Tensor:
        if self.limit is None:
            return move
        if at.unit == 0.0:
            return torch.zeros_like(move)
        size = norms(move) / at.unit
        at.note("limited", (size > self.limit).double())
        return move * per_particle(self.limit / size.clamp(min=self.limit), move)


def tfg(
    potential: Reward | Callable[..., Any],
    *,
    rho: Strength = 0.1,
    mu: Strength = 0.025,
    sigma: float = 0.1,
    samples: int = 1,
    iterations: int = 4,
    rho_profile: Profile = increasing,
    mu_profile: Profile = increasing,
    sigma_profile: Callable[[Level], float] = _noise_level,
    halvings: int = 6,
    limit: float | None = None,
) -> Hooks:
    """Guidance by a potential f(x_0) in nats, such as a log-likelihood or reward / temperature.

    At every step, with g(z) the gradient of the smoothed f~(z) = log mean_i exp f(z + e_i), e_i of std sigma_t,

        D_t = rho_t d f~(x0_hat(x)) / dx        through the network
        z <- x0; z <- z + mu_t g(z)             `iterations` times, without it;  D_0 = z - x0
        mean' = mean + (alpha' / alpha) D_t + alpha' D_0

    Per step: one network row (and one backward row if rho), samples (1 or 0, + iterations) gradients of
    the potential, and as many evaluations as backtracking takes.
    The result is heuristic: it does not sample p(x) exp f(x), see docs/guidance.md for by how much. As a proposal,
    `follow(tfg(...))`, it is exact.

    Args:
        potential: f, a reward on clean states or a function of them, in nats; it needs a gradient.
        rho, mu: a number is how far every particle's mean moves, in units of the step's noise (`Step.unit`), averaged
            over the steps: the gradient says where to, backtracking where that would overshoot. It depends neither on
            the scale of f nor on what else is evaluated. A displacement u is a KL divergence of u^2 / 2 nats, so a
            target KL nats away from the model takes at least sqrt(2 KL / steps) a step. `native(value)` is the papers'
            factor of the gradient; most divide by a norm of the residual, which a number does exactly.
        sigma: width of the smoothing, times sigma_profile(level); 0 turns it off.
        samples: draws of the smoothing noise.
        iterations: gradient steps on x0. Recurrence (N_recur) belongs to the process: guide(recur(process, n), hooks).
        rho_profile, mu_profile: `increasing`, `decreasing`, `constant`, or any function of two levels.
        sigma_profile: function of a level, by default its sigma.
        halvings: the most often that backtracking cuts a particle's step, to half or less, while f rises less than a
            quarter of what its slope promises: where curvature times step is below 3/2 nothing happens, and iterations
            diverge at 2. 0: none, as published; a step of fixed length then oscillates about an optimum, by at most
            itself. The test is made in clean space, on f at x0 + displacement / alpha'.
        limit: largest displacement in units, or None. Steps without noise, the last, are then left alone, as they are
            where strengths are numbers.

    Source: Ye et al. 2024 (TFG, 2409.15761), as released.
    Differs: any path and transition rule; the unit; backtracking; f is averaged before the logarithm is differentiated,
    as in the paper; x0 is not clipped.
    """
    if samples < 1 or iterations < 0 or halvings < 0:
        raise SteerError(
            f"expected samples >= 1, iterations >= 0 and halvings >= 0, got {samples}, {iterations}, {halvings}"
        )
    if min(_value(rho), _value(mu), sigma) < 0.0 or (limit is not None and not limit > 0.0):
        raise SteerError(
            f"expected rho, mu, sigma >= 0 and limit > 0, got {rho}, {mu}, {sigma}, {limit}; to go down a potential "
            "give its negative"
        )
    hook = TrainingFree(
        potential=potential,
        rho=rho,
        mu=mu,
        sigma=sigma,
        samples=samples,
        iterations=iterations,
        rho_profile=rho_profile,
        mu_profile=mu_profile,
        sigma_profile=sigma_profile,
        halvings=halvings,
        limit=limit,
    )
    return Hooks(mean=(hook,), through=_value(rho) > 0.0)


def dps(potential: Reward | Callable[..., Any], rho: Strength = 0.2, **options: Any) -> Hooks:
    """Diffusion posterior sampling: the gradient through the network alone.

    Args:
        potential: f(x_0) in nats, a reward on clean states or a function of them, differentiable; see `tfg`.
        rho: strength of that gradient, in units of the step's noise averaged over the steps, or `native(value)`. Their
            step zeta_i / |y - A x0_hat| on |y - A x0_hat|^2 is native(rho) on the potential -|y - A x0_hat|.
        **options: as `tfg`: rho_profile (`constant` by default), halvings, limit.

    Returns:
        Hooks, for `guide` or `follow`.

    Raises:
        SteerError: settings out of range.

    Cost: per step one network row, one backward row and one gradient of the potential, and the evaluations of it that
    backtracking takes.
    Source: Chung et al. 2023 (2209.14687).
    """
    return tfg(potential, **{"rho_profile": constant, **options, "rho": rho, "mu": 0.0, "sigma": 0.0, "iterations": 0})


def lgd(potential: Reward | Callable[..., Any], rho: Strength = 0.2, samples: int = 4, **options: Any) -> Hooks:
    """Loss-guided diffusion (LGD-MC): DPS on the potential smoothed over x_0 given x_t.

    Args:
        potential: f(x_0) in nats, a reward on clean states or a function of them, differentiable; see `tfg`.
        rho: strength of the gradient, in units of the step's noise averaged over the steps, or `native(value)`.
        samples: n, draws of the smoothing noise, of std sigma / sqrt(alpha^2 + sigma^2), their sqrt(1 - abar).
        **options: as `tfg`: rho_profile (`constant` by default), sigma_profile, halvings, limit.

    Returns:
        Hooks, for `guide` or `follow`.

    Raises:
        SteerError: settings out of range.

    Cost: as `dps`, with the potential at `samples` states for one.
    Source: Song et al. 2023 (LGD-MC).
    Differs: TFG's code divides by n twice; this does once.
    """
    fixed = {"rho": rho, "mu": 0.0, "sigma": 1.0, "samples": samples, "iterations": 0}
    return tfg(potential, **{"rho_profile": constant, "sigma_profile": _noise_share, **options, **fixed})


def freedom(potential: Reward | Callable[..., Any], rho: Strength = 0.2, **options: Any) -> Hooks:
    """FreeDoM: DPS with a profile; on recur(process, n), with its time travel.

    Args:
        potential: f(x_0) in nats, a reward on clean states or a function of them, differentiable; see `tfg`.
        rho: strength of the gradient, in units of the step's noise averaged over the steps, or `native(value)`.
        **options: as `tfg`: rho_profile (`increasing` by default), halvings, limit.

    Returns:
        Hooks, for `guide` or `follow`.

    Raises:
        SteerError: settings out of range.

    Cost: as `dps`.
    Source: Yu et al. 2023 (FreeDoM, 2303.09833).
    """
    fixed = {"rho": rho, "mu": 0.0, "sigma": 0.0, "iterations": 0}
    return tfg(potential, **{"rho_profile": increasing, **options, **fixed})


def mpgd(potential: Reward | Callable[..., Any], mu: Strength = 0.2, **options: Any) -> Hooks:
    """Manifold-preserving guidance, without its autoencoder: moves x0 alone, with no network backward.

    Args:
        potential: f(x_0) in nats, a reward on clean states or a function of them, differentiable; see `tfg`.
        mu: strength of the gradient at x0, in units of the step's noise averaged over the steps, or `native(value)`.
        **options: as `tfg`: mu_profile (`increasing` by default), iterations (1 by default), halvings, limit.

    Returns:
        Hooks, for `guide` or `follow`.

    Raises:
        SteerError: settings out of range.

    Cost: per step one network row and `iterations` gradients of the potential, and the evaluations of it that
    backtracking takes.
    Source: He et al. 2024 (MPGD).
    """
    return tfg(potential, **{"mu_profile": increasing, "iterations": 1, **options, "rho": 0.0, "mu": mu, "sigma": 0.0})


def ugd(
    potential: Reward | Callable[..., Any],
    rho: Strength = 0.1,
    mu: Strength = 0.025,
    iterations: int = 4,
    **options: Any,
) -> Hooks:
    """Universal guidance: forward (rho) and backward (mu); recurrence by `recur`.

    Args:
        potential: f(x_0) in nats, a reward on clean states or a function of them, differentiable; see `tfg`.
        rho: strength of the gradient through the network (forward), in units of the step's noise averaged over the
            steps, or `native(value)`.
        mu: strength of the gradient at x0 (backward), likewise.
        iterations: gradient steps on x0.
        **options: as `tfg`: rho_profile and mu_profile (`constant` by default), halvings, limit.

    Returns:
        Hooks, for `guide` or `follow`.

    Raises:
        SteerError: settings out of range.

    Cost: per step one network row, one backward row and 1 + iterations gradients of the potential, and the evaluations
    of it that backtracking takes.
    Source: Bansal et al. 2023 (Universal guidance, 2302.07121).
    Differs: theirs moves the predicted noise by both; in TFG's form, used here, both move the mean.
    """
    fixed = {"rho": rho, "mu": mu, "sigma": 0.0, "iterations": iterations}
    return tfg(potential, **{"rho_profile": constant, "mu_profile": constant, **options, **fixed})


def _value(strength: Strength) -> float:
    return strength.value if isinstance(strength, Native) else strength


def _size(strength: Strength, at: Step, profile: Profile) -> float:
    """The strength at a step."""
    return _value(strength) * _shares(at.process.levels, profile, not isinstance(strength, Native))[at.k]


@lru_cache(maxsize=32)
def _shares(levels: tuple[Level, ...], profile: Profile, noisy: bool) -> tuple[float, ...]:
    """A profile scaled to mean 1 over a chain, or over its steps with noise."""
    shares = [profile(here, there) for here, there in itertools.pairwise(levels)]
    counted = [share for share, there in zip(shares, levels[1:], strict=True) if there.sigma > 0.0 or not noisy]
    total = sum(counted)
    return tuple(share * len(counted) / total if counted else share for share in shares)
