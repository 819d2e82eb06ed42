"""What a budget pays for: the number of chains, and the candidates of every choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from steer.cost import affordable, check_counts
from steer.errors import NotStochasticError
from steer.key import Key
from steer.types import ReverseProcess

from .values import Value

CandidateCount = int | Callable[[int], int] | None
"""Candidates per chain: a number, a function of the level they stand at, or None for what the budget pays for."""


class SelectionBlock(NamedTuple):
    """Some steps with one choice at their end.

    first: level of the states that the block draws first.
    last:  level at which the choice is made.
    width: M, candidates per chain.
    """

    first: int
    last: int
    width: int


class CandidatePlan(NamedTuple):
    """N chains, and the blocks they go through from the prior to the data."""

    particles: int
    blocks: tuple[SelectionBlock, ...]


def plan_candidates(
    process: ReverseProcess,
    value: Value,
    *,
    block: int,
    candidates: CandidateCount,
    particles: int | None,
    budget: int | None,
    default_candidates: int,
    default_particles: int,
) -> CandidatePlan:
    """The numbers of chains and candidates that were asked for, or that a budget pays for.

    Args:
        process: the model.
        value: what candidates are judged by, which decides what one of them costs.
        block: draws between choices, the draw of the prior being the first; a last block that would be shorter joins
            the one before. Where no step of a block draws anything, one candidate is as good as many.
        candidates: M per chain and block; None lets the budget decide, after `default_candidates` of them have decided
            how many chains there are.
        particles: N chains per problem.
        budget: network rows (NFE x batch rows) per problem.
        default_candidates: M where neither `candidates` nor `budget` is given.
        default_particles: N where neither `particles` nor `budget` is given.

    Returns:
        The plan, whose cost never exceeds the budget.

    Raises:
        BudgetError: where the budget does not pay for one chain.
        NotStochasticError: where several candidates are asked for and no step draws noise.
        SteerError: where a count is not a whole number of at least 1.
    """
    check_counts(block=block)
    ends = [k for k in range(block - 1, process.steps, block) if process.steps - k >= block] + [process.steps]
    spans = list(zip([0, *(end + 1 for end in ends)], ends, strict=False))
    stochastic = [draws_between(process, max(0, first - 1), last) for first, last in spans]
    stochastic[0] = stochastic[0] or prior_is_random(process)
    costs = [_predictions_per_candidate(process, value, first, last) for first, last in spans]
    fixed = 0 if value.predicts else len(spans) - 1  # the states kept are predicted after the choice

    def widths(wanted: int | Callable[[int], int]) -> list[int]:
        each = [wanted(last) if callable(wanted) else wanted for _, last in spans]
        for width in each:
            check_counts(candidates=width)
        if max(each) > 1 and len(spans) > 1 and not any(stochastic[1:]):
            raise NotStochasticError(
                "candidates of one chain differ by the noise of its steps, and this process's transitions add none; "
                "use a stochastic rule, for instance process.with_rule(steer.ddim(eta=1.0)), or search over starting "
                "noises with search.noise_search"
            )
        return [width if draws else 1 for width, draws in zip(each, stochastic, strict=True)]

    def rows(each: Sequence[int]) -> int:
        return process.rows * (fixed + sum(width * cost for width, cost in zip(each, costs, strict=True)))

    if candidates is not None or budget is None:
        chosen = widths(default_candidates if candidates is None else candidates)
        count = affordable(rows(chosen), particles=particles, budget=budget, default=default_particles)
    else:
        chosen = widths(default_candidates)
        count = affordable(rows(widths(1)), particles=particles, budget=budget)
        count = particles or max(1, min(count, budget // rows(chosen)))
        if any(cost and draws for cost, draws in zip(costs, stochastic, strict=True)):
            chosen = _widths_for(budget // process.rows // count - fixed, costs, stochastic)
    return CandidatePlan(
        count, tuple(SelectionBlock(first, last, width) for (first, last), width in zip(spans, chosen, strict=True))
    )


def _predictions_per_candidate(process: ReverseProcess, value: Value, first: int, last: int) -> int:
    """Predictions of one candidate from level first to level last, where it is valued."""
    valued = 1 + value.extra(process, last) if value.predicts and last < process.steps else 0
    return last - first + valued


def _widths_for(calls: int, costs: Sequence[int], stochastic: Sequence[bool]) -> list[int]:
    """Candidates per block that `calls` predictions per chain pay for: equal, the first blocks one more while they can.

    costs: predictions per candidate of each block. stochastic: whether its candidates differ; else it gets one.
    """
    calls -= sum(cost for cost, draws in zip(costs, stochastic, strict=True) if not draws)
    width, left = divmod(calls, sum(cost for cost, draws in zip(costs, stochastic, strict=True) if draws))
    each = []
    for cost, draws in zip(costs, stochastic, strict=True):
        more = draws and 0 < cost <= left
        left -= cost if more else 0
        each.append(width + more if draws else 1)
    return each


def prior_is_random(process: ReverseProcess) -> bool:
    """Whether the prior draws anything: chains of a masked process all begin with the same state."""
    first, second = process.prior(Key(0), process.problems or 1, 2).unbind(1)
    return not torch.equal(first, second)


def draws_between(process: ReverseProcess, first: int, last: int) -> bool:
    """Whether any step from level first to level last is stochastic."""
    return any(process.stochastic(k) for k in range(first, last))


def split_evenly(total: int, count: int) -> list[int]:
    """`total` in `count` whole parts that differ by at most one, the larger first."""
    return [total // count + (i < total % count) for i in range(count)]
