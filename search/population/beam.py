"""Population searches without a tree: CoDe, breadth-first search, TreeG, beams with look-ahead."""

from __future__ import annotations

from steer.core.event import OnStep
from steer.core.run import Run
from steer.cost import check_counts
from steer.key import Key
from steer.results.result import Result
from steer.types import ReverseProcess, Reward

from ..budget import Widths, plan_candidates
from ..selection import Selection, proportional
from ..values import Value, x0_hat
from .population_search import population_search


def beam(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    seed: int | None = None,
    candidates: Widths = 1,
    block: int = 1,
    select: Selection | None = None,
    value: Value | None = None,
    keep: int = 1,
    chunk: int = 256,
    on_step: OnStep | None = None,
) -> Result:
    """The best of N chains, of which every `block` draws a selection keeps N among N M candidates.

    particles:  N >= 1; or budget, network rows per problem, never exceeded. With neither, 16.
    candidates: M >= 1 per chain and block: a number, a function of the level of the choice, or None for what the budget
                pays for on N chains.
    block:      draws between choices; the prior is the first draw. K + 1 or K draws in one block is best-of-N.
    select:     `selection.proportional()` by default: child counts by SSP from the highest value on the path, with
                rising sharpness. Also `argmax()`, `categorical()`, `top()`, `replace_worst(rule, share)`.
    value:      `values.x0_hat()` by default, `values.look_ahead(j)`, `values.learned(f)`.
    keep:       how many of the N finished samples share the weight.
    chunk, on_step, returns, errors: as `search.svdd`.

    The papers' methods, and the cost of each per problem in network rows (K steps, values from x0_hat):

        breadth-first (2505.23614)   beam(particles=8, block=25, temperature=...)                          N K
        CoDe (2502.00968)            beam(particles=1, candidates=40, block=5, select=argmax())            N M K
        TreeG (2502.11420)           beam(particles=2, candidates=8, select=top())                         N M K
        DLBS (2501.19252)            beam(particles=2, candidates=4, select=top(), value=look_ahead(6))    N M 7 K
        SVDD, argmax (2408.08252)    beam(particles=1, candidates=20, select=argmax())                     N M K
        best-of-N                    beam(candidates=1, block=K + 1)                                       N K

    Source: Zhang et al. 2025 (breadth-first search; 100 steps, evaluated every 25), Singh et al. 2025 (CoDe), Guo et
    al. 2025 (TreeG, sampling the next state; A = particles, K = candidates), Oshima et al. 2025 (DLBS). Differs:
    candidates of the first block begin from noises of their own; a prediction serves value and next step; ties go to
    the earlier candidate; child counts sum to N. Their gradient-guided proposals (TreeG-G) are left out.
    """
    check_counts(keep=keep)
    value, run = (
        value or x0_hat(),
        Run.open(
            "beam",
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
        run.process, value, block=block, candidates=candidates, particles=particles, budget=budget, usual=8, default=16
    )
    return population_search(run, planned, value, select or proportional(), keep=keep)
