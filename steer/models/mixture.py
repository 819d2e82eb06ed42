"""Analytic models: Gaussian mixtures, whose denoiser, reverse kernel and tilted laws are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ModelError, ShapeError
from ..key import Key
from ..processes import schedules
from ..processes.gaussian import GaussianProcess
from ..processes.transitions import DDIM
from ..types import Level, QuadraticForm, Rule, Schedule


@dataclass(frozen=True, eq=False)
class Exact:
    """A Gaussian mixture with a log-normaliser: the closed-form answer a sampler is checked against.

    weights: mode masses (K,), summing to 1. means: (K, D). covs: (K, D, D). log_evidence: log E_p[exp(r / T)].
    """

    weights: Tensor
    means: Tensor
    covs: Tensor
    log_evidence: float

    @property
    def mean(self) -> Tensor:
        """Mean of the law, (D,)."""
        return self.weights @ self.means

    @property
    def cov(self) -> Tensor:
        """Covariance of the law, (D, D)."""
        centred = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covs) + torch.einsum(
            "k,ki,kj->ij", self.weights, centred, centred
        )


class Isotropic(NamedTuple):
    """Isotropic modes at a level: log-densities are constant + [x^2, x] matrix, predictions gain x + offset by mode."""

    constant: Tensor  # (K,)
    matrix: Tensor  # (2 D, K)
    gain: Tensor  # (K, 1)
    offset: Tensor  # (K, D)


class GaussianMixture:
    """sum_k w_k N(mu_k, C_k) in R^D and everything diffusion asks of it, in closed form and float64.

    means: (K, D). covs: (K, D, D), or (K,) variances of isotropic modes, which may be 0 (point masses).
    weights: (K,), normalised here; equal if None.
    """

    def __init__(self, means: Any, covs: Any, weights: Any = None):
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim != 2:
            raise ShapeError(f"means must have shape (K, D), got {tuple(self.means.shape)}")
        modes, size = self.means.shape
        covs = torch.as_tensor(covs, dtype=torch.float64)
        if covs.shape not in ((modes,), (modes, size, size)):
            raise ShapeError(f"covs must have shape {(modes, size, size)} or ({modes},), got {tuple(covs.shape)}")
        raw = torch.ones(modes) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if raw.shape != (modes,) or not bool((raw > 0).all()):
            raise ShapeError(f"weights must be {modes} positive numbers, got shape {tuple(raw.shape)}")
        self.weights = raw.double() / raw.double().sum()
        # Eigenbases make every noise level a diagonal problem; isotropic modes need none.
        self.variances, self.bases = (covs[:, None], None) if covs.ndim == 1 else torch.linalg.eigh(covs)
        self._levels: dict[tuple[float, float], Isotropic] = {}
        if not bool((self.variances >= 0).all()):
            raise ModelError(f"covs must be positive (semi)definite, got an eigenvalue of {self.variances.min():.3g}")

    def __repr__(self) -> str:
        return f"GaussianMixture({self.means.shape[0]} modes in {self.means.shape[1]} dimensions)"

    @property
    def covs(self) -> Tensor:
        """Covariances, (K, D, D)."""
        if self.bases is None:
            return self.variances[:, :, None] * torch.eye(self.means.shape[1], dtype=torch.float64)
        return (self.bases * self.variances[:, None]) @ self.bases.mT

    def mode_precisions(self) -> Tensor | None:
        """Inverse covariances [K, D, D] of the modes; None where one of them has no density."""
        return torch.linalg.inv(self.covs) if bool((self.variances > 0).all()) else None

    def log_prob(self, x: Tensor, at: Level | None = None) -> Tensor:
        """Log-density of x (..., D), of the data or of the path's marginal at a level: (...), float64."""
        alpha, sigma = (at.alpha, at.sigma) if at is not None else (1.0, 0.0)
        return self.log_joint(x.double().reshape(-1, x.shape[-1]), alpha, sigma).logsumexp(1).view(x.shape[:-1])

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior mode probabilities of data x (..., D): (..., K)."""
        flat = x.double().reshape(-1, x.shape[-1])
        return torch.softmax(self.log_joint(flat, 1.0, 0.0), 1).view(*x.shape[:-1], -1)

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | x] for x = alpha x_0 + sigma eps, x of shape (..., D), in x's dtype."""
        flat = x.reshape(-1, x.shape[-1]).double()
        # Over the first axis, where it is a dozen times as fast as along a short last one.
        share = torch.softmax(self.log_joint(flat, alpha, sigma).T, 0).T
        if self.bases is None:
            at = self._isotropic(alpha, sigma)
            x0 = (share @ at.gain) * flat + share @ at.offset
        else:
            # How far each mode's prediction moves from its mean towards x / alpha, by eigendirection.
            gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
            rotated = self._rotated(flat, alpha)
            x0 = share @ self.means + torch.einsum("mk,mkd,ked->me", share, rotated * gain, self.bases)
        return x0.view(x.shape).to(x.dtype)

    def log_joint(self, flat: Tensor, alpha: float, sigma: float) -> Tensor:
        """log w_k N(x; alpha mu_k, alpha^2 C_k + sigma^2 I) of x (M, D): (M, K)."""
        if self.bases is None:
            at = self._isotropic(alpha, sigma)
            return torch.addmm(at.constant, torch.cat([flat.square(), flat], 1), at.matrix)
        total = alpha**2 * self.variances + sigma**2
        squared = (self._rotated(flat, alpha).square() / total).sum(2)
        return self.weights.log() - 0.5 * (total.log().sum(1) + total.shape[1] * math.log(2.0 * math.pi) + squared)

    def _isotropic(self, alpha: float, sigma: float) -> Isotropic:
        """What isotropic modes need at a level, remembered: chains come back to the same levels."""
        known = self._levels.get((alpha, sigma))
        if known is None:
            modes, size = self.means.shape
            total = alpha**2 * self.variances + sigma**2  # (K, 1)
            gain = alpha * self.variances / total
            centres = alpha * self.means
            # -|x - c|^2 / (2 total) is linear in x^2 and x: one product, where sums along a short axis would cost most.
            squared = centres.square().sum(1) / total[:, 0]
            constant = self.weights.log() - 0.5 * (size * (total[:, 0].log() + math.log(2.0 * math.pi)) + squared)
            matrix = torch.cat([(-0.5 / total).expand(modes, size), centres / total], 1).T.contiguous()
            known = Isotropic(constant, matrix, gain, self.means * (1.0 - alpha * gain))
            if len(self._levels) >= 1024:
                self._levels.clear()
            self._levels[alpha, sigma] = known
        return known

    def exact(self, reward: Any, *, temperature: float = 1.0) -> Exact:
        """The law p(x) exp(r(x) / temperature) for a linear or quadratic reward, with its evidence and mode masses.

        reward: anything whose `quadratic_form(dim)` gives a `QuadraticForm`, as the analytic rewards do.
        """
        form = quadratic_form(reward, self.means.shape[1])
        matrix, vector = form.matrix.double() / temperature, form.vector.double() / temperature
        identity = torch.eye(self.means.shape[1], dtype=torch.float64)
        bases = identity if self.bases is None else self.bases
        root = bases * self.variances[:, None].sqrt()
        inflated = identity + root.mT @ matrix @ root  # C^1/2 (C^-1 + A) C^1/2, which also serves C = 0
        if not bool((torch.linalg.eigvalsh(inflated) > 0).all()):
            raise ModelError(
                "p(x) exp(r(x) / temperature) has no finite normaliser: the reward grows faster than the model's "
                "tails fall; raise the temperature or lower the reward's curvature"
            )
        covs = root @ torch.linalg.solve(inflated, root.mT)
        slope = vector - self.means @ matrix
        means = self.means + torch.einsum("kij,kj->ki", covs, slope)
        log_mass = (
            self.weights.log()
            + form.constant / temperature
            + self.means @ vector
            - 0.5 * torch.einsum("ki,ij,kj->k", self.means, matrix, self.means)
            + 0.5 * torch.einsum("ki,kij,kj->k", slope, covs, slope)
            - 0.5 * torch.logdet(inflated)
        )
        return Exact(torch.softmax(log_mass, 0), means, covs, float(log_mass.logsumexp(0)))

    def _rotated(self, flat: Tensor, alpha: float) -> Tensor:
        """x - alpha mu_k in the eigenbasis of mode k: (M, K, D)."""
        assert self.bases is not None
        return torch.einsum("mkd,kde->mke", flat[:, None] - alpha * self.means, self.bases)


@dataclass(frozen=True, eq=False)
class MixtureTransition:
    """The exact reverse kernel of a mixture: given x, a mixture of Gaussians for x'. Shapes (B, N, D)."""

    log_share: Tensor  # (B, N, K)
    means: Tensor  # (B, N, K, D)
    factors: Tensor  # (K, D, D) lower triangular
    dtype: torch.dtype

    @property
    def mean(self) -> Tensor:
        """Mean of the kernel, (B, N, D)."""
        return torch.einsum("bnk,bnkd->bnd", self.log_share.exp(), self.means).to(self.dtype)

    @property
    def std(self) -> float:
        """Root mean variance of a component, averaged: the scale that guidance steps are measured by."""
        return math.sqrt(self.factors.square().sum((1, 2)).mean().item() / self.factors.shape[1])

    @property
    def stochastic(self) -> bool:
        """Always: every mode has a variance."""
        return True

    def sample(self, key: Key) -> Tensor:
        """One draw per particle."""
        chosen = (self.log_share + key.fold("mode").gumbel(self.log_share.shape)).argmax(2)
        centre = self.means.gather(2, chosen[..., None, None].expand(*chosen.shape, 1, self.means.shape[3]))[:, :, 0]
        noise = key.normal(centre.shape)
        return (centre + torch.einsum("bnde,bne->bnd", self.factors[chosen], noise)).to(self.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density, (B, N)."""
        scaled = torch.linalg.solve_triangular(
            self.factors, (x.double()[:, :, None] - self.means)[..., None], upper=False
        )
        log_det = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        size = self.means.shape[3]
        log_normal = -0.5 * scaled.square().sum((3, 4)) - log_det - 0.5 * size * math.log(2.0 * math.pi)
        return (self.log_share + log_normal).logsumexp(2)

    def renoised(self, scale: float, noise: float) -> MixtureTransition:
        """The distribution of scale x' + noise eps for draws x' of the kernel."""
        covs = scale**2 * self.factors @ self.factors.mT
        covs = covs + noise**2 * torch.eye(covs.shape[1], dtype=covs.dtype, device=covs.device)
        return MixtureTransition(self.log_share, scale * self.means, torch.linalg.cholesky(covs), self.dtype)

    def shift(self, delta: Tensor) -> MixtureTransition:
        """The kernel moved by delta."""
        return MixtureTransition(self.log_share, self.means + delta[:, :, None], self.factors, self.dtype)


@dataclass(frozen=True, eq=False)
class ExactStep:
    """The transition rule that draws from the mixture's true p(x' | x): a chain without discretisation error.

    Whatever the number of steps, the chain's law at t = 0 is the mixture itself (up to the prior's mismatch at the
    first level), so tests of samplers need no limit of small steps.
    """

    mixture: GaussianMixture

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> MixtureTransition:
        mixture, size = self.mixture, self.mixture.means.shape[1]
        gain, left = self._moments(here, there)
        if not bool((left > 0).all()):
            raise ModelError("ExactStep needs a density at t = 0: give every mode a positive variance")
        bases = torch.eye(size, dtype=torch.float64).expand(len(mixture.means), -1, -1)
        bases = bases if mixture.bases is None else mixture.bases
        matrix = (bases * gain[:, None]) @ bases.mT
        means = there.alpha * mixture.means + torch.einsum(
            "kde,bnke->bnkd", matrix, x.double()[:, :, None] - here.alpha * mixture.means
        )
        log_share = torch.log_softmax(mixture.log_joint(x.double().flatten(0, 1), here.alpha, here.sigma), 1)
        factors = torch.linalg.cholesky((bases * left[:, None]) @ bases.mT)
        return MixtureTransition(log_share.view(*x.shape[:2], -1), means, factors, x.dtype)

    def std(self, here: Level, there: Level) -> float:
        return math.sqrt(self._moments(here, there)[1].mean().item())

    def _moments(self, here: Level, there: Level) -> tuple[Tensor, Tensor]:
        """Per mode and eigendirection, (K, D): slope of E[x' | x, mode] and the variance that is left."""
        variances = self.mixture.variances.expand(-1, self.mixture.means.shape[1])
        rate = here.alpha / there.alpha
        before = there.alpha**2 * variances + there.sigma**2
        gain = rate * before / (here.alpha**2 * variances + here.sigma**2)
        return gain, before - gain * rate * before


def gaussian_mixture(
    means: Any,
    covs: Any,
    weights: Any = None,
    *,
    schedule: Schedule | None = None,
    steps: int = 100,
    times: Sequence[float] | None = None,
    transition: Rule | None = None,
    dtype: torch.dtype = torch.float32,
) -> GaussianProcess:
    """A process whose data is a Gaussian mixture: exact denoiser, and exact tilted answers by `.exact(reward)`.

    Arguments of the mixture as `GaussianMixture`. schedule: VP by default. transition: a rule, ancestral sampling by
    default; `ExactStep(process.reference)` removes discretisation error. The event is (D,).
    """
    mixture = GaussianMixture(means, covs, weights)
    path = schedule or schedules.VP()

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma, _, _ = path(t)
        return mixture.denoise(x, alpha, sigma)

    grid = schedules.uniform_times(path, steps) if times is None else schedules.check_times(times)
    return GaussianProcess(
        denoise, path, grid, (mixture.means.shape[1],), transition or DDIM(), reference=mixture, dtype=dtype
    )


def gaussian(mean: Any, cov: Any, **options: Any) -> GaussianProcess:
    """A process whose data is one Gaussian, mean (D,), cov (D, D) or a variance; options as `gaussian_mixture`."""
    cov = torch.as_tensor(cov, dtype=torch.float64)
    mean = torch.as_tensor(mean, dtype=torch.float64)
    return gaussian_mixture(mean[None], cov.reshape(1) if cov.ndim < 2 else cov[None], **options)


def finite_data(points: Any, bandwidth: float, weights: Any = None, **options: Any) -> GaussianProcess:
    """The closed-form diffusion of a finite data set: data convolved with N(0, bandwidth^2), exact at every level.

    points: (K, D), flattened. bandwidth 0 puts point masses. Masses of `.exact(reward)` are those of the points.
    Options as `gaussian_mixture`. A prediction costs one (M, K) softmax.
    """
    points = torch.as_tensor(points, dtype=torch.float64)
    return gaussian_mixture(points, torch.full((len(points),), float(bandwidth) ** 2), weights, **options)


def quadratic_form(reward: Any, size: int) -> QuadraticForm:
    """The coefficients of an analytic reward; an error that says which rewards have them, for any other."""
    if not hasattr(reward, "quadratic_form"):
        raise ModelError(
            "exact answers need a reward with a method quadratic_form(dim) -> steer.QuadraticForm, such as "
            f"rewards.Linear or rewards.Quadratic, got {type(reward).__name__}"
        )
    form = reward.quadratic_form(size)
    return form._replace(matrix=0.5 * (form.matrix + form.matrix.mT))  # r(x) depends on the symmetric part alone
