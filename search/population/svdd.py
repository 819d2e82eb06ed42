"""Soft value decoding (SVDD): every step draws several candidates and keeps one by its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from steer.core.event import OnStep
from steer.core.run import Run
from steer.errors import SteerError
from steer.key import Key
from steer.results.result import Result
from steer.types import ReverseProcess, Reward

from ..budget import Widths, plan_candidates
from ..selection import argmax, categorical, replace_worst
from ..values import Value, x0_hat
from .population_search import population_search

RULES: dict[str, Callable] = {"categorical": categorical, "argmax": argmax}


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
    candidates: Widths = None,
    select: Literal["categorical", "argmax"] = "categorical",
    replace: float = 0.0,
    value: Value | None = None,
    chunk: int = 256,
    on_step: OnStep | None = None,
) -> Result:
    """N samples that follow the reward: at every level, M candidates per chain, of which one goes on.

        for k = 0..K, each chain n:    x^m ~ p(x_k | x_{k-1} = chosen), m = 1..M      (the prior at k = 0)
                                       choose m ~ exp(v_k(x^m) / temperature)         (or the largest v_k)

    particles:   N chains per problem, which do not interact unless replace > 0.
    budget:      network rows per problem, never exceeded. With neither, 1 chain.
    candidates:  M >= 1: a number, or a function of the level k; None is 20 without a budget, and with one as many as
                 it pays for, on as many chains as could have 20. The released code draws one x at k = 0:
                 `lambda k: 1 if k == 0 else 20`. A step without noise gets one candidate.
    select:      "categorical" as in the paper; "argmax" as in its released code: temperature -> 0.
    replace:     share of chains, the worst by value, replaced after every choice by draws from all chains (SVDD-R).
    value:       v_k(x): `values.x0_hat()` by default, `values.look_ahead(j)`, or `values.learned(f)`.
    chunk:       candidates evaluated at once; results do not depend on it.
    on_step:     called with the candidates after every step; `Stop` or an interrupt returns the chains' predictions.

    Returns x (B, N, *event), reward and log_weight (B, N), equal weights; log_evidence NaN. `seen` holds the values of
    all candidates.
    Cost per problem: N sum_k M_k network rows, k < K, and as many rewards (plus those of M x_0 per chain where the
    last step draws noise): one prediction per candidate, which the chosen one takes along to its next step. With a
    learned value N K rows.
    Raises NotStochasticError for candidates without noise, BudgetError, NonFiniteError, RewardError, ShapeError.
    Source: Li et al. 2024 (2408.08252), Algs. 1 and 2. Differs: M predictions per step, where the released code makes
    M + 1. Their temperature is .01 for images and .05 for molecules, M = 20 and 10. As M grows the law tends to
    p(x) exp(r(x) / temperature) if v is the soft value, with a bias of order 1 / M; r(x0_hat) is one for linear rewards
    on Gaussian data only.
    """
    if select not in RULES:
        raise SteerError(f"select is one of {', '.join(RULES)}, got {select!r}")
    value, run = (
        value or x0_hat(),
        Run.open(
            "svdd",
            process,
            reward,
            batch=batch,
            temperature=temperature,
            key=key,
            seed=seed,
            on_step=on_step,
            chunk=chunk,
        ),
    )
    planned = plan_candidates(
        run.process, value, block=1, candidates=candidates, particles=particles, budget=budget, usual=20, default=1
    )
    return population_search(run, planned, value, replace_worst(RULES[select](), replace), keep=None)
