"""Weighted sums of rewards, with units: kilobytes are not added to nats unless someone says at what rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.types import QuadraticForm, RewardSpec

from .scoring import Scorer, joined, name_of, needs_prompts, score, score_part, signature, spec_of


class Term(NamedTuple):
    """One part of a sum: weight * reward, in `unit`; `name` is unique within the sum."""

    weight: float
    reward: Scorer
    name: str
    unit: str | None


@dataclass(frozen=True, eq=False)
class Weighted:
    """A sum of weighted rewards. Built by `weighted`, which checks the units.

    terms: the parts. spec: of the sum; its unit is None where no part declares one.
    """

    terms: tuple[Term, ...]
    spec: RewardSpec

    def __post_init__(self) -> None:
        # What `inspect.signature` answers for this object; a class has one `__call__`, but only some sums take prompts.
        needed = any(needs_prompts(term.reward) for term in self.terms)
        object.__setattr__(self, "__signature__", signature(self.spec.prompts, needed))

    @property
    def __name__(self) -> str:
        return " + ".join(f"{term.weight:g}*{term.name}" for term in self.terms)

    def __call__(self, samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        """Scores (M,), on the samples' device. Where a part of weight >= 0 is -inf, so is the sum.

        Raises NotDifferentiableError where a gradient is recorded and a part has none: half a gradient would pass for
        the whole.
        """
        weighed = [self._weigh(term, samples, prompts) for term in self.terms]
        forbidden = [w == -torch.inf for term, w in zip(self.terms, weighed, strict=True) if term.weight >= 0.0]
        total = sum(weighed[1:], start=weighed[0])
        # Also next to a part of negative weight that is -inf, where the sum itself would be NaN.
        return total.masked_fill(torch.stack(forbidden).any(0), -torch.inf) if forbidden else total

    def _weigh(self, term: Term, samples: Tensor, prompts: Sequence[str] | None) -> Tensor:
        if term.weight:
            return term.weight * score_part(self.__name__, term.name, term.reward, samples, prompts)
        # A weight of zero silences a part but does not lift what it forbids; 0 * -inf would be NaN.
        with torch.no_grad():
            scores = score(term.reward, samples, prompts).to(samples.device)
            return scores.where(scores == -torch.inf, 0.0 * scores)

    def parts(self, samples: Tensor, *, prompts: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Each part's own scores (M,) by name, unweighted and in the part's own unit."""
        return {term.name: score(term.reward, samples, prompts) for term in self.terms}

    def quadratic_form(self, dim: int) -> QuadraticForm:
        """The coefficients of the sum, where every part has them; RewardError naming the first part that has not."""
        matrix, vector = torch.zeros(dim, dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
        constant = 0.0
        for term in self.terms:
            tell = getattr(term.reward, "quadratic_form", None)
            if tell is None:
                raise RewardError(
                    f"exact answers need every part to have a method quadratic_form(dim), as rewards.Linear and "
                    f"rewards.Quadratic do; {term.name} has none"
                )
            form = tell(dim)
            matrix, vector = matrix + term.weight * form.matrix, vector + term.weight * form.vector
            constant += term.weight * form.constant
        return QuadraticForm(matrix, vector, constant)


def weighted(*terms: tuple[float, Scorer] | tuple[float, Scorer, str]) -> Weighted:
    """The sum of weight * reward over terms (weight, reward) or (weight, reward, rate).

        weighted((1.0, DigitLogProb(3)), (0.5, JPEGSize(), "nat/kB"))

    rate: what one unit of the weight is, "out/in": the term above is worth 0.5 nat per kB. "in" must be the unit that
    the reward declares. For a reward that declares none, "out" alone says what unit its weighted scores are in.
    All terms must end in one unit, which is the unit of the sum (and of a sampler's temperature).
    Scores (M,); prompts (M) reach the parts that name them; differentiable if every part is.
    Raises RewardError for terms of different units (naming both and the cure) and malformed terms.
    """
    if not terms:
        raise RewardError("weighted(...) needs at least one term (weight, reward), got none")
    names = _unique([name_of(_reward(term)) for term in terms])
    checked = tuple(_term(term, name) for term, name in zip(terms, names, strict=True))
    first = checked[0]
    for term in checked[1:]:
        if term.unit != first.unit:
            cured, unit = (term, first.unit) if first.unit else (first, term.unit)
            raise RewardError(
                f"weighted(...) cannot add {_spell(term)} to {_spell(first)}; say what unit the weight converts to, "
                f'for instance ({cured.weight:g}, {cured.name}, "{_rate(unit, spec_of(cured.reward).unit)}")'
            )
    heard, silenced = ([t for t in checked if bool(t.weight) is wanted] for wanted in (True, False))
    ends = [sorted(term.weight * bound for bound in spec_of(term.reward).bounds) for term in heard]
    bounds = float(sum(low for low, _ in ends)), float(sum(high for _, high in ends))
    judges = [term.reward for term in silenced]  # they may forbid, and take part in no gradient
    return Weighted(checked, joined([term.reward for term in heard], first.unit, bounds, judges))


def _reward(term: Any) -> Scorer:
    if not (
        isinstance(term, tuple)
        and len(term) in (2, 3)
        and isinstance(term[0], int | float)
        and math.isfinite(term[0])
        and callable(term[1])
        and all(isinstance(rate, str) for rate in term[2:])
    ):
        raise RewardError(f'a term is (finite weight, reward) or (finite weight, reward, "out/in"), got {term!r}')
    return term[1]


def _term(term: Any, name: str) -> Term:
    weight, reward, rate = float(term[0]), term[1], term[2] if len(term) == 3 else None
    declared = spec_of(reward).unit
    if rate is None:
        return Term(weight, reward, name, declared)
    out, slash, per = (piece.strip() for piece in rate.partition("/"))
    if not out or (bool(slash) and not per) or (declared is not None and per != declared):
        raise RewardError(
            f'the weight of {name} must be given as "{_rate(out or "nat", declared)}", as {name} is in '
            f"{declared or 'no declared unit'}, got {rate!r}"
        )
    return Term(weight, reward, name, out)


def _rate(unit: str | None, declared: str | None) -> str:
    return f"{unit}/{declared}" if declared else str(unit)


def _spell(term: Term) -> str:
    return f"{term.name} (in {term.unit or 'no declared unit'})"


def _unique(names: list[str]) -> list[str]:
    """Names with repeated ones numbered: a, b, a 2."""
    unique: list[str] = []
    for name in names:
        candidates = (name if number == 1 else f"{name} {number}" for number in count(1))
        unique.append(next(candidate for candidate in candidates if candidate not in unique))
    return unique
