"""Functions of rewards that are rewards: z-scores, clips, targets, logs, minima, products, gates, ranks.

They check units as `weighted` does, forward prompts, are as differentiable as their parts, and keep what a part
forbids forbidden: wherever a part scores -inf, so does the whole, whatever the function would make of it. Bounds in a
spec are those of samples that are not forbidden.

`rank` and `group_zscore` compare a sample with the others in its call. They are for search and for advantages; methods
that tilt a law refuse them, for exp(r(x) / T) needs an r of x alone.
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

from .scoring import Scorer, joined, name_of, needs_prompts, refuse_gradient, score, score_part, signature, spec_of


@dataclass(frozen=True, eq=False)
class Composed:
    """A function of the scores of parts. Built by the functions of this module, which check the units.

    parts: rewards. judges: rewards that are called without a gradient. spec: of the whole.
    combine: the scores of all of them, each (M,), to scores (M,).
    """

    parts: tuple[Scorer, ...]
    combine: Callable[..., Tensor]
    name: str
    spec: RewardSpec
    judges: tuple[Scorer, ...] = ()

    def __post_init__(self) -> None:
        needed = any(needs_prompts(reward) for reward in (*self.parts, *self.judges))
        object.__setattr__(self, "__signature__", signature(self.spec.prompts, needed))

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        """Scores (M,). NotDifferentiableError where a gradient is recorded and a part, or the function, has none."""
        if not self.parts:
            refuse_gradient(samples, self.name)
        scores = [score_part(self.name, name_of(part), part, samples, prompts) for part in self.parts]
        with torch.no_grad():
            judged = [score(judge, samples, prompts).to(samples.device) for judge in self.judges]
        forbidden = torch.stack([found == -torch.inf for found in (*scores, *judged)]).any(0)
        # Whatever stands for a forbidden score is masked afterwards: no NaN comes of it, not in gradients either.
        scores = [found.masked_fill(forbidden, 1.0) for found in scores]
        return self.combine(*scores, *judged).masked_fill(forbidden, -torch.inf)


def zscore(reward: Scorer, mean: float, std: float) -> Composed:
    """(r - mean) / std with frozen constants, in unit "z": z-scores of different rewards may be added.

    mean, std > 0: of the reward over samples of the unsteered model, in its unit. Frozen, so that the whole is a
    function of x: what is normalised within each batch is not (see `group_zscore`).
    """
    mean, std = _number(mean, "mean"), _positive(std, "std")
    low, high = spec_of(reward).bounds
    bounds = (low - mean) / std, (high - mean) / std
    return _of(reward, lambda r: (r - mean) / std, f"zscore({name_of(reward)})", "z", bounds)


def clip(reward: Scorer, low: float = -math.inf, high: float = math.inf) -> Composed:
    """r clamped to [low, high], in its unit; the gradient is 0 outside. -inf is not lifted to low."""
    if not low < high:
        raise RewardError(f"clip(reward, low, high) needs low < high, got {low} and {high}")
    name = f"clip({name_of(reward)}, {low:g}, {high:g})"
    least, most = (min(max(bound, low), high) for bound in spec_of(reward).bounds)
    return _of(reward, lambda r: r.clamp(low, high), name, spec_of(reward).unit, (least, most))


def target(reward: Scorer, value: float) -> Composed:
    """-|r - value|, in the unit of r: highest (0) where the reward is value. The gradient is 0 there."""
    value = _number(value, "value")
    low, high = spec_of(reward).bounds
    bounds = -max(abs(low - value), abs(high - value)), min(0.0, value - low, high - value)
    name = f"target({name_of(reward)}, {value:g})"
    return _of(reward, lambda r: -(r - value).abs(), name, spec_of(reward).unit, bounds)


def log(reward: Scorer) -> Composed:
    """log r in nats, of a reward in unit "1" (a probability, a share) or in no declared one: 0 becomes -inf.

    RewardError for a reward that declares another unit (say what its number stands for: weighted((1.0, r, "1/cos")))
    or that may be negative (clip it). A negative score of a plain function gives NaN, which samplers refuse.
    """
    spec = spec_of(reward)
    if spec.unit not in ("1", None):
        raise RewardError(
            f"log({name_of(reward)}) needs a pure number, and {name_of(reward)} is in {spec.unit}; convert it, for "
            f'instance log(weighted((1.0, {name_of(reward)}, "1/{spec.unit}")))'
        )
    _not_negative("log", reward)

    def combine(r: Tensor) -> Tensor:
        return r.where(r > 0, 1.0).log().masked_fill(r == 0, -torch.inf).masked_fill(~(r >= 0), torch.nan)

    low, high = (math.log(bound) if bound > 0 else -math.inf for bound in spec.bounds)
    return _of(reward, combine, f"log({name_of(reward)})", "nat", (low, high))


def minimum(*rewards: Scorer) -> Composed:
    """The least of the scores, in their common unit: all must be good. The gradient is that of the least."""
    unit, bounds = _common_unit("minimum", rewards), _bounds(rewards)
    bounds = min(low for low, _ in bounds), min(high for _, high in bounds)

    def combine(*scores: Tensor) -> Tensor:
        return _stacked(scores).amin(0)

    return Composed(rewards, combine, _call("minimum", rewards), joined(rewards, unit, bounds))


def softmin(*rewards: Scorer, width: float) -> Composed:
    """-w log mean exp(-r / w) over n rewards of one unit: a minimum that listens to every part.

    width: w > 0, in the unit of the rewards. Lies between the minimum (w -> 0) and the mean (w -> inf), at most
    w log n above the former; of equal scores it is that score.
    """
    unit, bounds, width = _common_unit("softmin", rewards), _bounds(rewards), _positive(width, "width")
    bounds = min(low for low, _ in bounds), sum(high for _, high in bounds) / len(bounds)

    def combine(*scores: Tensor) -> Tensor:
        return -width * (torch.logsumexp(_stacked(scores) / -width, 0) - math.log(len(scores)))

    return Composed(rewards, combine, _call("softmin", rewards), joined(rewards, unit, bounds))


def product(*rewards: Scorer) -> Composed:
    """The product of rewards that are at least 0, each of which can spoil it; units multiply ("1" is neutral).

    RewardError for a reward that declares bounds below 0, as two bad scores would make a good one: clip or shift it.
    A negative score of a plain function gives NaN, which samplers refuse.
    """
    _several("product", rewards)
    for reward in rewards:
        _not_negative("product", reward)
    units = [spec_of(reward).unit for reward in rewards]
    unit = None if None in units else "·".join(sorted(str(unit) for unit in units if unit != "1")) or "1"
    lows, highs = ([max(0.0, bound) for bound in ends] for ends in zip(*_bounds(rewards), strict=True))
    bounds = (0.0 if 0.0 in lows else math.prod(lows)), (0.0 if 0.0 in highs else math.prod(highs))

    def combine(*scores: Tensor) -> Tensor:
        factors = _stacked(scores)
        return factors.prod(0).masked_fill((factors < 0).any(0), torch.nan)

    return Composed(rewards, combine, _call("product", rewards), joined(rewards, unit, bounds))


def gate(reward: Scorer, by: Scorer, least: float) -> Composed:
    """r where `by` scores at least `least` (in its own unit), else -inf: samples that fail are forbidden.

    The gradient is that of r; `by` is called without one, and needs none.
    """
    least = _number(least, "least")

    def combine(r: Tensor, found: Tensor) -> Tensor:
        return r.masked_fill(found < least, -torch.inf).masked_fill(found.isnan(), torch.nan)

    name, spec = f"gate({name_of(reward)}, {name_of(by)} >= {least:g})", spec_of(reward)
    return Composed((reward,), combine, name, joined([reward], spec.unit, spec.bounds, judges=[by]), judges=(by,))


def rank(reward: Scorer) -> Composed:
    """The share of the other samples in the call that score less, ties counting half: in [0, 1], groupwise.

    Indifferent to the scale of the reward, and to how far the best is ahead. A sample alone scores 0.5. What is
    forbidden stays so, and the others are compared among themselves. No gradient. Memory: M^2 comparisons.
    """

    def combine(r: Tensor) -> Tensor:
        allowed = r != -torch.inf
        less, tied = ((test(r, r[:, None]) & allowed).sum(1) for test in (torch.lt, torch.eq))
        share = (less + 0.5 * (tied - 1)).to(r) / (allowed.sum() - 1)
        return torch.where(allowed.sum() > 1, share, 0.5).masked_fill(r.isnan(), torch.nan)

    return _grouped(reward, combine, "rank", "1", (0.0, 1.0))


def group_zscore(reward: Scorer, floor: float) -> Composed:
    """(r - mean) / max(std, floor) over the samples in the call that are not forbidden: groupwise, in unit "z".

    floor: the least std, > 0, in the unit of r. Without one, gaps of no meaning between near-equal samples become
    advantages of order one. std divides by the number of samples. No gradient: that of a sum of z-scores is 0.
    """
    floor = _positive(floor, "floor")

    def combine(r: Tensor) -> Tensor:
        allowed = r != -torch.inf
        count = allowed.sum().clamp(min=1)
        away = r - r.masked_fill(~allowed, 0.0).sum() / count
        std = (away.masked_fill(~allowed, 0.0).square().sum() / count).sqrt()
        return away / std.clamp(min=floor)

    return _grouped(reward, combine, "group_zscore", "z", (-math.inf, math.inf))


def _of(
    reward: Scorer, combine: Callable[[Tensor], Tensor], name: str, unit: str | None, bounds: tuple[float, float]
) -> Composed:
    return Composed((reward,), combine, name, joined([reward], unit, bounds))


def _grouped(
    reward: Scorer, combine: Callable[[Tensor], Tensor], name: str, unit: str, bounds: tuple[float, float]
) -> Composed:
    spec = replace(joined([], unit, bounds, judges=[reward]), gradient="none", scope="groupwise")
    return Composed((), combine, f"{name}({name_of(reward)})", spec, judges=(reward,))


def _stacked(scores: tuple[Tensor, ...]) -> Tensor:
    """Scores of n parts (n, M), in the widest of their dtypes."""
    dtype = reduce(torch.promote_types, (s.dtype for s in scores))
    return torch.stack([s.to(dtype) for s in scores])


def _several(name: str, rewards: tuple[Scorer, ...]) -> None:
    if not rewards or not all(callable(reward) for reward in rewards):
        raise RewardError(f"{name}(...) takes one or more rewards, got {rewards!r}")


def _common_unit(name: str, rewards: tuple[Scorer, ...]) -> str | None:
    _several(name, rewards)
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
    return [spec_of(reward).bounds for reward in rewards]


def _not_negative(name: str, reward: Scorer) -> None:
    low = spec_of(reward).bounds[0]
    if isinstance(getattr(reward, "spec", None), RewardSpec) and low < 0:
        raise RewardError(
            f"{name}(...) needs scores of at least 0, and {name_of(reward)} says that it goes down to {low:g}; clip "
            f"it, for instance clip({name_of(reward)}, low=0.0)"
        )


def _number(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise RewardError(f"{name} must be a finite number in the unit of the reward, got {value}")
    return float(value)


def _positive(value: float, name: str) -> float:
    if not 0.0 < value < math.inf:
        raise RewardError(f"{name} must be positive and finite, in the unit of the reward, got {value}")
    return float(value)


def _call(name: str, rewards: tuple[Scorer, ...]) -> str:
    return f"{name}({', '.join(name_of(reward) for reward in rewards)})"
