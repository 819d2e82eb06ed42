"""Population search: in every block, draw candidates of each chain, evaluate them, keep N."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.core.trajectory import Seen, Trajectory
from steer.errors import SteerError
from steer.results.result import Result
from steer.types import OnStep, Stop

from ..budget import Plan, _draws
from ..run import Run
from ..selection import Choice, Selection
from ..values import Value, X0Hat


def descend(
    run: Run, path: Plan, value: Value, selection: Selection, on_step: OnStep | None, keep: int | None
) -> Result:
    """Population search: in every block, draw candidates of each chain, evaluate them, keep N."""
    seen: list[Seen] = []
    paid: Trajectory | None = None  # the last states with their predictions, for runs that end early
    process, count = run.process, path.particles
    state = run.begin(count * path.blocks[0].width)
    try:
        with torch.no_grad():
            for i, block in enumerate(path.blocks):
                if i > 0:
                    paid = state
                    state = _stepped(run, _copies(state, block.width), on_step)
                for _ in range(block.first, block.last):
                    paid = state = state.carry(x0=run.predict(state.x, state.k))
                    state = _stepped(run, state, on_step)
                later = path.blocks[min(i + 1, len(path.blocks) - 1)].last
                state = _chosen(run, state, paid, value, selection, count, later, seen)
    except (Stop, KeyboardInterrupt):
        if paid is None:
            raise
        x = process.complete(paid.x, paid.carried["x0"])
        with torch.no_grad():
            scores = paid.carried["score"] if "score" in paid.carried else run.score(x, "of the predictions")
        return run.result(x, scores, paid.root, keep=keep, seen=seen, interrupted=True)
    except SteerError as error:
        error.keep(paid)
        raise
    return run.result(state.x, state.memory["value"], state.root, keep=keep, seen=seen[:-1])


def _chosen(
    run: Run, state: Trajectory, before: Trajectory | None, value: Value, selection: Selection, count: int, later: int,
    seen: list[Seen],
) -> Trajectory:  # fmt: skip
    """The candidates that go on to the choice at level `later`, N per problem, with their predictions."""
    process, k = run.process, state.k
    if k == process.steps:
        scores = _final_scores(run, state, before)
    else:
        x0, scores = run.evaluate(state.x, k, value)
        carried = {} if x0 is None else {"x0": x0}
        state = state.carry(**carried, **({"score": scores} if isinstance(value, X0Hat) else {}))
    seen.append(Seen(k, torch.full_like(scores[:, 0], float(count)), scores))
    index = selection(
        Choice(
            scores, state.memory, count, run.temperature, k, process.steps, _draws(process, k, later), run.key,
        )
    )  # fmt: skip
    best = torch.maximum(state.memory["highest"], scores) if "highest" in state.memory else scores
    state = state.remember(value=scores, highest=best).select(index)
    if k < process.steps and "x0" not in state.carried:
        state = state.carry(x0=run.predict(state.x, k))
    return state


def _final_scores(run: Run, state: Trajectory, before: Trajectory | None) -> Tensor:
    """Rewards of finished samples; known already where the last step went to the prediction that was scored."""
    if before is not None and "score" in before.carried and before.x.shape == state.x.shape:
        clean = run.process.complete(before.x, before.carried["x0"])
        if not run.process.stochastic(before.k) and torch.equal(clean, state.x):
            return before.carried["score"]
    return run.score(state.x)


def _stepped(run: Run, state: Trajectory, on_step: OnStep | None) -> Trajectory:
    state = run.step(state)
    if on_step is not None:
        on_step(state)
    return state


def _copies(state: Trajectory, width: int) -> Trajectory:
    """Every chain `width` times, candidate by candidate."""
    if width == 1:
        return state
    index = torch.arange(state.x.shape[1], device=state.x.device).repeat(width)
    return state.select(index.expand(state.x.shape[0], -1))
