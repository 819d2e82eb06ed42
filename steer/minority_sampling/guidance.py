"""Minority guidance by a classifier of rarity, and self-guidance by the model's own loss: hooks on the step's mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.population import per_particle
from ..errors import SteerError
from ..guidance import Hooks, Step
from ..types import GaussianPath
from .score import Distance, euclidean
from .signal_level import level_near, log_snr, share, size

Classifier = Callable[[Tensor, float], Tensor]
"""(x [M, *event] / sqrt(alpha^2 + sigma^2), log(alpha^2 / sigma^2)) -> logits [M, L], on any Gaussian path."""


@dataclass(frozen=True)
class TowardsQuantile:
    """The mean moved by scale * unit^2 * gradient of log p(target | x_t). Built by `minority_guidance`."""

    classifier: Classifier
    target: int
    scale: float

    def __call__(self, step: Step) -> Tensor:
        if step.unit == 0.0:  # the step to the data, which draws nothing
            return step.mean
        here = step.here

        def log_prob(x: Tensor) -> Tensor:
            logits = self.classifier(x.flatten(0, 1) / size(here), log_snr(here))
            if not -logits.shape[1] <= self.target < logits.shape[1]:
                raise SteerError(f"target must be one of the classifier's {logits.shape[1]} bins, got {self.target}")
            return torch.log_softmax(logits, 1)[:, self.target].view(x.shape[:2])

        value, gradient = step.climb(log_prob, step.x)
        step.note("log p(target)", value)
        return step.mean + self.scale * step.unit**2 * gradient


def minority_guidance(classifier: Classifier, *, scale: float = 3.5, target: int = -1) -> Hooks:
    """Minority guidance: mean' = mean + scale std^2 grad_x log p(target | x_t), from a noisy classifier of rarity.

    Hooks for `steer.minority` and `steer.guide`, or for `steer.follow`, whereupon SMC corrects them.

    Args:
        classifier: see `Classifier`; learns quantile labels of the minority score (`minority_score`, `quantile_labels`;
            `examples/train/minority_digits.py` does so for the digits).
        scale: 1 is Bayes' rule: with the exact classifier, the distribution of the target's own samples as steps
            shrink. 3.5 is the paper's on LSUN bedrooms at 100 bins and 250 steps.
        target: the quantile to go to; -1 is the rarest, 0 the commonest.

    Cost per step: one forward and backward pass of the classifier per particle, none of the network.

    Source: Um et al. 2023 (2301.12334); classifier guidance of Dhariwal & Nichol 2021.
    Differs: the classifier reads a signal-to-noise ratio and so serves any path; deterministic rules move by the
    ancestral step's variance.
    """
    return Hooks(mean=(TowardsQuantile(classifier, target, float(scale)),))


@dataclass(frozen=True)
class AwayFromReconstruction:
    """The mean moved by scale * unit^2 * direction of growing reconstruction loss. Built by `self_guided`."""

    scale: float
    signal: float
    every: int
    phase: int
    interval: tuple[float, float]
    distance: Distance

    def acts(self, process: GaussianPath, k: int) -> bool:
        """Whether the step from level k is guided: counted from the data, inside the interval, and not the last."""
        inside = self.interval[0] <= share(process.levels[k]) <= self.interval[1]
        noisy = process.levels[k + 1].sigma > 0.0
        return noisy and inside and (process.steps - 1 - k) % self.every == self.phase

    def rows(self, process: GaussianPath) -> int:
        """Network rows per particle and chain, beside the model's own."""
        return process.rows * sum(self.acts(process, k) for k in range(process.steps))

    def __call__(self, step: Step) -> Tensor:
        if step.unit == 0.0 or not self.acts(step.process, step.k):
            return step.mean
        process, level = step.process, level_near(step.process, self.signal)
        with torch.no_grad():
            key = step.key.fold("perturbed", step.k)
            noisy = process.noise(step.raw.detach(), process.steps, level, key)
            restored = process.denoise(noisy, level, key)
        loss = self.distance(step.raw.flatten(0, 1), restored.flatten(0, 1)).view(step.x.shape[:2])
        step.note("loss", loss)
        return step.mean + self.scale * step.unit**2 * unit_max(step.gradient(loss))


def unit_max(gradient: Tensor) -> Tensor:
    """Every particle's gradient [B, N, *event] over its largest absolute entry; zero stays zero."""
    most = gradient.abs().flatten(2).amax(2)
    return gradient / per_particle(torch.where(most > 0.0, most, 1.0), gradient)


def self_guided(
    scale: float = 1.0,
    *,
    signal: float = 0.5,
    every: int = 5,
    phase: int = 0,
    interval: tuple[float, float] = (0.0, 1.0),
    distance: Distance = euclidean,
) -> Hooks:
    """Self-guided minority sampling: towards states whose prediction the model fails to restore. Needs no training.

        mean' = mean + scale std^2 g / max|g|,  g = grad_x d(x0(x), stop(x0(x_s))),  x_s = alpha_s x0(x) + sigma_s eps.

    Hooks for `steer.minority` and `steer.guide`, or for `steer.follow`, whereupon SMC corrects them.

    Args:
        scale: w; on the digits 5, at signal .9. By the largest entry, so the norm of a displacement grows with the
            dimension; `result.process.log` has it in units of the step's noise.
        signal: share of signal at s, to the nearest level of the grid. It decides what is followed: at little signal
            the restored prediction is the mean of the data, and the loss the distance from it (see docs/minority.md).
        every, phase: guides the steps whose number, counted from the data, is `phase` modulo `every`.
        interval: shares of signal alpha^2 / (alpha^2 + sigma^2) of the levels that are guided.
        distance: between [M, *event] tensors, differentiable: Euclidean here, LPIPS in the paper.

    Cost: at one step in `every`, one more network row and a backward pass per particle.

    Source: Um & Ye 2024 (2407.11555) and the released code (every = 5, scale 1, always on).
    Differs: the perturbation level is a share of signal, .5 by default, where the paper's .8 T of a linear schedule is
    .002; the prediction of the step is not evaluated twice; a vanishing gradient moves nothing, where the code divides
    by it; the last step, of no noise, is not guided.
    """
    if every < 1 or not 0 <= phase < every:
        raise SteerError(f"every counts steps and phase is below it, 0 <= phase < every, got {phase} and {every}")
    if not 0.0 < signal < 1.0 or not 0.0 <= interval[0] < interval[1] <= 1.0:
        raise SteerError(
            f"signal and interval are shares alpha^2 / (alpha^2 + sigma^2): 0 < signal < 1 and an interval that rises "
            f"within [0, 1], got {signal} and {interval}"
        )
    hook = AwayFromReconstruction(
        scale=float(scale), signal=signal, every=every, phase=phase, interval=interval, distance=distance
    )
    return Hooks(mean=(hook,), through=True, extra=(hook.rows,))
