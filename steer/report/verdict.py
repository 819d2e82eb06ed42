"""What a run did, in one sentence: read off its weights, the seeds that survive, and its rewards."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..core.diagnostics import one_root, surviving_seeds
from ..core.population import weighted_mean
from ..core.tilt import Tilt
from ..errors import SteerError
from .page import number, with_error
from .run_result import RunResult

_HARDLY = 0.05  # nats of KL to the model, below which nothing was steered; 9 of 10 unsteered samples then count
_SURE = 2.0  # standard errors by which a mean reward must rise
_RAISE = "raise the temperature or add particles"


class _Mean(NamedTuple):
    """A mean reward and its standard error."""

    value: float
    error: float


def verdict(result: RunResult, reference: RunResult | None = None) -> str:
    """What a run did, and what to change where that was little or too much: one sentence, without a full stop.

    Args:
        result: the run.
        reference: unsteered samples of the same process and reward. Without them, those that chose the run's
            temperature, if there are any.
    """
    particles, weight = result.reward.shape[1], result.log_weight
    if result.law == "model":
        return "unsteered: these are the model's own samples"
    if result.law == "none":
        best = number(float(result.reward.max()))
        return f"best reward {best} of {_of(particles)}, which a search or its start selected"
    if particles == 1:
        return "one particle, which nothing is weighed against: add particles"
    lost = one_root(weight, result.root) if result.trajectory is not None else torch.zeros_like(weight[:, 0]).bool()
    if bool(lost.any()):
        where = "" if bool(lost.all()) else f" in {int(lost.sum())} of {len(lost)} problems"
        return f"one seed survives of {particles}{where}: {_RAISE}"
    size = f"ESS {number(float(result.ess.mean()))} of {particles}"
    if float(result.ess.mean()) < 2.0 and particles > 4:
        return f"{size}, so that one sample has nearly all of the weight: {_RAISE}"
    unsteered, mean = _unsteered(result, reference), _steered(result)
    base = _base(result)
    if _resampled(result) is False and base.kl(result.temperature) < _HARDLY:
        return f"hardly steered: {size}; {_lower(base)}"
    if unsteered is None:
        return f"steered: {size}{_seeds(result)}"
    gain = (mean.value - unsteered.value) / max(math.hypot(mean.error, unsteered.error), 1e-300)
    rose = f"mean reward {number(mean.value)}, unsteered {with_error(*unsteered)}"
    if gain < -_SURE:
        return f"the reward fell ({rose}): {_RAISE}"
    if not gain > _SURE:
        return f"the reward is within {_SURE:g} standard errors of the unsteered mean ({rose}); {_lower(base)}"
    return f"steered: {rose}, {size}{_seeds(result)}"


def _survivors(result: RunResult) -> float:
    """Distinct starting noises among the samples of positive weight, a mean over problems."""
    return float(surviving_seeds(result.root, result.log_weight).mean())


def _unsteered(result: RunResult, reference: RunResult | None) -> _Mean | None:
    """The mean reward without steering, where it is known."""
    if reference is not None:
        tilt = Tilt.of(reference.reward)
        return _Mean(tilt.mean(), tilt.error())
    choice = result.temperature_choice
    return None if choice is None else _Mean(choice.unsteered, choice.unsteered_error)


def _steered(result: RunResult) -> _Mean:
    """The weighted mean reward; its error as if samples were independent, of which there are ESS."""
    mean = weighted_mean(result.log_weight, result.reward)
    spread = weighted_mean(result.log_weight, (result.reward - mean[:, None]).square())
    return _Mean(float(mean.mean()), float((spread / result.ess).sum().sqrt()) / len(mean))


def _base(result: RunResult) -> Tilt:
    """The model's own samples, as far as those of the run stand for them: the tilt divided out of their weights."""
    forbidden = result.reward == -torch.inf
    value = torch.where(forbidden, torch.inf, result.reward / result.temperature)
    return Tilt.of(result.reward, result.log_weight - value)


def _resampled(result: RunResult) -> bool:
    """Whether more than a tenth of the seeds were lost to resampling, which tells of rewards that differed."""
    resampled = result.trajectory is not None and bool((result.trajectory.resamplings() > 0).any())
    return resampled and _survivors(result) <= 0.9 * result.reward.shape[1]


def _lower(base: Tilt) -> str:
    """The advice to steer more."""
    try:
        return f"lower the temperature to about {base.temperature(ess=0.5):.2g}"
    except SteerError:
        return "its samples' rewards hardly differ: use a reward that tells them apart"


def _seeds(result: RunResult) -> str:
    """How many starting noises are left, where noise was drawn once for each particle."""
    if result.trajectory is None:
        return ""
    return f", from {number(_survivors(result))} of {result.reward.shape[1]} seeds"


def _of(particles: int) -> str:
    return "1 sample" if particles == 1 else f"{particles} samples"
