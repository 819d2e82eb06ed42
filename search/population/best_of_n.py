"""Best of N: the baseline of every search."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from steer.core.chain import run_chain
from steer.core.checkpoints import Checkpoints
from steer.core.event import OnStep
from steer.core.loop import Loop, keeping
from steer.core.objective import FINISHED, from_column
from steer.core.run import Run
from steer.core.start import Start, prepared, prior, started
from steer.core.trajectory import Trajectory
from steer.cost import check_counts
from steer.key import Key
from steer.results.result import Result
from steer.types import ReverseProcess, Reward, Stop


def best_of_n(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    seed: int | None = None,
    keep: int = 1,
    chunk: int = 256,
    start: Start = prior,
    on_step: OnStep | None = None,
) -> Result:
    """N unsteered samples, ranked by final reward; the `keep` best share the weight.

        for n = 1..N:    x_0 ~ prior,    x_(k+1) ~ p(x_(k+1) | x_k) for k < K,    r_n = r(x_K)

    Args:
        process: the model as a reverse process; its weights are not changed.
        reward: samples [M, ...] to scores [M], in any unit. Higher is better, -inf forbids a sample.
        batch: B, independent problems; a process conditioned on prompts or labels has its own number.
        particles: N per problem, 16 by default.
        budget: network rows (NFE x batch rows) per problem, never exceeded; takes the place of `particles`, or checks
            it.
        temperature: accepted as by every method, in units of the reward; changes nothing, unless `start` reads it.
        key: names all noise of the run, an integer or a `Key`.
        seed: the same as `key`, by its usual name; give one of them.
        keep: how many of the N samples, the best, share the weight.
        chunk: samples per problem run at once. Memory and speed depend on it, results do not: every sample's noise is
            named by its index.
        start: where chains begin: `steer.prior`, or another start (`pcnl`, `mala`, `ula`, `top_k_of_n`), whose cost
            comes out of the budget; chains are then run in one chunk.
        on_step: called with an `Event` after every step of every chunk. Raising `Stop`, or Ctrl-C, ends the search with
            the samples finished so far and the predictions of the chunk under way; before any there is nothing to
            return, and it goes on to the caller.

    Returns:
        Result with x [B, N, *event], reward [B, N], and log_weight [B, N]: equal weights on the `keep` best, zero on
        the rest. `law` is "none", log_evidence [B] is NaN.

    Raises:
        BudgetError: where the budget does not pay for one sample.
        NonFiniteError: where a reward is NaN or +inf.
        RewardError: where the reward raises, or returns something that is not one number per sample.
        ShapeError: where the reward returns another shape, or `batch` does not fit the process.
        Whatever is raised has in `.partial` the chunks that are finished, a Result, or in the first chunk its states, a
        Trajectory.

    Cost: per problem N K network rows (K = process.steps) and N rewards.
    """
    check_counts(keep=keep)
    run = Run.open(
        "best_of_n",
        process,
        reward,
        batch=batch,
        temperature=temperature,
        key=key,
        seed=seed,
        on_step=on_step,
        groupwise=True,
        chunk=chunk,
    )
    ready, count = prepared(start, run.process, run.temperature, particles=particles, budget=budget)
    if ready is not start or run.objective.groupwise:
        chunk = count  # a start that spends rows is run once, and a groupwise reward scores its group in one call
    samples, scores, interrupted = list[Tensor](), list[Tensor](), False

    def so_far() -> Result:
        x, score = torch.cat(samples, 1), torch.cat(scores, 1)
        root = torch.arange(score.shape[1], device=score.device).expand_as(score)
        return Result.from_search(run, x, score, root, keep=keep, interrupted=interrupted)

    def begun(first: int) -> Trajectory:
        size, key = min(chunk, count - first), run.key.shifted(slot=first)
        return started(ready, run.process, run.objective, key, run.problems, size)

    kept = Checkpoints(run, begun(0), count, chunk)
    state: Trajectory | None = kept.state
    first = kept.carried.get("first", 0)
    for held, name in ((samples, "samples"), (scores, "scores")):
        held += [part.to(run.process.device) for part in kept.carried.get(name, [])]
    while first < count and not interrupted:
        loop = Loop(replace(run, key=run.key.shifted(slot=first), chunk=chunk))
        try:
            with keeping(lambda: replace(so_far(), interrupted=True) if samples else None), loop.keeping_partial():
                reached = partial(kept.reached, first=first, samples=samples, scores=scores)
                state = run_chain(loop, begun(first) if state is None else state, chunk=first, reached=reached)
                with torch.no_grad():
                    score = run.objective.of(from_column(first))(state.x, FINISHED)
        except (Stop, KeyboardInterrupt):
            if not samples:
                raise
            interrupted = True
            break
        samples.append(state.x)
        scores.append(score)
        first, state, interrupted = first + chunk, None, loop.interrupted
    return so_far()
