"""Which candidates a population search goes on with. Small frozen values; `beam` and `svdd` take any of them.

Candidates are ordered candidate by candidate: candidate m of chain n stands at index m N + n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from steer.core.population import log_potential
from steer.core.resampling import Resampler, ssp
from steer.core.trajectory import PathState
from steer.errors import SteerError
from steer.key import Key


class Choice(NamedTuple):
    """What there is to choose from at level k of K.

    values:      (B, M N) float64, higher is better.
    path:        what the candidates' paths remember: value at the last choice before this and highest so far,
                 (B, M N) each; None at the first.
    particles:   N, how many are kept.
    separable:   whether copies of a candidate would part on the way to the next choice.
    key:         names the draws of this choice.
    """

    values: Tensor
    path: PathState
    particles: int
    temperature: float
    k: int
    steps: int
    separable: bool
    key: Key


class Selection(Protocol):
    """A rule that keeps N of the candidates, possibly several times: index (B, N)."""

    def __call__(self, choice: Choice) -> Tensor: ...


@dataclass(frozen=True)
class Argmax:
    """Every chain goes on with its best candidate (the first of equals). Built by `argmax`."""

    def __call__(self, choice: Choice) -> Tensor:
        return _of_chains(choice.values, choice.particles)


@dataclass(frozen=True)
class Categorical:
    """Every chain draws one of its candidates by exp(value / temperature). Built by `categorical`."""

    def __call__(self, choice: Choice) -> Tensor:
        noise = choice.key.fold("choose").at(choice.k).gumbel(choice.values.shape, device=choice.values.device)
        return _of_chains(log_potential(choice.values, choice.temperature) + noise, choice.particles)


@dataclass(frozen=True)
class Top:
    """The N best of all candidates, best first. Built by `top`."""

    def __call__(self, choice: Choice) -> Tensor:
        ranked = torch.sort(choice.values, dim=1, descending=True, stable=True).indices
        return ranked[:, : choice.particles]


@dataclass(frozen=True)
class ReplaceWorst:
    """`inner`, then the worst share of the chains becomes copies of others. Built by `replace_worst`."""

    inner: Selection
    share: float

    def __call__(self, choice: Choice) -> Tensor:
        index = self.inner(choice)
        count = math.ceil(self.share * choice.particles - 1e-9)
        if count == 0 or not choice.separable:
            return index
        values = choice.values.gather(1, index)
        worst = torch.sort(values, dim=1, stable=True).indices[:, :count]
        log_weight = _finite_somewhere(log_potential(values, choice.temperature))
        noise = choice.key.fold("replace").at(choice.k)
        drawn = log_weight[:, None] + noise.gumbel((len(values), count, values.shape[1]), device=values.device)
        return index.scatter(1, worst, index.gather(1, drawn.argmax(2)))


Score = Callable[[Tensor, PathState], Tensor]
"""(values (B, M), what the paths remember) -> what breadth-first search weighs states by."""
Temper = Callable[[int, int], float]
"""(k, steps) -> factor on score / temperature at level k; inf keeps only the best."""


def current(values: Tensor, path: PathState) -> Tensor:
    """The value itself."""
    return values


def difference(values: Tensor, path: PathState) -> Tensor:
    """What the value gained since the last choice."""
    before = path.value
    if before is None:
        return values
    # From a forbidden prediction anything is a gain; from one to another, none.
    return torch.where(before == -torch.inf, values, values - before)


def highest(values: Tensor, path: PathState) -> Tensor:
    """The highest value on the path so far."""
    return values if path.highest is None else torch.maximum(values, path.highest)


def constant(k: int, steps: int) -> float:
    """No tempering: 1 at every level."""
    return 1.0


def increase(k: int, steps: int) -> float:
    """min((1 + gamma)^k - 1, 1), reaching 1 at 87 % of the levels (gamma = .008 at 100 steps, as DAS)."""
    return min(math.expm1(math.log(2.0) * k / (0.87 * steps)), 1.0)


def infinite(k: int, steps: int) -> float:
    """All children to the best."""
    return math.inf


@dataclass(frozen=True)
class Proportional:
    """Child counts by resampling exp(temper(k) score / temperature). Built by `proportional`."""

    score: Score
    temper: Temper
    resampler: Resampler

    def __call__(self, choice: Choice) -> Tensor:
        if not choice.separable and choice.values.shape[1] == choice.particles:
            place = torch.arange(choice.particles, device=choice.values.device)
            return place.expand(len(choice.values), -1)
        score = self.score(choice.values, choice.path)
        strength = self.temper(choice.k, choice.steps)
        if strength == math.inf:
            log_weight = torch.where(score == score.amax(1, keepdim=True), 0.0, -math.inf)
        elif strength == 0.0:
            log_weight = torch.where(score == -torch.inf, score, 0.0)
        else:
            log_weight = strength * log_potential(score, choice.temperature)
        key = choice.key.fold("resample").at(choice.k)
        return self.resampler(_finite_somewhere(log_weight), key, choice.particles)


def argmax() -> Argmax:
    """Every chain's best candidate: CoDe, and SVDD as released."""
    return Argmax()


def categorical() -> Categorical:
    """One candidate per chain, drawn by exp(value / temperature): SVDD, Alg. 1."""
    return Categorical()


def top() -> Top:
    """The N best of all N M candidates: TreeG, beam search."""
    return Top()


def replace_worst(inner: Selection, share: float) -> Selection:
    """`inner`, after which the worst share of chains is replaced by draws from all by exp(value / temperature).

    SVDD-R (Alg. 2) with share in [0, 1]; 1 resamples everyone, the released code .03 to .05. 0 is `inner` itself.
    """
    if not 0.0 <= share <= 1.0:
        raise SteerError(f"the share of chains to replace is in [0, 1], got {share}")
    return ReplaceWorst(inner, share) if share > 0.0 else inner


def proportional(*, score: Score = highest, temper: Temper = increase, resampler: Resampler = ssp) -> Proportional:
    """Children in proportion to exp(temper score / temperature), N in all: breadth-first search.

    score: `highest` ("max"), `difference` or `current`. temper: `constant`, `increase` or `infinite`. resampler: any of
    steer's. The defaults are the best setting of 2505.23614, which sees FK-steering as (highest, constant,
    multinomial), DAS as (difference, increase, ssp), SVDD as (current, infinite, multinomial).
    Differs from its released code: the counts sum to N, where round(N softmax) drifts. Where copies could not part any
    more the population is left as it is.
    """
    return Proportional(score, temper, resampler)


def _of_chains(scores: Tensor, particles: int) -> Tensor:
    """Index (B, N) of each chain's highest candidate in scores (B, M N)."""
    candidates = scores.view(len(scores), -1, particles)
    return candidates.argmax(1) * particles + torch.arange(particles, device=scores.device)


def _finite_somewhere(log_weight: Tensor) -> Tensor:
    """Log-weights, equal in problems where every prediction is forbidden: those say nothing certain of samples."""
    return log_weight.masked_fill((log_weight == -torch.inf).all(1, keepdim=True), 0.0)
