"""Population searches without a tree: CoDe, breadth-first search, TreeG, beams with look-ahead."""

from __future__ import annotations

from steer.core.event import OnStep
from steer.core.run import Run
from steer.cost import check_counts
from steer.key import Key
from steer.results.result import Result
from steer.types import ReverseProcess, Reward

from ..budget import CandidateCount, plan_candidates
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
    candidates: CandidateCount = 1,
    block: int = 1,
    select: Selection | None = None,
    value: Value | None = None,
    keep: int = 1,
    chunk: int = 256,
    on_step: OnStep | None = None,
) -> Result:
    """The best of N chains, of which a selection keeps N among N M candidates after every `block` draws.

        for each block of draws:    from every chain n, M candidates go through the block
                                    keep N of the N M by their values, with `select`

    The papers' methods, and the cost of each per problem in network rows (K = process.steps, values from x0_hat):

        breadth-first (2505.23614)   beam(particles=8, block=25, temperature=...)                          N K
        CoDe (2502.00968)            beam(particles=1, candidates=40, block=5, select=argmax())            N M K
        TreeG (2502.11420)           beam(particles=2, candidates=8, select=top())                         N M K
        DLBS (2501.19252)            beam(particles=2, candidates=4, select=top(), value=look_ahead(6))    N M 7 K
        SVDD, argmax (2408.08252)    beam(particles=1, candidates=20, select=argmax())                     N M K
        best-of-N                    beam(candidates=1, block=K + 1)                                       N K

    Args:
        process: the model as a reverse process; its weights are not changed.
        reward: samples [M, ...] to scores [M], in any unit. Higher is better, -inf forbids a sample.
        batch: B, independent problems; a process conditioned on prompts or labels has its own number.
        particles: N >= 1 chains per problem, 16 by default.
        budget: network rows (NFE x batch rows) per problem, never exceeded; takes the place of `particles`, or of
            `candidates` where that is None.
        temperature: > 0, in units of the reward, for selections that draw or weight by exp(value / temperature).
        key: names all noise of the run, an integer or a `Key`.
        seed: the same as `key`, by its usual name; give one of them.
        candidates: M >= 1 per chain and block: a number, a function of the level of the choice, or None for what the
            budget pays for on N chains (8, and with a budget alone as many chains as could have 8).
        block: draws between choices; the prior is the first draw. K + 1 or K draws in one block is best-of-N.
        select: `selection.proportional()` by default: child counts by SSP resampling from the highest value on the
            path, increasingly sharp. Also `argmax()`, `categorical()`, `top()`, `replace_worst(rule, share)`.
        value: `values.x0_hat()` by default, `values.look_ahead(j)`, or `values.learned(f)`.
        keep: how many of the N finished samples, the best, share the weight.
        chunk: candidates evaluated at once; results do not depend on it.
        on_step: called with an `Event` of all candidates after every step. Raising `Stop`, or Ctrl-C, ends the search
            with the chains' predictions.

    Returns:
        Result with x [B, N, *event], reward [B, N], and log_weight [B, N]: equal weights on the `keep` best, zero on
        the rest. `seen` holds the values of all candidates at every choice. `law` is "none", log_evidence [B] is NaN.

    Raises:
        NotStochasticError: where M > 1 in several blocks and no step of the process draws noise.
        BudgetError, NonFiniteError, StateSpaceError, RewardError, ShapeError: as `search.svdd`.

    Cost: the table above, in network rows; one reward per candidate and choice.
    Source: Zhang et al. 2025 (breadth-first search; 100 steps, evaluated every 25), Singh et al. 2025 (CoDe), Guo et
        al. 2025 (TreeG, sampling the next state; A = particles, K = candidates), Oshima et al. 2025 (DLBS).
    Differs: candidates of the first block begin from noises of their own; a prediction serves value and next step;
        ties go to the earlier candidate; child counts sum to N. Their gradient-guided proposals (TreeG-G) are left out.
    """
    check_counts(keep=keep)
    value, rule = value or x0_hat(), select or proportional()
    run = Run.open(
        "beam",
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
        block=block,
        candidates=candidates,
        particles=particles,
        budget=budget,
        default_candidates=8,
        default_particles=16,
    )
    return population_search(run, plan, value, rule, keep=keep)
