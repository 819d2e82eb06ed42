"""Gaussian mixtures, whose denoiser, reverse kernel and tilted distributions are known in closed form."""

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
from ..torch_modes import lasting
from ..types import Level, QuadraticForm, Rule, Schedule


@dataclass(frozen=True, eq=False)
class Exact:
    """A Gaussian mixture with a log normalizing constant: the closed-form answer that samplers are checked against.

    Args:
        weights: Probabilities of the modes, [K], summing to 1.
        means: Means of the modes, [K, D].
        covs: Covariances of the modes, [K, D, D].
        log_evidence: Log of the normalizing constant, log E_p[exp(r / T)].
    """

    weights: Tensor
    means: Tensor
    covs: Tensor
    log_evidence: float

    @property
    def mean(self) -> Tensor:
        """Mean, [D]."""
        return self.weights @ self.means

    @property
    def cov(self) -> Tensor:
        """Covariance, [D, D]."""
        centred = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covs) + torch.einsum(
            "k,ki,kj->ij", self.weights, centred, centred
        )


class IsotropicCoefficients(NamedTuple):
    """Isotropic modes at a noise level: log-densities are constant + [x^2, x] matrix, predictions gain x + offset.

    Args:
        constant: [K].
        matrix: [2 D, K].
        gain: [K, 1].
        offset: [K, D].
    """

    constant: Tensor
    matrix: Tensor
    gain: Tensor
    offset: Tensor


class GaussianMixture:
    """The mixture sum_k w_k N(mu_k, C_k) in R^D and all that diffusion needs of it, in closed form and float64.

    Args:
        means: Means of the modes, [K, D].
        covs: Covariances [K, D, D], or variances [K] of isotropic modes, which may be 0 (point masses).
        weights: Positive numbers [K], normalised here; equal if None.

    Raises:
        ShapeError: For other shapes, and for weights that are not positive.
        ModelError: For covariances that are not positive semidefinite.
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
        self._levels: dict[tuple[float, float], IsotropicCoefficients] = {}
        if not bool((self.variances >= 0).all()):
            raise ModelError(f"covs must be positive (semi)definite, got an eigenvalue of {self.variances.min():.3g}")

    def __repr__(self) -> str:
        return f"GaussianMixture({self.means.shape[0]} modes in {self.means.shape[1]} dimensions)"

    @property
    def covs(self) -> Tensor:
        """Covariances of the modes, [K, D, D]."""
        if self.bases is None:
            return self.variances[:, :, None] * torch.eye(self.means.shape[1], dtype=torch.float64)
        return (self.bases * self.variances[:, None]) @ self.bases.mT

    def mode_precisions(self) -> Tensor | None:
        """Inverse covariances [K, D, D] of the modes; None where one of them has no density."""
        return torch.linalg.inv(self.covs) if bool((self.variances > 0).all()) else None

    def log_prob(self, x: Tensor, at: Level | None = None) -> Tensor:
        """Log-density of the data, or of the path's marginal at a noise level.

        Args:
            x: States [..., D].
            at: The level; None: the data.

        Returns:
            Log-densities [...], float64.
        """
        alpha, sigma = (at.alpha, at.sigma) if at is not None else (1.0, 0.0)
        return self.log_joint(x.double().reshape(-1, x.shape[-1]), alpha, sigma).logsumexp(1).view(x.shape[:-1])

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior probabilities of the modes, [..., K], given data x [..., D]."""
        flat = x.double().reshape(-1, x.shape[-1])
        return torch.softmax(self.log_joint(flat, 1.0, 0.0), 1).view(*x.shape[:-1], -1)

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | x] for x = alpha x_0 + sigma eps, [..., D] like x and in its dtype."""
        flat = x.reshape(-1, x.shape[-1]).double()
        # Along the first axis: a dozen times as fast as along a short last axis.
        responsibility = torch.softmax(self.log_joint(flat, alpha, sigma).T, 0).T
        if self.bases is None:
            at = self._isotropic_coefficients(alpha, sigma)
            x0 = (responsibility @ at.gain) * flat + responsibility @ at.offset
        else:
            # How far each mode's prediction moves from its mean towards x / alpha, along each eigenvector.
            gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
            rotated = self._rotated(flat, alpha)
            x0 = responsibility @ self.means + torch.einsum(
                "mk,mkd,ked->me", responsibility, rotated * gain, self.bases
            )
        return x0.view(x.shape).to(x.dtype)

    def log_joint(self, flat: Tensor, alpha: float, sigma: float) -> Tensor:
        """log w_k N(x; alpha mu_k, alpha^2 C_k + sigma^2 I), [M, K] float64, of x [M, D]."""
        if self.bases is None:
            at = self._isotropic_coefficients(alpha, sigma)
            return torch.addmm(at.constant, torch.cat([flat.square(), flat], 1), at.matrix)
        total = alpha**2 * self.variances + sigma**2
        squared = (self._rotated(flat, alpha).square() / total).sum(2)
        return self.weights.log() - 0.5 * (total.log().sum(1) + total.shape[1] * math.log(2.0 * math.pi) + squared)

    def _isotropic_coefficients(self, alpha: float, sigma: float) -> IsotropicCoefficients:
        """Coefficients of isotropic modes at a level, cached as chains use the same levels again."""
        known = self._levels.get((alpha, sigma))
        if known is None:
            if len(self._levels) >= 1024:
                self._levels.clear()
            known = self._levels[alpha, sigma] = self._coefficients_at(alpha, sigma)
        return known

    @lasting()
    def _coefficients_at(self, alpha: float, sigma: float) -> IsotropicCoefficients:
        modes, size = self.means.shape
        total = alpha**2 * self.variances + sigma**2  # (K, 1)
        gain = alpha * self.variances / total
        centres = alpha * self.means
        # -|x - c|^2 / (2 total) is linear in x^2 and x: one matrix product instead of slow sums along a short axis.
        squared = centres.square().sum(1) / total[:, 0]
        constant = self.weights.log() - 0.5 * (size * (total[:, 0].log() + math.log(2.0 * math.pi)) + squared)
        matrix = torch.cat([(-0.5 / total).expand(modes, size), centres / total], 1).T.contiguous()
        return IsotropicCoefficients(constant, matrix, gain, self.means * (1.0 - alpha * gain))

    def exact(self, reward: Any, *, temperature: float = 1.0) -> Exact:
        """The distribution p(x) exp(r(x) / temperature) for a linear or quadratic reward, in closed form.

        Args:
            reward: Anything whose `quadratic_form(dim)` gives a `steer.QuadraticForm`, as the analytic rewards do.
            temperature: Positive, in units of the reward.

        Returns:
            The tilted mixture, with its normalizing constant and the probabilities of its modes.

        Raises:
            ModelError: For other rewards, and where the normalizing constant is infinite.
        """
        form = quadratic_form(reward, self.means.shape[1])
        matrix, vector = form.matrix.double() / temperature, form.vector.double() / temperature
        identity = torch.eye(self.means.shape[1], dtype=torch.float64)
        bases = identity if self.bases is None else self.bases
        root = bases * self.variances[:, None].sqrt()
        inflated = identity + root.mT @ matrix @ root  # C^1/2 (C^-1 + A) C^1/2, which also serves C = 0
        if not bool((torch.linalg.eigvalsh(inflated) > 0).all()):
            raise ModelError(
                "p(x) exp(r(x) / temperature) has no finite normalizing constant: the reward grows faster "
                "than the model's tails fall; raise the temperature or lower the reward's curvature"
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
        """x - alpha mu_k in the eigenbasis of mode k: [M, K, D]."""
        assert self.bases is not None
        return torch.einsum("mkd,kde->mke", flat[:, None] - alpha * self.means, self.bases)


@dataclass(frozen=True, eq=False)
class MixtureTransition:
    """The exact reverse kernel of a mixture: given x [B, N, D], a mixture of Gaussians for x'.

    Args:
        log_share: Log-probabilities of the modes given x, [B, N, K].
        means: Means of x' for each mode, [B, N, K, D].
        factors: Lower Cholesky factors of the covariances of x', [K, D, D].
        dtype: Dtype of states.
    """

    log_share: Tensor
    means: Tensor
    factors: Tensor
    dtype: torch.dtype

    @property
    def mean(self) -> Tensor:
        """Mean of x', [B, N, D]."""
        return torch.einsum("bnk,bnkd->bnd", self.log_share.exp(), self.means).to(self.dtype)

    @property
    def std(self) -> float:
        """Root of the components' mean variance: the scale of guidance steps."""
        return math.sqrt(self.factors.square().sum((1, 2)).mean().item() / self.factors.shape[1])

    @property
    def stochastic(self) -> bool:
        """Whether the step draws noise: always True, as every mode has a variance."""
        return True

    def sample(self, key: Key) -> Tensor:
        """Draw one x' per particle, [B, N, D]."""
        chosen = (self.log_share + key.fold("mode").gumbel(self.log_share.shape)).argmax(2)
        centre = self.means.gather(2, chosen[..., None, None].expand(*chosen.shape, 1, self.means.shape[3]))[:, :, 0]
        noise = key.normal(centre.shape)
        return (centre + torch.einsum("bnde,bne->bnd", self.factors[chosen], noise)).to(self.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of x' [B, N, D], [B, N] float64."""
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
        """The kernel shifted by delta [B, N, D]."""
        return MixtureTransition(self.log_share, self.means + delta[:, :, None], self.factors, self.dtype)


@dataclass(frozen=True, eq=False)
class ExactStep:
    """The transition rule that draws from a mixture's true p(x' | x): a chain without discretisation error.

    At any number of steps, the chain ends in the mixture itself (up to the mismatch of the prior at the first level),
    so tests of samplers do not depend on a limit of small steps.

    Args:
        mixture: The mixture, `process.reference` of `gaussian_mixture`. Every mode needs a positive variance.

    Raises:
        ModelError: When a step is taken with a mode of variance 0.
    """

    mixture: GaussianMixture

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> MixtureTransition:
        mixture, size = self.mixture, self.mixture.means.shape[1]
        gain, left = self._moments(here, there)
        if not bool((left > 0).all()):
            raise ModelError(
                "ExactStep needs a density at t = 0, got a mode of variance 0: give every mode a positive variance"
            )
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
        """Root of the step's mean variance, over modes and coordinates."""
        return math.sqrt(self._moments(here, there)[1].mean().item())

    def _moments(self, here: Level, there: Level) -> tuple[Tensor, Tensor]:
        """Slope of E[x' | x, mode] and the variance of x' given both, by mode and eigenvector: [K, D] each."""
        variances = self.mixture.variances.expand(-1, self.mixture.means.shape[1])
        rate = here.alpha / there.alpha
        before = there.alpha**2 * variances + there.sigma**2
        gain = rate * before / (here.alpha**2 * variances + here.sigma**2)
        return gain, before - gain * rate * before


@dataclass(frozen=True, eq=False)
class _MixtureDenoiser:
    """E[x_0 | x_t] of a mixture on a path. A class, since processes go to other processes by pickle."""

    mixture: GaussianMixture
    path: Schedule

    def __call__(self, x: Tensor, t: float) -> Tensor:
        alpha, sigma, _, _ = self.path(t)
        return self.mixture.denoise(x, alpha, sigma)


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
    """A process whose data is a Gaussian mixture, with an exact denoiser and exact tilted answers.

    Args:
        means: Means of the modes, [K, D].
        covs: Covariances [K, D, D], or variances [K] of isotropic modes.
        weights: Positive numbers [K], normalised here; equal if None.
        schedule: The path, VP by default.
        steps: Number of evenly spaced steps.
        times: steps + 1 times falling to 0, in place of evenly spaced ones.
        transition: A transition rule, ancestral sampling by default; `ExactStep(process.reference)` has no
            discretisation error.
        dtype: Dtype of states.

    Returns:
        A process over states [B, N, D]. `.exact(reward)` gives the tilted distribution of the data in closed form;
        `.reference` is the mixture.

    Raises:
        ShapeError: For means, covariances or weights of other shapes, and for weights that are not positive.
        ModelError: For covariances that are not positive semidefinite.
    """
    mixture = GaussianMixture(means, covs, weights)
    path = schedule or schedules.VP()

    grid = schedules.uniform_times(path, steps) if times is None else schedules.check_times(times)
    return GaussianProcess(
        denoiser=_MixtureDenoiser(mixture, path),
        schedule=path,
        times=grid,
        event=(mixture.means.shape[1],),
        reference=mixture,
        dtype=dtype,
    ).with_rule(transition or DDIM())


def gaussian(mean: Any, cov: Any, **options: Any) -> GaussianProcess:
    """A process whose data is one Gaussian.

    Args:
        mean: Mean, [D].
        cov: Covariance [D, D], or one variance for all coordinates.
        **options: As `gaussian_mixture`: schedule, steps, times, transition, dtype.

    Returns:
        A process over states [B, N, D], as `gaussian_mixture`.
    """
    cov = torch.as_tensor(cov, dtype=torch.float64)
    mean = torch.as_tensor(mean, dtype=torch.float64)
    return gaussian_mixture(mean[None], cov.reshape(1) if cov.ndim < 2 else cov[None], **options)


def finite_data(points: Any, bandwidth: float, weights: Any = None, **options: Any) -> GaussianProcess:
    """The closed-form diffusion of a finite data set: the data convolved with N(0, bandwidth^2), exact at every level.

    Args:
        points: The data, flattened: [K, D].
        bandwidth: Standard deviation around each point; 0 for point masses.
        weights: Positive numbers [K], normalised; equal if None.
        **options: As `gaussian_mixture`: schedule, steps, times, transition, dtype.

    Returns:
        A process over states [B, N, D]. The weights of `.exact(reward)` are the probabilities of the points.

    Cost: one softmax over [M, K] per prediction of M rows.
    """
    points = torch.as_tensor(points, dtype=torch.float64)
    return gaussian_mixture(points, torch.full((len(points),), float(bandwidth) ** 2), weights, **options)


def quadratic_form(reward: Any, size: int) -> QuadraticForm:
    """Coefficients of a linear or quadratic reward.

    Args:
        reward: Anything with a method `quadratic_form(dim)`.
        size: D.

    Returns:
        The coefficients, with a symmetric matrix.

    Raises:
        ModelError: For rewards without that method.
    """
    if not hasattr(reward, "quadratic_form"):
        raise ModelError(
            "exact answers need a reward with a method quadratic_form(dim) -> steer.QuadraticForm, such as "
            f"rewards.Linear or rewards.Quadratic, got {type(reward).__name__}"
        )
    form = reward.quadratic_form(size)
    return form._replace(matrix=0.5 * (form.matrix + form.matrix.mT))  # r(x) depends only on the symmetric part
