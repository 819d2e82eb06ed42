"""Population search: in every block, draw candidates of each chain, evaluate each once, keep N.

The noise of candidate m of chain n is named by slot m N + n: more candidates, another number of them per level, or
larger chunks rename none of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer.core.checkpoints import Checkpoints
from steer.core.loop import Loop, completed
from steer.core.run import Run
from steer.core.trajectory import LevelRecord, Trajectory, required
from steer.results.result import Result

from ..budget import CandidatePlan, draws_between
from ..selection import Choice, Selection
from ..values import Value, X0Hat, evaluate


def population_search(run: Run, plan: CandidatePlan, value: Value, selection: Selection, keep: int | None) -> Result:
    """Runs the blocks of a plan.

    Args:
        run: the method's run.
        plan: N chains and the blocks they go through.
        value: what candidates are judged by.
        selection: which of them are kept.
        keep: how many of the finished samples share the weight; None: all.

    Returns:
        Result with the N samples of every problem, or where it was stopped their predictions.
    """
    history: list[LevelRecord] = []
    count, noise = plan.particles, run.key.fold("step")
    kept = Checkpoints(run, run.begin(count * plan.blocks[0].width), plan, value, selection, seen=history)
    state = kept.state
    loop = Loop(run, state)

    def step(state: Trajectory) -> Trajectory:
        model = run.process.transition(state.x, required(state.cache.x0), state.k)
        return loop.stepped(state, state.step(model, noise))

    with loop.keeping_partial(), torch.no_grad():
        with loop.steps():
            for i in range(kept.carried.get("choices", 0), len(plan.blocks)):
                block = plan.blocks[i]
                if state.k < block.first:
                    loop.predicted(state)
                    state = step(_copies(state, block.width))
                while state.k < block.last:
                    kept.reached(state, choices=i)
                    state = step(loop.predicted(run.predicted(state)))
                next_choice = plan.blocks[min(i + 1, len(plan.blocks) - 1)].last
                state = _select_candidates(
                    run, state, loop.last_predicted, value, selection, count, next_choice, history
                )
                kept.reached(state, choices=i + 1)
        if loop.interrupted:
            last = loop.last_predicted
            assert last is not None  # else the interrupt would have gone on to the caller
            x = completed(last).x
            scores = run.score(x, "of the predictions") if last.cache.score is None else last.cache.score
            return Result.from_search(run, x, scores, last.root, keep=keep, seen=history, interrupted=True)
    return Result.from_search(run, state.x, required(state.path.value), state.root, keep=keep, seen=history[:-1])


def _select_candidates(
    run: Run,
    state: Trajectory,
    before: Trajectory | None,
    value: Value,
    selection: Selection,
    count: int,
    next_choice: int,
    history: list[LevelRecord],
) -> Trajectory:
    """N of the candidates, with their predictions. next_choice: level of the choice after this one."""
    process, k = run.process, state.k
    if k == process.steps:
        scores = _final_scores(run, state, before)
    else:
        x0, scores = evaluate(run, state.x, k, value)
        state = state.with_step_cache(x0=x0, score=scores if isinstance(value, X0Hat) else None)
    history.append(LevelRecord(k, torch.full_like(scores[:, 0], float(count)), scores))
    choice = Choice(
        values=scores,
        path=state.path,
        particles=count,
        temperature=run.temperature,
        k=k,
        steps=process.steps,
        separable=draws_between(process, k, next_choice),
        key=run.key,
    )
    highest = scores if state.path.highest is None else torch.maximum(state.path.highest, scores)
    state = state.with_path_state(value=scores, highest=highest).select(selection(choice))
    return state if k == process.steps or state.cache.x0 is not None else run.predicted(state)


def _final_scores(run: Run, state: Trajectory, before: Trajectory | None) -> Tensor:
    """Rewards of finished samples; known already where the last step went to the prediction that was scored."""
    if before is None or before.cache.score is None or before.x.shape[:2] != state.x.shape[:2]:
        return run.score(state.x)
    known = not run.process.stochastic(before.k) and torch.equal(completed(before).x, state.x)
    return before.cache.score if known else run.score(state.x)


def _copies(state: Trajectory, width: int) -> Trajectory:
    """Every chain `width` times, candidate by candidate."""
    if width == 1:
        return state
    index = torch.arange(state.x.shape[1], device=state.x.device).repeat(width)
    return state.select(index.expand(state.x.shape[0], -1))
