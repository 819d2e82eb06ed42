"""What the page of a comparison reads. `steer.compare` returns one; so is anything else with these attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .run_result import RunResult

MeanError = tuple[float, float]
"""A mean over seeds, and the standard error of that mean; NaN where too few seeds have run."""


@dataclass(frozen=True)
class Row:
    """One method of a comparison: means over seeds, as (mean, standard error of that mean).

    Args:
        method: Its name.
        mean_of: What `reward` and `metrics` are means of: the distribution that its weighted samples follow, or how
            many of the best samples a search kept. Means of different things do not compare.
        reward: Weighted mean reward.
        best: Highest reward found.
        gain: Highest reward minus that of best-of-N on the same seeds.
        tied: Whether its highest reward is the highest of all, or not told apart from it at 95 % on the same seeds.
        metrics: Weighted means of the caller's own measures, by name.
        of_best: The same measures, of the sample of highest reward.
        of_best_gain: Those minus best-of-N's, on the same seeds.
        ess: Effective sample size.
        nfe, grads, rewards, decodes, seconds: The cost of one run, over all its problems. nfe in network rows.
        share: NFE spent, as a share of the budget.
        failed: What was raised instead of a result, a text for each seed where that happened.
    """

    method: str
    mean_of: str
    reward: MeanError
    best: MeanError
    gain: MeanError
    tied: bool
    metrics: dict[str, MeanError]
    of_best: dict[str, MeanError]
    of_best_gain: dict[str, MeanError]
    ess: float
    nfe: float
    share: float
    grads: float
    rewards: float
    decodes: float
    seconds: float
    failed: tuple[str, ...] = ()


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
