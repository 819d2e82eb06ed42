"""Windows: which steps of which rows are stochastic, and so trained on. The others follow the flow's ODE.

A window is a function (steps, problems, rows, key) -> bool (problems, rows, steps); write your own as a plain function.
Steps to which the process's rule adds no noise are never in a window, whatever it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SteerError
from ..key import Key

Window = Callable[[int, int, int, Key], Tensor]


@dataclass(frozen=True)
class Every:
    """The first `share` of the steps, in every row. Flow-GRPO trains .99: all but the last of ten."""

    share: float = 1.0

    def __call__(self, steps: int, problems: int, rows: int, key: Key) -> Tensor:
        return (torch.arange(steps) < _part(self.share, steps)).expand(problems, rows, steps)


@dataclass(frozen=True)
class RandomStart:
    """`size` steps from a start drawn uniformly in [0, share * steps], for each problem or each row."""

    size: int = 2
    share: float = 0.5
    each: str = "problem"

    def __call__(self, steps: int, problems: int, rows: int, key: Key) -> Tensor:
        _fits(self.size, steps)
        starts = min(_part(self.share, steps), steps - self.size) + 1
        drawn = key.fold("window").uniform((problems, rows if self.each == "row" else 1))
        return _run((drawn * starts).long(), self.size, steps).expand(problems, rows, steps)


@dataclass(frozen=True)
class Sliding:
    """`size` steps that move on by `stride` every `every` updates of the policy, and begin again at the end."""

    update: int
    size: int = 4
    stride: int = 1
    every: int = 25

    def __call__(self, steps: int, problems: int, rows: int, key: Key) -> Tensor:
        _fits(self.size, steps)
        start = self.update // self.every * self.stride % (steps - self.size + 1)
        return _run(torch.tensor([[start]]), self.size, steps).expand(problems, rows, steps)


def _part(share: float, steps: int) -> int:
    """Whole steps of a share: .29 of a hundred are 29, though the product in binary falls short of it."""
    return math.floor(share * steps + 1e-9)


def every(share: float = 1.0) -> Every:
    """All steps, or the first share of them (Flow-GRPO: .99 leaves out the last of ten)."""
    if not 0.0 < share <= 1.0:
        raise SteerError(f"share of the steps must be in (0, 1], got {share}")
    return Every(share)


def first_half(size: int = 2, share: float = 0.5) -> RandomStart:
    """A short window per problem from a random start in the first half (Flow-GRPO-Fast)."""
    return RandomStart(size, share)


def per_row(size: int = 2, share: float = 0.5) -> RandomStart:
    """A short window per row, each from a start of its own."""
    return RandomStart(size, share, "row")


def sliding(update: int, *, size: int = 4, stride: int = 1, every: int = 25) -> Sliding:
    """A window that moves from noise to data over training (MixGRPO). update: number of this update."""
    return Sliding(update, size, stride, every)


def placed(window: Window, process, problems: int, rows: int, key: Key) -> Tensor:
    """Where steps of a run are stochastic, (problems, rows, steps) bool; SteerError where none is."""
    noisy = torch.tensor([process.stochastic(k) for k in range(process.steps)])
    mask = window(process.steps, problems, rows, key)
    if tuple(mask.shape) != (problems, rows, process.steps) or mask.dtype != torch.bool:
        raise SteerError(
            f"a window must return bool of shape (problems, rows, steps) = {(problems, rows, process.steps)}, got "
            f"{mask.dtype} of {tuple(mask.shape)}"
        )
    mask = mask & noisy
    if not bool(mask.any(2).all()):
        raise SteerError(
            f"the window {window} leaves some row without a stochastic step under {process.rule}: there is nothing to "
            "train on; move it, or use a stochastic rule, for instance process.with_rule(steer.flow_sde(0.7))"
        )
    return mask


def _fits(size: int, steps: int) -> None:
    if not 1 <= size <= steps:
        raise SteerError(f"a window of {size} steps does not fit a process of {steps}; take 1 to {steps}")


def _run(start: Tensor, size: int, steps: int) -> Tensor:
    k = torch.arange(steps)
    return (k >= start[..., None]) & (k < start[..., None] + size)
