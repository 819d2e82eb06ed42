"""Soft value-based decoding (SVDD): every step draws several candidates and keeps one by its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from steer.core.event import OnStep
from steer.core.run import Run
from steer.errors import SteerError
from steer.key import Key
from steer.results.result import Result
from steer.types import ReverseProcess, Reward

from ..budget import CandidateCount, plan_candidates
from ..selection import Selection, argmax, categorical, replace_worst
from ..values import Value, x0_hat
from .population_search import population_search

RULES: dict[str, Callable[[], Selection]] = {"categorical": categorical, "argmax": argmax}


def svdd(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    seed: int | None = None,
    candidates: CandidateCount = None,
    select: Literal["categorical", "argmax"] = "categorical",
    replace: float = 0.0,
    value: Value | None = None,
    chunk: int = 256,
    on_step: OnStep | None = None,
) -> Result:
    """N samples that follow the reward: at every level, M candidates per chain, of which one is kept.

        for k = 0..K, each chain n:    x^m ~ p(x_k | x_(k-1) = kept), m = 1..M        (the prior at k = 0)
                                       keep m ~ exp(v_k(x^m) / temperature)           (or the largest v_k)

    Args:
        process: the model as a reverse process; its weights are not changed.
        reward: samples [M, ...] to scores [M], in any unit. Higher is better, -inf forbids a sample.
        batch: B, independent problems; a process conditioned on prompts or labels has its own number.
        particles: N chains per problem, 1 by default; they do not interact unless replace > 0.
        budget: network rows (NFE x batch rows) per problem, never exceeded.
        temperature: > 0, in units of the reward: how sharply candidates are chosen.
        key: names all noise of the run, an integer or a `Key`.
        seed: the same as `key`, by its usual name; give one of them.
        candidates: M >= 1: a number, or a function of the level k. None is 20 without a budget, and with one as many
            as it pays for, on as many chains as could have 20. The released code draws one x at k = 0:
            `lambda k: 1 if k == 0 else 20`. A step without noise gets one candidate.
        select: "categorical", as in the paper, or "argmax", as in its released code: the limit of temperature -> 0.
        replace: share of chains in [0, 1], the worst by value, replaced after every choice by draws from all chains
            (SVDD-R).
        value: v_k(x): `values.x0_hat()` by default, `values.look_ahead(j)`, or `values.learned(f)`.
        chunk: candidates evaluated at once; results do not depend on it.
        on_step: called with an `Event` of all candidates after every step. Raising `Stop`, or Ctrl-C, ends the search
            with the chains' predictions.

    Returns:
        Result with x [B, N, *event], reward [B, N] and log_weight [B, N], equal weights. `seen` holds the values of all
        candidates, [B, N M] by level. `law` is "none", log_evidence [B] is NaN.

    Raises:
        NotStochasticError: where M > 1 and no step of the process draws noise.
        BudgetError: where the budget does not pay for one chain.
        NonFiniteError: where a value or a reward is NaN or +inf.
        StateSpaceError: where `values.look_ahead` is asked for on a process without a Gaussian path.
        RewardError: where the reward raises, or returns something that is not one number per sample.
        ShapeError: where the reward or a learned value returns another shape, or `batch` does not fit the process.
            Each error of a run under way has its last predictions in `.partial`, a Trajectory.

    Cost: per problem N sum_k M_k network rows, k < K = process.steps, and as many rewards (plus those of M x_0 per
        chain where the last step draws noise): one prediction per candidate, which the one kept takes along to its next
        step. With a learned value N K rows.
    Source: Li et al. 2024 (SVDD, 2408.08252), Algs. 1 and 2. Their temperature is .01 for images and .05 for molecules,
        M = 20 and 10. As M grows the distribution tends to p(x) exp(r(x) / temperature) if v is the soft value and
        replace = 0, with a bias of order 1 / M; r(x0_hat) is one only for linear rewards on Gaussian data. With
        replace > 0 chains follow high values beyond that, for any M: there is no such limit.
    Differs: M predictions per step, where the released code makes M + 1.
    """
    if select not in RULES:
        raise SteerError(f"select must be one of {', '.join(RULES)}, got {select!r}")
    rule, value = replace_worst(RULES[select](), replace), value or x0_hat()
    run = Run.open(
        "svdd",
        process,
        reward,
        batch=batch,
        temperature=temperature,
        key=key,
        seed=seed,
        on_step=on_step,
        chunk=chunk,
    )
    plan = plan_candidates(
        run.process,
        value,
        block=1,
        candidates=candidates,
        particles=particles,
        budget=budget,
        default_candidates=20,
        default_particles=1,
    )
    return population_search(run, plan, value, rule, keep=None)
