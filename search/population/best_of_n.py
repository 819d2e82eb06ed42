"""Best of N: the baseline of every search."""

from __future__ import annotations

from dataclasses import replace

import torch

from steer.core.chain import run_chain
from steer.core.event import OnStep
from steer.core.loop import Loop
from steer.core.objective import check_finite
from steer.core.run import Run
from steer.core.start import Start, prepared, prior
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

    particles: N per problem, 16 by default; or budget, network rows per problem, never exceeded.
    chunk:     samples per problem run at once. Memory and speed depend on it, results do not: noise is named by slot.
    on_step:   called after every step. Raising `Stop`, or an interrupt, ends the search with the samples finished so
               far and the predictions of the chunk under way: it is anytime.
    temperature is accepted for a common signature and changes nothing. log_evidence is NaN.
    Cost per problem: N K network rows and N rewards.
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
        chunk = count  # a start that spends rows of its own is paid for once, and a group is scored in one call
    samples, scores, interrupted = [], [], False
    for first in range(0, count, chunk):
        here = replace(run, key=run.key.shifted(slot=first), chunk=chunk)
        try:
            state = ready(run.process, run.objective, here.key, run.problems, min(chunk, count - first))
            loop = Loop(here, state)
            state = run_chain(loop, state, chunk=first)
        except (Stop, KeyboardInterrupt):
            if not samples:
                raise
            interrupted = True
            break
        loop.partial = replace(state, x=torch.cat([*samples, state.x], 1))
        with loop.keeping_partial(), torch.no_grad():
            score = run.objective(state.x)
            check_finite(score, "of the finished samples", first=first)
        samples.append(state.x)
        scores.append(score)
        interrupted = loop.interrupted
        if interrupted:
            break
    x, score = torch.cat(samples, 1), torch.cat(scores, 1)
    root = torch.arange(score.shape[1], device=score.device).expand_as(score)
    return Result.from_search(run, x, score, root, keep=keep, interrupted=interrupted)
