"""What strategies of noise search share: finished samples, and the chains that make them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from steer.core.chain import run_chain
from steer.core.loop import Loop
from steer.core.run import Run
from steer.core.trajectory import Trajectory
from steer.errors import StateSpaceError
from steer.processes.transitions import Normal
from steer.types import ReverseProcess


class StrategyResult(NamedTuple):
    """What a strategy ends with.

    x:           clean states, [B, n, *event].
    reward:      their scores, [B, n].
    root:        index of the starting noise that each came from, [B, n].
    interrupted: whether the search was stopped early.
    """

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

    def __call__(self, run: Run, particles: int, calls: int) -> StrategyResult:
        """The samples found.

        Args:
            run: of `noise_search`.
            particles: N chains per problem.
            calls: predictions that each chain may spend.
        """
        ...


def gaussian_prior(process: ReverseProcess, cure: str) -> tuple[Tensor | None, float]:
    """Mean (None for zero) and standard deviation of a process's prior; StateSpaceError where it is not Gaussian."""
    if process.prior_moments is None:
        raise StateSpaceError(
            "a search that moves its starting noise a little needs a Gaussian prior, which "
            f"{type(process).__name__} does not have; {cure}"
        )
    return process.prior_moments


def prior_of(process: ReverseProcess, like: Tensor, cure: str) -> Normal:
    """The prior N(mean, std^2) of a process, for states of the shape of `like`."""
    mean, std = gaussian_prior(process, cure)
    return Normal(torch.zeros_like(like) + (0.0 if mean is None else mean), std)


def concat(*parts: StrategyResult) -> StrategyResult:
    """The samples of all parts, side by side."""
    x, reward, root = (torch.cat(tensors, 1) for tensors in zip(*(part[:3] for part in parts), strict=True))
    return StrategyResult(x, reward, root, parts[-1].interrupted)


def sample_and_score(run: Run, x: Tensor, chains: int | None) -> StrategyResult:
    """Samples from starting states, scored; where the run is stopped, the scored predictions.

    Args:
        run: the run.
        x: starting states, [B, M N, *event].
        chains: N where the M candidates of a chain share the noise of its steps, None where each has its own.
    """
    loop = Loop(run)
    with loop.keeping_partial(), torch.no_grad():
        state = run_chain(loop, Trajectory.begin(run.process, x), shared=chains)
        root = torch.arange(x.shape[1], device=x.device) % (chains or x.shape[1])
        return StrategyResult(state.x, run.score(state.x), root.expand(x.shape[:2]), loop.interrupted)
