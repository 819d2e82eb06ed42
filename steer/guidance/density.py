"""Asking for samples of higher or lower log-density, in nats: prior guidance and density guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ..core.population import per_particle
from ..errors import SteerError
from ..key import Key
from ..processes.gaussian import need_gaussian, need_levels
from ..types import GaussianPath, Level, NoiseLevels
from .guided_process import CURE
from .hooks import Hooks, Step, ancestral_std, norms

_NORMAL = NormalDist()


def log_snr(at: Level) -> float:
    """log(alpha^2 / sigma^2), the lambda of the closed form; inf at the data."""
    return 2.0 * (math.log(at.alpha) - math.log(at.sigma)) if at.sigma > 0.0 else math.inf


def snr_span(process: NoiseLevels) -> float:
    """How far log-SNR rises along the grid, from its first level with signal to its last with noise."""
    levels = need_levels(process, "a range of signal-to-noise ratios").levels
    known = [log_snr(at) for at in levels if at.alpha > 0.0 and at.sigma > 0.0]
    return known[-1] - known[0]


def delta_of(process: NoiseLevels, q: float) -> float:
    """Change of log p_0 by density guidance at q: sqrt(2 D) / 2 Phi^-1(q) (lambda_max - lambda_min).

    Args:
        process: its event has D numbers, its grid spans the log-SNR lambda from the first level with signal to the last
            with noise.
        q: probability in (0, 1); above 1/2 samples become more likely.

    Returns:
        The change in nats, by the closed form.

    Raises:
        StateSpaceError: where states are on no Gaussian path.
    """
    return 0.5 * math.sqrt(2.0 * math.prod(process.event)) * _NORMAL.inv_cdf(q) * snr_span(process)


def quantile_of(process: NoiseLevels, delta_logp: float) -> float:
    """The q that changes log p_0 by delta_logp nats on a process's grid: `delta_of` solved for q.

    Args:
        process: its event and grid enter the closed form.
        delta_logp: change of log p_0 asked for, in nats.

    Returns:
        q in (0, 1).

    Raises:
        StateSpaceError: where states are on no Gaussian path.
    """
    return _NORMAL.cdf(2.0 * delta_logp / (math.sqrt(2.0 * math.prod(process.event)) * snr_span(process)))


@dataclass(frozen=True)
class Rescale:
    """The score hook of `density_guidance`."""

    inverse: float  # Phi^-1(q)
    noise: float
    limit: float

    def __call__(self, at: Step) -> Tensor:
        if at.there.sigma == 0.0:
            return at.score
        scaled = at.here.sigma * at.score
        size = norms(scaled).square()
        asked = torch.full_like(size, math.sqrt(2.0 * scaled[0, 0].numel()) * self.inverse)
        if self.noise:
            asked = asked - self.noise**2 * self._laplacian(at, scaled, size)
        change = asked / size
        reach = at.coefficient * at.here.sigma / at.here.alpha * size.sqrt()  # of a change of 1, in the mean
        most = self.limit * math.sqrt(scaled[0, 0].numel()) * ancestral_std(at.here, at.there) / reach
        at.note("eta", 1.0 + change)
        at.note("clamped", (change.abs() > most).double())
        return at.score * per_particle(1.0 + change.clamp(-most, most), at.score)

    def _laplacian(self, at: Step, scaled: Tensor, size: Tensor) -> Tensor:
        """sigma^2 times the trace of the Hessian of log p_t across the score, by one Rademacher probe (Hutchinson)."""
        draw = at.key.fold("probe").uniform(at.x0.shape, device=at.x0.device)
        probe = across(torch.where(draw < 0.5, -1.0, 1.0).to(at.x0.dtype), scaled, size)
        product = at.gradient((at.raw * probe).flatten(2).sum(2))
        return ((at.here.alpha * product - probe) * probe).double().flatten(2).sum(2)


@dataclass(frozen=True)
class Across:
    """The mean hook of stochastic density guidance: noise orthogonal to the score, which log p_t feels at second order.

    The draw is the hook's and not the step's, so the transition stays deterministic.
    """

    noise: float

    def __call__(self, at: Step) -> Tensor:
        std = self.noise * ancestral_std(at.here, at.there)
        draw = at.key.fold("across").normal(at.x0.shape, dtype=at.x0.dtype, device=at.x0.device)
        return at.mean + std * across(draw, at.score, norms(at.score).square())


def across(vector: Tensor, along: Tensor, size: Tensor) -> Tensor:
    """The part of a vector orthogonal to another of squared norm `size` [B, N], at every particle."""
    share = (vector * along).double().flatten(2).sum(2) / size.clamp(min=torch.finfo(torch.float64).tiny)
    return vector - along * per_particle(share, along)


def density_guidance(
    process: GaussianPath,
    delta_logp: float | None = None,
    *,
    q: float | None = None,
    noise: float = 0.0,
    limit: float = 3.0,
    headroom: float | None = None,
) -> Hooks:
    """Follow the probability-flow ODE with the score times eta = 1 + sqrt(2 D) Phi^-1(q) / |sigma_t s(x)|^2.

    The last step, to sigma = 0, is the model's.

    Args:
        process: what the hooks are for: its event and grid enter the closed form. Its rule is to be `steer.ode()`.
        delta_logp: change of log p_0 asked for, in nats, from which q is solved (`quantile_of`). Above 0 samples become
            more likely: smoother, with less detail; below, less.
        q: given in place of delta_logp; above 1/2 samples become more likely.
        noise: phi of the stochastic variant, noise of phi times the ancestral std orthogonal to the score, its
            second-order effect taken off the numerator: one backward row per network row more. Their .2 to .3.
        limit: what guidance adds to a step is at most `limit` times as long as the noise of an ancestral step, which
            matters next to modes, where the score vanishes and eta has a pole; the log has "eta" and the share
            "clamped". A bound on eta itself would not do: where data is smooth on the scale of sigma, |sigma s|^2 goes
            to 0 with sigma, and eta rightly to infinity.
        headroom: the most that log p_0 can rise from a typical sample: D / 2 by default, exact for a Gaussian and for
            modes far apart. SteerError where more is asked for: no point of that density exists.

    Raises:
        SteerError: where more nats are asked for than there are, and for settings out of range.
        StateSpaceError: where the process is on no Gaussian path.

    Cost: per step no network row more; with noise one backward row per network row.
    Source: Karczewski et al. 2025 (2502.05807), density guidance and its stochastic variant, as in their code.
    Differs: the target in nats and its check; the probe of the Laplacian is orthogonal to the score, as the noise is.
    """
    need_gaussian(process, "density guidance", cure=CURE)
    if (delta_logp is None) == (q is None):
        raise SteerError(f"density guidance takes delta_logp or q, one of them, got {delta_logp} and {q}")
    if q is not None and not 0.0 < q < 1.0:
        raise SteerError(f"q is a probability in (0, 1), got {q}")
    if noise < 0.0 or not limit > 0.0:
        raise SteerError(f"expected noise >= 0 and limit > 0, got {noise} and {limit}")
    asked = delta_of(process, q) if q is not None else float(delta_logp or 0.0)
    most = 0.5 * math.prod(process.event) if headroom is None else headroom
    if asked > most:
        raise SteerError(
            f"{'' if q is None else f'q = {q} on this grid is '}a rise of log p by {asked:.4g} nats, and from a typical"
            f" sample to the highest density there are {most:.4g} (headroom); ask for delta_logp <= {most:.4g}, that "
            f"is q <= {quantile_of(process, most):.4g}"
        )
    reached = 2.0 * asked / (math.sqrt(2.0 * math.prod(process.event)) * snr_span(process))
    score = Rescale(reached, noise, limit)
    return Hooks(score=(score,), mean=(Across(noise),) if noise else (), through=noise > 0.0)


@dataclass(frozen=True)
class Norm:
    """The start hook of `prior_guidance`: draws of the prior moved onto a sphere."""

    delta_logp: float

    def __call__(self, process: GaussianPath, x: Tensor, key: Key) -> Tensor:
        mean, std = process.prior_moments
        offset = torch.zeros_like(x) if mean is None else mean.to(x)
        centred = x - offset
        return offset + centred * per_particle(std * radius(process.event, self.delta_logp) / norms(centred), x)


def radius(event: Sequence[int], delta_logp: float) -> float:
    """Norm at which N(0, I) is delta_logp nats denser than at its median norm (Wilson-Hilferty's chi-square median)."""
    size = math.prod(event)
    median = size * (1.0 - 2.0 / (9.0 * size)) ** 3
    if 2.0 * delta_logp >= median:
        raise SteerError(
            f"prior guidance by {delta_logp} nats: N(0, I) in {size} dimensions rises by at most {0.5 * median:.4g} "
            "nats above its median norm, at the origin; ask for less"
        )
    return math.sqrt(median - 2.0 * delta_logp)


def prior_guidance(process: GaussianPath, delta_logp: float = 0.0) -> Hooks:
    """Start on the sphere where the prior is delta_logp nats denser than at its median norm; then any ODE.

    0 is the median: samples without the spread that the norm's chance gives. Under the probability-flow ODE the change
    carries over to log p_0 exactly where the data is Gaussian. Needs `steer.ode()`: stochastic steps forget the norm.

    Args:
        process: what the hook is for.
        delta_logp: in nats; above 0 is denser.

    Raises:
        SteerError: where the prior's maximum is lower than asked for.
        StateSpaceError: where the process is on no Gaussian path.

    Cost: none.

    Source: Karczewski et al. 2025 (2502.05807), prior guidance.
    Differs: the norm is given in nats.
    """
    need_gaussian(process, "prior guidance", cure=CURE)
    radius(process.event, delta_logp)
    return Hooks(start=(Norm(delta_logp),))
