"""Langevin correction at every level, as an after hook."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SteerError
from ..key import Key
from ..processes.parameterization import score
from ..types import GaussianPath
from .hooks import Hooks


@dataclass(frozen=True)
class Corrector:
    """The after hook of `corrector`."""

    rounds: int
    size: float

    def acts(self, process: GaussianPath, k: int) -> bool:
        return process.levels[k].sigma > 0.0

    def __call__(self, process: Any, x: Tensor, k: int, key: Key) -> Tensor:
        at = process.levels[k]
        step = self.size * at.sigma**2
        for i in range(self.rounds):
            predicted = process.complete(x, process.denoise(x, k))
            noise = key.fold("langevin", i).at(k).normal(x.shape, dtype=x.dtype, device=x.device)
            x = torch.add(x + step * score(x, predicted, at), noise, alpha=math.sqrt(2.0 * step))
        return x

    def rows(self, process: GaussianPath) -> int:
        """Network rows that the corrections of one chain cost a particle."""
        return self.rounds * process.rows * sum(self.acts(process, k) for k in range(1, process.steps + 1))


def corrector(rounds: int = 1, size: float = 0.05) -> Hooks:
    """After every step, `rounds` unadjusted Langevin steps of size * sigma^2 along the guided prediction's score.

    Args:
        rounds: Langevin steps after each step of the chain, >= 1.
        size: share of sigma^2, in (0, 1).

    Returns:
        Hooks, for `guide`.

    Raises:
        SteerError: settings out of range.

    Cost: `rounds` network rows per step.

    Source: Song et al. 2021 (score SDE, 2011.13456), the corrector of predictor-corrector sampling.
    Differs: the step is a share of sigma^2 and not set by the ratio of norms of the moment, so that each particle's
    step depends on itself alone.
    """
    if rounds < 1 or not 0.0 < size < 1.0:
        raise SteerError(f"a corrector takes rounds >= 1 steps of size in (0, 1) sigma^2, got {rounds} and {size}")
    hook = Corrector(rounds, size)
    return Hooks(after=(hook,), extra=(hook.rows,))
