"""Windows: which steps of which rows are stochastic, and so trained on. The others follow the flow's ODE.

A window is a function (steps, problems, rows, key) -> bool [problems, rows, steps]; any function of yours will do.
Steps to which the process's rule adds no noise are never trained on, whatever a window says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SteerError
from ..key import Key
from ..types import ReverseProcess

Window = Callable[[int, int, int, Key], Tensor]
"""(steps K, problems P, rows N, key) -> [P, N, K] bool, True where a step is stochastic."""


@dataclass(frozen=True)
class Every:
    """The first `share` of the steps, in every row. Built by `every`."""

    share: float = 1.0

    def __call__(self, steps: int, problems: int, rows: int, key: Key) -> Tensor:
        return (torch.arange(steps) < _whole_steps(self.share, steps)).expand(problems, rows, steps)


@dataclass(frozen=True)
class RandomStart:
    """`size` steps from a random level in [0, share K] of each problem or row. Built by `first_half`, `per_row`."""

    size: int = 2
    share: float = 0.5
    each: str = "problem"

    def __call__(self, steps: int, problems: int, rows: int, key: Key) -> Tensor:
        _check_size(self.size, steps)
        starts = min(_whole_steps(self.share, steps), steps - self.size) + 1
        drawn = key.fold("window").uniform((problems, rows if self.each == "row" else 1))
        return _consecutive((drawn * starts).long(), self.size, steps).expand(problems, rows, steps)


@dataclass(frozen=True)
class Sliding:
    """`size` steps that move on by `stride` every `every` updates of the policy, and start over. Built by `sliding`."""

    update: int
    size: int = 4
    stride: int = 1
    every: int = 25

    def __call__(self, steps: int, problems: int, rows: int, key: Key) -> Tensor:
        _check_size(self.size, steps)
        start = self.update // self.every * self.stride % (steps - self.size + 1)
        return _consecutive(torch.tensor([[start]]), self.size, steps).expand(problems, rows, steps)


def _whole_steps(share: float, steps: int) -> int:
    """Number of whole steps in a share: .29 of a hundred is 29, although the product in binary is slightly less."""
    return math.floor(share * steps + 1e-9)


def every(share: float = 1.0) -> Every:
    """All steps, or the first share of them.

    Args:
        share: fraction of the steps, in (0, 1], rounded down to whole ones.

    Raises:
        SteerError: a share outside (0, 1].

    Source: Liu et al. 2025 (Flow-GRPO), where .99 leaves out the last of ten steps.
    """
    if not 0.0 < share <= 1.0:
        raise SteerError(f"share of the steps must be in (0, 1], got {share}; pass 1.0 for all of them")
    return Every(share)


def first_half(size: int = 2, share: float = 0.5) -> RandomStart:
    """A short window per problem, from a random level in the first half.

    Args:
        size: steps in the window.
        share: the window starts in the first `share` of the steps.

    Source: Flow-GRPO-Fast (github.com/yifan123/flow_grpo).
    """
    return RandomStart(size, share)


def per_row(size: int = 2, share: float = 0.5) -> RandomStart:
    """A short window per row, each from a random level of its own; plain rollouts only.

    Args:
        size: steps in the window.
        share: windows start in the first `share` of the steps.
    """
    return RandomStart(size, share, "row")


def sliding(update: int, *, size: int = 4, stride: int = 1, every: int = 25) -> Sliding:
    """A window that moves from noise to data over training, and then starts over.

    Args:
        update: number of this update of the policy, from 0.
        size: steps in the window.
        stride: levels that the window moves by.
        every: updates between two moves.

    Source: Li et al. 2025 (MixGRPO).
    """
    return Sliding(update, size, stride, every)


def stochastic_steps(window: Window, process: ReverseProcess, problems: int, rows: int, key: Key) -> Tensor:
    """Which steps of a run are stochastic, [P, N, K] bool; SteerError where some row has none."""
    noisy = torch.tensor([process.stochastic(k) for k in range(process.steps)])
    mask = window(process.steps, problems, rows, key)
    if tuple(mask.shape) != (problems, rows, process.steps) or mask.dtype != torch.bool:
        raise SteerError(
            f"a window must return bool of shape (problems, rows, steps) = {(problems, rows, process.steps)}, got "
            f"{mask.dtype} of {tuple(mask.shape)}; expand it to that shape, or use grpo.every()"
        )
    mask = mask & noisy
    if not bool(mask.any(2).all()):
        raise SteerError(
            f"the window {window} leaves some row without a stochastic step to train on under "
            f"{getattr(process, 'rule', process)}; move the window, or use a stochastic rule, for instance "
            "process.with_rule(steer.flow_sde(0.7))"
        )
    return mask


def _check_size(size: int, steps: int) -> None:
    """Raises SteerError where a window is longer than the process."""
    if not 1 <= size <= steps:
        raise SteerError(f"a window of {size} steps does not fit a process of {steps}; take 1 to {steps}")


def _consecutive(start: Tensor, size: int, steps: int) -> Tensor:
    """`size` steps from each start [...], as bool [..., steps]."""
    k = torch.arange(steps)
    return (k >= start[..., None]) & (k < start[..., None] + size)
