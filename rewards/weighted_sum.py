"""Weighted sums of rewards, with units: kilobytes are added to nats only where a conversion rate is given."""

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

from .scoring import Scorer, combined_spec, name_of, needs_prompts, reward_signature, score, score_part, spec_of


class Term(NamedTuple):
    """One term of a sum: weight * reward.

    Args:
        weight: finite.
        reward: the part.
        name: of the part, unique within the sum.
        unit: of weight * reward; None where it has none.
    """

    weight: float
    reward: Scorer
    name: str
    unit: str | None


@dataclass(frozen=True, eq=False)
class Weighted:
    """A sum of weighted rewards. Built by `weighted`, which checks the units.

    Called with samples `[M, ...]` and, where a part takes them, M prompts.

    Args:
        terms: the parts and their weights.
        spec: of the sum; its unit is None where no part declares one.

    Returns:
        Scores `[M]` on the samples' device. Where a part of weight >= 0 is -inf, so is the sum.

    Raises:
        NotDifferentiableError: where a gradient is requested and a part has none. Otherwise the gradient of the other
            parts would be taken for that of the sum.
    """

    terms: tuple[Term, ...]
    spec: RewardSpec

    def __post_init__(self) -> None:
        # `inspect.signature` of this object. The class has one `__call__`, but only some sums take prompts.
        needed = any(needs_prompts(term.reward) for term in self.terms)
        object.__setattr__(self, "__signature__", reward_signature(self.spec.prompts, needed))

    @property
    def __name__(self) -> str:
        return " + ".join(f"{term.weight:g}*{term.name}" for term in self.terms)

    def __call__(self, samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        weighted_scores = [self._weighted_score(term, samples, prompts) for term in self.terms]
        forbidden = [
            scores == -torch.inf for term, scores in zip(self.terms, weighted_scores, strict=True) if term.weight >= 0.0
        ]
        total = sum(weighted_scores[1:], start=weighted_scores[0])
        # Also next to a part of negative weight that is -inf, where the sum itself would be NaN.
        return total.masked_fill(torch.stack(forbidden).any(0), -torch.inf) if forbidden else total

    def _weighted_score(self, term: Term, samples: Tensor, prompts: Sequence[str] | None) -> Tensor:
        """weight * score of one term; of a term of weight 0 only what it forbids."""
        if term.weight:
            return term.weight * score_part(self.__name__, term.name, term.reward, samples, prompts)
        # What a part of weight 0 forbids stays forbidden; 0 * -inf would be NaN.
        with torch.no_grad():
            scores = score(term.reward, samples, prompts).to(samples.device)
            return scores.where(scores == -torch.inf, 0.0 * scores)

    def parts(self, samples: Tensor, *, prompts: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Each part's own scores, unweighted and in the part's own unit.

        Args:
            samples: `[M, ...]`.
            prompts: M strings, for the parts that take them.

        Returns:
            Scores `[M]` by the name of the part.

        Raises:
            RewardError: where a part fails, naming it.
        """
        return {term.name: score(term.reward, samples, prompts) for term in self.terms}

    def quadratic_form(self, dim: int) -> QuadraticForm:
        """The coefficients A, b, c of the sum as -x'Ax/2 + b'x + c, where every part has them.

        Args:
            dim: D, numbers in a sample.

        Returns:
            A `[D, D]`, b `[D]` and c, float64.

        Raises:
            RewardError: naming the first part that has none.
        """
        matrix, vector = torch.zeros(dim, dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
        constant = 0.0
        for term in self.terms:
            form_of_part = getattr(term.reward, "quadratic_form", None)
            if form_of_part is None:
                raise RewardError(
                    f"exact answers need every part to have a method quadratic_form(dim), as rewards.Linear and "
                    f"rewards.Quadratic do; {term.name} has none: leave it out, or sample instead"
                )
            form = form_of_part(dim)
            matrix, vector = matrix + term.weight * form.matrix, vector + term.weight * form.vector
            constant += term.weight * form.constant
        return QuadraticForm(matrix, vector, constant)


def weighted(*terms: tuple[float, Scorer] | tuple[float, Scorer, str]) -> Weighted:
    """The sum of weight * reward, with units checked.

        weighted((1.0, DigitLogProb(3)), (0.5, JPEGSize(), "nat/kB"))

    All terms must end in one unit, which is the unit of the sum (and of a sampler's temperature).

    Args:
        terms: (weight, reward) or (weight, reward, rate). The rate "out/in" is the unit of the weight: the second term
            above is worth 0.5 nat per kB. "in" must be the unit that the reward declares. For a reward that declares
            none, "out" alone says what unit its weighted scores are in.

    Returns:
        A reward with scores `[M]`, differentiable if every part is. Prompts reach the parts that take them.

    Raises:
        RewardError: for terms of different units (naming both, and the cure) and malformed terms.
    """
    if not terms:
        raise RewardError("weighted(...) needs at least one term (weight, reward), got none")
    names = _unique([name_of(_reward_of(term)) for term in terms])
    checked = tuple(_term(term, name) for term, name in zip(terms, names, strict=True))
    _check_units(checked)
    unit = checked[0].unit
    with_weight = [term for term in checked if term.weight]
    ends = [sorted(term.weight * bound for bound in spec_of(term.reward).bounds) for term in with_weight]
    bounds = float(sum(low for low, _ in ends)), float(sum(high for _, high in ends))
    # Parts of weight 0 may forbid samples, and take part in no gradient.
    of_weight_zero = [term.reward for term in checked if not term.weight]
    spec = combined_spec([term.reward for term in with_weight], unit, bounds, without_gradient=of_weight_zero)
    return Weighted(checked, spec)


def _check_units(terms: tuple[Term, ...]) -> None:
    """RewardError unless all terms are in one unit; it names the term to convert and how."""
    first = terms[0]
    for term in terms[1:]:
        if term.unit != first.unit:
            to_convert, unit = (term, first.unit) if first.unit else (first, term.unit)
            rate = _rate(unit, spec_of(to_convert.reward).unit)
            raise RewardError(
                f"weighted(...) cannot add {_with_unit(term)} to {_with_unit(first)}; say what unit the weight "
                f'converts to, for instance ({to_convert.weight:g}, {to_convert.name}, "{rate}")'
            )


def _reward_of(term: Any) -> Scorer:
    """The reward of a term as the user gave it; RewardError for a malformed term."""
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
    """A term as the user gave it, with its unit; RewardError for a rate that does not fit the reward's unit."""
    weight, reward = float(term[0]), term[1]
    declared = spec_of(reward).unit
    if len(term) == 2:
        return Term(weight, reward, name, declared)
    rate = term[2]
    unit, slash, per = (piece.strip() for piece in rate.partition("/"))
    if not unit or (bool(slash) and not per) or (declared is not None and per != declared):
        raise RewardError(
            f'the weight of {name} must be given as "{_rate(unit or "nat", declared)}", as {name} is in '
            f"{declared or 'no declared unit'}, got {rate!r}"
        )
    return Term(weight, reward, name, unit)


def _rate(unit: str | None, declared: str | None) -> str:
    """The rate that converts a declared unit to `unit`, as the user writes it."""
    return f"{unit}/{declared}" if declared else str(unit)


def _with_unit(term: Term) -> str:
    return f"{term.name} (in {term.unit or 'no declared unit'})"


def _unique(names: list[str]) -> list[str]:
    """Names with repeated ones numbered: a, b, a 2."""
    unique: list[str] = []
    for name in names:
        candidates = (name if number == 1 else f"{name} {number}" for number in count(1))
        unique.append(next(candidate for candidate in candidates if candidate not in unique))
    return unique
