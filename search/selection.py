"""Which candidates a population search keeps: rules for `beam`, and what `svdd` is made of.

A rule is a small frozen callable. Candidates are ordered candidate by candidate: candidate m of chain n stands at index
m N + n.
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
    """What there is to choose from at level k of K = `steps`.

    values:      values of the candidates, [B, M N] float64, in units of the reward; higher is better.
    path:        what the candidates' paths remember, [B, M N] each: `path.value`, the value at the choice before this
                 one, and `path.highest`, the highest value so far; both None at the first choice.
    particles:   N, how many are kept.
    temperature: of the run, in units of the reward.
    k, steps:    level of the choice, and the level of the data.
    separable:   whether copies of a candidate would separate before the next choice.
    key:         names the random draws of this choice.
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
    """A rule that keeps N of the candidates; one of them may be kept several times."""

    def __call__(self, choice: Choice) -> Tensor:
        """Indices [B, N] into the candidates, int64."""
        ...


@dataclass(frozen=True)
class Argmax:
    """Every chain keeps its best candidate (the first of equals). Built by `argmax`."""

    def __call__(self, choice: Choice) -> Tensor:
        return _best_per_chain(choice.values, choice.particles)


@dataclass(frozen=True)
class Categorical:
    """Every chain draws one of its candidates, by exp(value / temperature). Built by `categorical`."""

    def __call__(self, choice: Choice) -> Tensor:
        noise = choice.key.fold("choose").at(choice.k).gumbel(choice.values.shape, device=choice.values.device)
        return _best_per_chain(log_potential(choice.values, choice.temperature) + noise, choice.particles)


@dataclass(frozen=True)
class Top:
    """The N best of all candidates, best first. Built by `top`."""

    def __call__(self, choice: Choice) -> Tensor:
        ranked = torch.sort(choice.values, dim=1, descending=True, stable=True).indices
        return ranked[:, : choice.particles]


@dataclass(frozen=True)
class ReplaceWorst:
    """`inner`, then copies of others in place of the worst share of the chains. Built by `replace_worst`."""

    inner: Selection
    share: float

    def __call__(self, choice: Choice) -> Tensor:
        index = self.inner(choice)
        count = math.ceil(self.share * choice.particles - 1e-9)
        if count == 0 or not choice.separable:
            return index
        values = choice.values.gather(1, index)
        worst = torch.sort(values, dim=1, stable=True).indices[:, :count]
        log_weight = _equal_where_all_forbidden(log_potential(values, choice.temperature))
        noise = choice.key.fold("replace").at(choice.k)
        drawn = log_weight[:, None] + noise.gumbel((len(values), count, values.shape[1]), device=values.device)
        return index.scatter(1, worst, index.gather(1, drawn.argmax(2)))


Score = Callable[[Tensor, PathState], Tensor]
"""(values [B, M], what the paths remember) -> what breadth-first search weights states by, [B, M]."""
Temper = Callable[[int, int], float]
"""(k, steps) -> factor on score / temperature at level k; inf keeps only the best."""


def current(values: Tensor, path: PathState) -> Tensor:
    """The value itself: a score for `proportional`.

    Args:
        values: values of the candidates, [B, M].
        path: what their paths remember, not used.

    Returns:
        `values`.
    """
    return values


def difference(values: Tensor, path: PathState) -> Tensor:
    """What the value gained since the last choice: a score for `proportional`.

    Args:
        values: values of the candidates, [B, M].
        path: what their paths remember; `path.value`, [B, M], is the value at the last choice, None at the first.

    Returns:
        The gains, [B, M]; at the first choice the values themselves.
    """
    before = path.value
    if before is None:
        return values
    # After a forbidden prediction (-inf) the whole value counts as gain, and -inf again stays -inf.
    return torch.where(before == -torch.inf, values, values - before)


def highest(values: Tensor, path: PathState) -> Tensor:
    """The highest value on the path so far: a score for `proportional`, its default.

    Args:
        values: values of the candidates, [B, M].
        path: what their paths remember; `path.highest`, [B, M], is the highest value before, None at the first choice.

    Returns:
        The running maxima, [B, M].
    """
    return values if path.highest is None else torch.maximum(values, path.highest)


def constant(k: int, steps: int) -> float:
    """No tempering: 1 at every level. For `proportional(temper=constant)`.

    Args:
        k: level of the choice.
        steps: level of the data.

    Returns:
        1.
    """
    return 1.0


def increase(k: int, steps: int) -> float:
    """Tempering that rises, min((1 + gamma)^k - 1, 1): the default of `proportional`.

    Args:
        k: level of the choice.
        steps: level of the data.

    Returns:
        0 at level 0, rising to 1 at 87 % of the levels (gamma = .008 at 100 steps, as in DAS), and 1 from there on.

    Source: Kim et al. 2025 (DAS, 2501.05803), its tempering; Zhang et al. 2025 (2505.23614).
    """
    return min(math.expm1(math.log(2.0) * k / (0.87 * steps)), 1.0)


def infinite(k: int, steps: int) -> float:
    """No temperature: every child goes to the best. For `proportional(temper=infinite)`.

    Args:
        k: level of the choice.
        steps: level of the data.

    Returns:
        inf.
    """
    return math.inf


@dataclass(frozen=True)
class Proportional:
    """Child counts by resampling exp(temper(k) score / temperature). Built by `proportional`."""

    score: Score
    temper: Temper
    resampler: Resampler

    def __call__(self, choice: Choice) -> Tensor:
        if not choice.separable and choice.values.shape[1] == choice.particles:
            unchanged = torch.arange(choice.particles, device=choice.values.device)
            return unchanged.expand(len(choice.values), -1)
        score = self.score(choice.values, choice.path)
        strength = self.temper(choice.k, choice.steps)
        if strength == math.inf:
            log_weight = torch.where(score == score.amax(1, keepdim=True), 0.0, -math.inf)
        elif strength == 0.0:
            log_weight = torch.where(score == -torch.inf, score, 0.0)
        else:
            log_weight = strength * log_potential(score, choice.temperature)
        key = choice.key.fold("resample").at(choice.k)
        return self.resampler(_equal_where_all_forbidden(log_weight), key, choice.particles)


def argmax() -> Argmax:
    """Every chain keeps its best candidate, the first of equals.

    Returns:
        A rule for `beam(select=)`.

    Source: Singh et al. 2025 (CoDe, 2502.00968); Li et al. 2024 (SVDD, 2408.08252), the released code.
    """
    return Argmax()


def categorical() -> Categorical:
    """Every chain draws one of its candidates, by exp(value / temperature).

    Returns:
        A rule for `beam(select=)`.

    Source: Li et al. 2024 (SVDD, 2408.08252), Alg. 1.
    """
    return Categorical()


def top() -> Top:
    """The N best of all N M candidates, whichever chains they are of; equals in their order.

    Returns:
        A rule for `beam(select=)`.

    Source: Guo et al. 2025 (TreeG, 2502.11420); Oshima et al. 2025 (DLBS, 2501.19252).
    """
    return Top()


def replace_worst(inner: Selection, share: float) -> Selection:
    """`inner`, after which the worst chains are replaced by draws from all chains, by exp(value / temperature).

    Args:
        inner: the rule by which every chain first keeps a candidate.
        share: share of the chains, the worst by value, that is replaced, in [0, 1]. 0 is `inner` itself, 1 resamples
            every chain; the released code has .03 to .05.

    Returns:
        A rule for `beam(select=)`. Where copies could not separate before the next choice it replaces none.

    Raises:
        SteerError: where the share is not in [0, 1].

    Source: Li et al. 2024 (SVDD, 2408.08252), Alg. 2 (SVDD-R).
    """
    if not 0.0 <= share <= 1.0:
        raise SteerError(f"the share of chains to replace must lie in [0, 1], got {share}")
    return ReplaceWorst(inner, share) if share > 0.0 else inner


def proportional(*, score: Score = highest, temper: Temper = increase, resampler: Resampler = ssp) -> Proportional:
    """Children in proportion to exp(temper(k) score / temperature), N in all: breadth-first search.

    Args:
        score: what candidates are weighted by: `highest` (the paper's "max"), `difference` or `current`.
        temper: factor on score / temperature by level: `constant`, `increase` or `infinite`.
        resampler: what turns weights into numbers of children, any of `steer.resamplers`.

    Returns:
        A rule for `beam(select=)`, whose default it is. Where copies could not separate any more, and there are as many
        candidates as chains, it leaves the population as it is.

    Source: Zhang et al. 2025 (2505.23614), breadth-first search. The defaults are the paper's best setting; it sees FK
        steering as (highest, constant, multinomial), DAS as (difference, increase, ssp), SVDD as (current, infinite,
        multinomial).
    Differs: from the released code, whose counts round(N softmax) need not sum to N; here they do.
    """
    return Proportional(score, temper, resampler)


def _best_per_chain(scores: Tensor, particles: int) -> Tensor:
    """Index [B, N] of each chain's highest candidate in scores [B, M N]."""
    candidates = scores.view(len(scores), -1, particles)
    return candidates.argmax(1) * particles + torch.arange(particles, device=scores.device)


def _equal_where_all_forbidden(log_weight: Tensor) -> Tensor:
    """Log-weights [B, N], set equal in problems where every prediction is forbidden: samples may yet be allowed."""
    return log_weight.masked_fill((log_weight == -torch.inf).all(1, keepdim=True), 0.0)
