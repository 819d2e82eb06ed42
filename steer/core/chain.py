"""Plain chains: a population moved from level to level by the model's own transitions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..key import Key
from .loop import Loop
from .trajectory import Trajectory


def run_chain(
    loop: Loop,
    state: Trajectory,
    *,
    until: int | None = None,
    noise: Key | None = None,
    shared: int | None = None,
    chunk: int = 0,
    reached: Callable[[Trajectory], None] | None = None,
) -> Trajectory:
    """A population moved by the model's own transitions; stopped on the way, it stands at its last predictions.

    Args:
        loop: of the run; `loop.interrupted` says afterwards whether it was stopped.
        state: the population to begin from; a prediction that it carries is not made again.
        until: level to stop at, the data by default.
        noise: key of the steps' noise, the run's own by default.
        shared: N where candidates [B, M N] of N chains share the noise of their chain; None where each has its own.
        chunk: index of the first particle among those of the run.
        reached: called with the state after every step; see `Checkpoints`.
    """
    run = loop.run
    process, noise = run.process, noise or run.key.fold("step")
    loop.partial = state
    with loop.steps(), torch.no_grad():
        for _ in range(state.k, process.steps if until is None else until):
            before = loop.predicted(state if state.cache.x0 is not None else run.predicted(state))
            state = _stepped(before, noise, shared)
            loop.stepped(before, state, chunk, partial=state)
            if reached is not None:
                reached(state)
    return loop.ended(state)


def _stepped(state: Trajectory, noise: Key, shared: int | None) -> Trajectory:
    """One step on from a state that carries its prediction."""
    process, x0 = state.process, state.cache.x0
    assert x0 is not None
    if shared is None or shared == state.x.shape[1]:
        return state.step(process.transition(state.x, x0, state.k), noise)
    parts = zip(state.x.split(shared, 1), x0.split(shared, 1), strict=True)
    drawn = [process.transition(x, ahead, state.k).sample(noise.at(state.k)) for x, ahead in parts]
    return state.moved_to(torch.cat(drawn, 1))
