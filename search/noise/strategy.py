"""What strategies of noise search share: finished samples, and the chains that make them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from steer.core.trajectory import Trajectory
from steer.errors import SteerError
from steer.key import Key
from steer.processes.transitions import Normal
from steer.types import OnStep, ReverseProcess, Stop

from ..run import Run


class Found(NamedTuple):
    """What a strategy ends with: samples (B, n, *event), rewards (B, n), slots of their starting noise (B, n)."""

    x: Tensor
    reward: Tensor
    root: Tensor
    interrupted: bool = False


class Strategy(Protocol):
    """How noises are tried. Built by `random_search`, `zero_order`, `paths`, `epsilon_greedy`."""

    @property
    def chains(self) -> int:
        """Chains per problem where the caller says nothing."""
        ...

    def least(self, process: ReverseProcess) -> int:
        """Predictions that one chain needs at least."""
        ...

    def __call__(self, run: Run, particles: int, calls: int, on_step: OnStep | None) -> Found:
        """Searches with `calls` predictions per chain, on `particles` chains per problem."""
        ...


def starting_law(process: ReverseProcess, like: Tensor) -> Normal:
    """The prior N(mean, std^2) of a process on a Gaussian path, for states shaped like these."""
    mean, std = process.prior_moments  # type: ignore[attr-defined]
    return Normal(torch.zeros_like(like) + (0.0 if mean is None else mean), std)


def joined(*parts: Found) -> Found:
    """The samples of all parts, side by side."""
    x, reward, root = (torch.cat(tensors, 1) for tensors in zip(*(part[:3] for part in parts), strict=True))
    return Found(x, reward, root, parts[-1].interrupted)


def follow(run: Run, x: Tensor, chains: int | None, on_step: OnStep | None) -> Found:
    """Samples from starting states x (B, M N, *event), scored; stopped early, scored predictions.

    chains: N where the M candidates of a chain share its noise, None where nobody does.
    """
    state, interrupted = carried_on(
        run, Trajectory.begin(run.process, x), run.process.steps, run.key.fold("step"), on_step, chains
    )
    root = torch.arange(x.shape[1], device=x.device) % (chains or x.shape[1])
    try:
        with torch.no_grad():
            return Found(state.x, run.score(state.x), root.expand(x.shape[:2]), interrupted)
    except SteerError as error:
        error.keep(state)
        raise


def carried_on(
    run: Run, state: Trajectory, until: int, key: Key, on_step: OnStep | None, chains: int | None = None
) -> tuple[Trajectory, bool]:
    """A population at level `until`, or, where it was stopped on the way, its last predictions and True.

    It remembers the predictions of the level before as "clean".
    """
    process, clean, size = run.process, None, chains or state.x.shape[1]
    try:
        with torch.no_grad():
            for k in range(state.k, until):
                x0 = state.carried["x0"] if "x0" in state.carried else run.predict(state.x, k)
                clean = process.complete(state.x, x0)
                parts = zip(state.x.split(size, 1), x0.split(size, 1), strict=True)
                x = torch.cat([process.transition(part, ahead, k).sample(key.at(k)) for part, ahead in parts], 1)
                state = replace(state, x=x, k=k + 1, carried={}, memory={"clean": clean})
                if on_step is not None:
                    on_step(state)
    except (Stop, KeyboardInterrupt):
        if clean is None:
            raise
        return replace(state, x=clean), True
    return state, False
