"""Plain chains: a population moved from level to level by the model's own transitions."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..key import Key
from ..types import OnStep, Stop
from .trajectory import Trajectory


def advance(state: Trajectory, key: Key, on_step: OnStep | None = None) -> tuple[Trajectory, bool]:
    """A population carried to the data by the model's own transitions, and whether it was stopped on the way.

    A stopped population stands at its last predictions of the data.
    """
    process, clean = state.process, None
    try:
        with torch.no_grad():
            for k in range(state.k, process.steps):
                x0 = process.denoise(state.x, k)
                clean = process.complete(state.x, x0)
                state = state.step(process.transition(state.x, x0, k), key.fold("step"))
                if on_step is not None:
                    on_step(state)
    except (Stop, KeyboardInterrupt):
        if clean is None:
            raise
        return replace(state, x=clean), True
    return state, False
