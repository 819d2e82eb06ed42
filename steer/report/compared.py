"""What the page of a comparison reads. `steer.compare` returns one; so is anything else with these attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .run_result import RunResult


@dataclass(frozen=True)
class Row:
    """One method of a comparison: means over seeds, as (mean, standard error of that mean).

    Args:
        method: Its name.
        reward: Weighted mean reward.
        best: Highest reward found.
        ess: Effective sample size.
        metrics: Weighted means of the caller's own measures, by name.
        nfe, grads, rewards, decodes, seconds: The cost of one run, over all its problems. nfe in network rows.
    """

    method: str
    reward: tuple[float, float]
    best: tuple[float, float]
    ess: float
    metrics: dict[str, tuple[float, float]]
    nfe: float
    grads: float
    rewards: float
    decodes: float
    seconds: float


class Stage(Protocol):
    """Methods at one budget, as `Comparison` documents it."""

    @property
    def budget(self) -> int: ...

    @property
    def keys(self) -> int: ...

    @property
    def rows(self) -> Sequence[Row]: ...

    @property
    def results(self) -> Mapping[str, Sequence[RunResult]]: ...


class Compared(Protocol):
    """Methods at one budget or several: a `Comparison`, or `Comparisons`."""

    @property
    def at(self) -> Sequence[Stage]: ...

    @property
    def interrupted(self) -> bool: ...

    def to_dict(self) -> dict[str, Any]: ...
