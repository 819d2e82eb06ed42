"""Functions of rewards that are rewards: z-scores, clips, targets, logs, minima, products, gates, ranks.

They check units as `weighted` does, pass prompts on, and are as differentiable as their parts. Wherever a part scores
-inf (a forbidden sample), so does the whole, whatever the function would make of it. Bounds in a spec are those of
samples that are not forbidden.

`rank` and `group_zscore` compare a sample with the others in its call. They are for search and for advantages; samplers
that target a tilted distribution refuse them, since exp(r(x) / T) needs an r that depends on x alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.types import RewardSpec

from .scoring import (
    Scorer,
    combined_spec,
    name_of,
    needs_prompts,
    refuse_gradient,
    reward_signature,
    score,
    score_part,
    spec_of,
)


@dataclass(frozen=True, eq=False)
class Composed:
    """A function of the scores of other rewards. Built by the functions of this module, which check the units.

    Called with samples `[M, ...]` and, where a part takes them, M prompts.

    Args:
        parts: rewards that the gradient flows through.
        combine: from the scores of all parts and judges, each `[M]`, to scores `[M]`.
        name: of the whole, for messages.
        spec: of the whole.
        judges: rewards that are called without a gradient.

    Returns:
        Scores `[M]`; -inf wherever a part or a judge scores -inf.

    Raises:
        NotDifferentiableError: where a gradient is requested and a part, or the function itself, has none.
    """

    parts: tuple[Scorer, ...]
    combine: Callable[..., Tensor]
    name: str
    spec: RewardSpec
    judges: tuple[Scorer, ...] = ()

    def __post_init__(self) -> None:
        needed = any(needs_prompts(reward) for reward in (*self.parts, *self.judges))
        object.__setattr__(self, "__signature__", reward_signature(self.spec.prompts, needed))

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        if not self.parts:
            refuse_gradient(samples, self.name)
        scores = [score_part(self.name, name_of(part), part, samples, prompts) for part in self.parts]
        with torch.no_grad():
            judged = [score(judge, samples, prompts).to(samples.device) for judge in self.judges]
        forbidden = torch.stack([each == -torch.inf for each in (*scores, *judged)]).any(0)
        # What stands in for a forbidden score is masked afterwards, so neither scores nor gradients become NaN.
        scores = [each.masked_fill(forbidden, 1.0) for each in scores]
        return self.combine(*scores, *judged).masked_fill(forbidden, -torch.inf)


def zscore(reward: Scorer, mean: float, std: float) -> Composed:
    """(r - mean) / std with fixed constants, in unit "z": z-scores of different rewards may be added.

    The constants are fixed so that the score is a function of x alone. For a normalization within each call see
    `group_zscore`.

    Args:
        reward: r, with scores `[M]`.
        mean: of the reward over samples of the unsteered model, in the reward's unit.
        std: of the same, > 0.

    Returns:
        A reward with scores `[M]`, as differentiable as r.

    Raises:
        RewardError: if mean is not finite, or std not positive and finite.
    """
    mean, std = _finite(mean, "mean"), _positive(std, "std")
    low, high = spec_of(reward).bounds
    bounds = (low - mean) / std, (high - mean) / std
    return _function_of(reward, lambda r: (r - mean) / std, f"zscore({name_of(reward)})", "z", bounds)


def clip(reward: Scorer, low: float = -math.inf, high: float = math.inf) -> Composed:
    """The reward clamped to [low, high], in its own unit.

    A forbidden sample stays forbidden: -inf is not raised to low.

    Args:
        reward: r, with scores `[M]`.
        low: least score, in the reward's unit.
        high: greatest score, in the reward's unit.

    Returns:
        A reward with scores `[M]`. The gradient is 0 outside [low, high].

    Raises:
        RewardError: unless low < high.
    """
    if not low < high:
        raise RewardError(f"clip(reward, low, high) needs low < high, got low={low} and high={high}; swap them")
    name = f"clip({name_of(reward)}, {low:g}, {high:g})"
    least, most = (min(max(bound, low), high) for bound in spec_of(reward).bounds)
    return _function_of(reward, lambda r: r.clamp(low, high), name, spec_of(reward).unit, (least, most))


def target(reward: Scorer, value: float) -> Composed:
    """-|r - value|, in the unit of r: highest (0) where the reward equals value.

    Args:
        reward: r, with scores `[M]`.
        value: the wanted score, in the reward's unit.

    Returns:
        A reward with scores `[M]`, at most 0. The gradient is 0 where r equals value.

    Raises:
        RewardError: if value is not finite.
    """
    value = _finite(value, "value")
    low, high = spec_of(reward).bounds
    bounds = -max(abs(low - value), abs(high - value)), min(0.0, value - low, high - value)
    name = f"target({name_of(reward)}, {value:g})"
    return _function_of(reward, lambda r: -(r - value).abs(), name, spec_of(reward).unit, bounds)


def log(reward: Scorer) -> Composed:
    """log r in nats, of a probability or a share. A score of 0 becomes -inf.

    Args:
        reward: r >= 0, with scores `[M]`, in unit "1" or in no declared unit.

    Returns:
        A reward with scores `[M]` in nats. A negative score of a plain function gives NaN, which samplers refuse.

    Raises:
        RewardError: for a reward that declares another unit, or one that may be negative.
    """
    spec = spec_of(reward)
    if spec.unit not in ("1", None):
        raise RewardError(
            f"log({name_of(reward)}) needs a pure number, and {name_of(reward)} is in {spec.unit}; convert it, for "
            f'instance log(weighted((1.0, {name_of(reward)}, "1/{spec.unit}")))'
        )
    _check_not_negative("log", reward)

    def combine(r: Tensor) -> Tensor:
        return r.where(r > 0, 1.0).log().masked_fill(r == 0, -torch.inf).masked_fill(~(r >= 0), torch.nan)

    low, high = (math.log(bound) if bound > 0 else -math.inf for bound in spec.bounds)
    return _function_of(reward, combine, f"log({name_of(reward)})", "nat", (low, high))


def minimum(*rewards: Scorer) -> Composed:
    """The least of the scores: high only where every reward is high.

    Args:
        rewards: one or more rewards of the same unit.

    Returns:
        A reward with scores `[M]` in their common unit. The gradient is that of the least score.

    Raises:
        RewardError: for rewards of different units, or no rewards.
    """
    unit, bounds = _common_unit("minimum", rewards), _bounds(rewards)
    bounds = min(low for low, _ in bounds), min(high for _, high in bounds)

    def combine(*scores: Tensor) -> Tensor:
        return _stacked(scores).amin(0)

    return _function_of_several(rewards, combine, "minimum", unit, bounds)


def softmin(*rewards: Scorer, width: float) -> Composed:
    """-w log mean exp(-r / w) over rewards of one unit: a minimum whose gradient reaches every part.

    It lies between the minimum (w -> 0) and the mean (w -> inf), at most w log n above the minimum of n rewards. Of
    equal scores it is that score.

    Args:
        rewards: one or more rewards of the same unit.
        width: w > 0, in the unit of the rewards.

    Returns:
        A reward with scores `[M]` in their common unit.

    Raises:
        RewardError: for rewards of different units, no rewards, or a width that is not positive and finite.
    """
    unit, bounds, width = _common_unit("softmin", rewards), _bounds(rewards), _positive(width, "width")
    bounds = min(low for low, _ in bounds), sum(high for _, high in bounds) / len(bounds)

    def combine(*scores: Tensor) -> Tensor:
        return -width * (torch.logsumexp(_stacked(scores) / -width, 0) - math.log(len(scores)))

    return _function_of_several(rewards, combine, "softmin", unit, bounds)


def product(*rewards: Scorer) -> Composed:
    """The product of rewards that are at least 0: a score near 0 of any one spoils the whole.

    Args:
        rewards: one or more rewards with scores `[M]` >= 0.

    Returns:
        A reward with scores `[M]`. Units multiply, and "1" is neutral. A negative score of a plain function gives NaN,
        which samplers refuse.

    Raises:
        RewardError: for a reward that declares bounds below 0, as two negative scores would make a positive one; clip
            or shift it.
    """
    _check_rewards("product", rewards)
    for reward in rewards:
        _check_not_negative("product", reward)
    units = [spec_of(reward).unit for reward in rewards]
    unit = None if None in units else "·".join(sorted(str(unit) for unit in units if unit != "1")) or "1"
    lows = [max(0.0, low) for low, _ in _bounds(rewards)]
    highs = [max(0.0, high) for _, high in _bounds(rewards)]
    # A factor of 0 makes the product 0 also where another bound is infinite; 0 * inf would be NaN.
    least = 0.0 if 0.0 in lows else math.prod(lows)
    most = 0.0 if 0.0 in highs else math.prod(highs)

    def combine(*scores: Tensor) -> Tensor:
        factors = _stacked(scores)
        return factors.prod(0).masked_fill((factors < 0).any(0), torch.nan)

    return _function_of_several(rewards, combine, "product", unit, (least, most))


def gate(reward: Scorer, by: Scorer, least: float) -> Composed:
    """The reward where a second one, `by`, scores at least `least`; -inf (forbidden) elsewhere.

    Args:
        reward: r, with scores `[M]`.
        by: the reward that decides. It is called without a gradient, and needs none.
        least: the threshold, in the unit of `by`.

    Returns:
        A reward with scores `[M]` in the unit of r. The gradient is that of r.

    Raises:
        RewardError: if least is not finite.
    """
    least = _finite(least, "least")

    def combine(r: Tensor, judged: Tensor) -> Tensor:
        return r.masked_fill(judged < least, -torch.inf).masked_fill(judged.isnan(), torch.nan)

    name, spec = f"gate({name_of(reward)}, {name_of(by)} >= {least:g})", spec_of(reward)
    whole = combined_spec([reward], spec.unit, spec.bounds, without_gradient=[by])
    return Composed((reward,), combine, name, whole, judges=(by,))


def rank(reward: Scorer) -> Composed:
    """The share of the other samples in the call that score less, ties counting half.

    Indifferent to the scale of the reward, and to how far ahead the best is. A sample alone scores 0.5. Forbidden
    samples stay forbidden, and the others are compared among themselves.

    Args:
        reward: r, with scores `[M]`.

    Returns:
        A groupwise reward with scores `[M]` in [0, 1], without a gradient.

    Cost: M^2 comparisons, in time and memory.
    """

    def combine(r: Tensor) -> Tensor:
        allowed = r != -torch.inf
        # less[i], tied[i]: how many allowed samples score less than, or the same as, sample i (itself included).
        less = ((r < r[:, None]) & allowed).sum(1)
        tied = ((r == r[:, None]) & allowed).sum(1)
        share = (less + 0.5 * (tied - 1)).to(r) / (allowed.sum() - 1)
        return torch.where(allowed.sum() > 1, share, 0.5).masked_fill(r.isnan(), torch.nan)

    return _groupwise(reward, combine, "rank", "1", (0.0, 1.0))


def group_zscore(reward: Scorer, floor: float) -> Composed:
    """(r - mean) / max(std, floor) over the samples in the call that are not forbidden, in unit "z".

    std divides by the number of samples.

    Args:
        reward: r, with scores `[M]`.
        floor: the least std, > 0, in the unit of r. Without it, meaningless differences between near-equal samples
            would become advantages of order one.

    Returns:
        A groupwise reward with scores `[M]`. It has no gradient: that of a sum of z-scores is 0.

    Raises:
        RewardError: if floor is not positive and finite.
    """
    floor = _positive(floor, "floor")

    def combine(r: Tensor) -> Tensor:
        allowed = r != -torch.inf
        count = allowed.sum().clamp(min=1)
        deviation = r - r.masked_fill(~allowed, 0.0).sum() / count
        std = (deviation.masked_fill(~allowed, 0.0).square().sum() / count).sqrt()
        return deviation / std.clamp(min=floor)

    return _groupwise(reward, combine, "group_zscore", "z", (-math.inf, math.inf))


def _function_of(
    reward: Scorer, combine: Callable[[Tensor], Tensor], name: str, unit: str | None, bounds: tuple[float, float]
) -> Composed:
    """A differentiable function of one reward."""
    return Composed((reward,), combine, name, combined_spec([reward], unit, bounds))


def _function_of_several(
    rewards: tuple[Scorer, ...],
    combine: Callable[..., Tensor],
    name: str,
    unit: str | None,
    bounds: tuple[float, float],
) -> Composed:
    """A differentiable function of several rewards, called name(first, second, ...)."""
    arguments = ", ".join(name_of(reward) for reward in rewards)
    return Composed(rewards, combine, f"{name}({arguments})", combined_spec(rewards, unit, bounds))


def _groupwise(
    reward: Scorer, combine: Callable[[Tensor], Tensor], name: str, unit: str, bounds: tuple[float, float]
) -> Composed:
    """A function of one reward that compares the samples of a call; it has no gradient."""
    spec = combined_spec([], unit, bounds, without_gradient=[reward])
    spec = replace(spec, gradient="none", scope="groupwise")
    return Composed((), combine, f"{name}({name_of(reward)})", spec, judges=(reward,))


def _stacked(scores: tuple[Tensor, ...]) -> Tensor:
    """Scores of n parts [n, M], in the widest of their dtypes."""
    dtype = reduce(torch.promote_types, (each.dtype for each in scores))
    return torch.stack([each.to(dtype) for each in scores])


def _check_rewards(name: str, rewards: tuple[Scorer, ...]) -> None:
    """RewardError unless there is at least one reward and all can be called."""
    if not rewards or not all(callable(reward) for reward in rewards):
        raise RewardError(
            f"{name}(...) takes one or more rewards, got {rewards!r}; pass rewards as separate arguments, not as a list"
        )


def _common_unit(name: str, rewards: tuple[Scorer, ...]) -> str | None:
    """The unit of all rewards; RewardError where they differ."""
    _check_rewards(name, rewards)
    first, unit = rewards[0], spec_of(rewards[0]).unit
    for reward in rewards[1:]:
        if spec_of(reward).unit != unit:
            raise RewardError(
                f"{name}(...) cannot compare {name_of(reward)} (in {spec_of(reward).unit or 'no declared unit'}) with "
                f"{name_of(first)} (in {unit or 'no declared unit'}); convert one with weighted((1.0, reward, "
                '"out/in")), or both with zscore(reward, mean, std)'
            )
    return unit


def _bounds(rewards: tuple[Scorer, ...]) -> list[tuple[float, float]]:
    """The bounds that each reward declares."""
    return [spec_of(reward).bounds for reward in rewards]


def _check_not_negative(name: str, reward: Scorer) -> None:
    """RewardError where a reward declares that its scores may be negative. Plain functions declare nothing."""
    low = spec_of(reward).bounds[0]
    if isinstance(getattr(reward, "spec", None), RewardSpec) and low < 0:
        raise RewardError(
            f"{name}(...) needs scores of at least 0, and {name_of(reward)} says that it goes down to {low:g}; clip "
            f"it, for instance clip({name_of(reward)}, low=0.0)"
        )


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise RewardError(f"{name} must be a finite number in the unit of the reward, got {value}")
    return float(value)


def _positive(value: float, name: str) -> float:
    if not 0.0 < value < math.inf:
        raise RewardError(f"{name} must be positive and finite, in the unit of the reward, got {value}")
    return float(value)
