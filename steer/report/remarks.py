"""What a comparison shows, in sentences: which methods are told apart, and what a reader should know of the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .compared import MeanError, Row, Stage
from .page import with_error

_SPENT = 0.95  # share of its budget below which a method's spend is remarked on


def certain(difference: MeanError, seeds: int) -> bool:
    """Whether a mean difference over seeds is above zero at 95 %, by Student's t; False where no error is known."""
    mean, error = difference
    return mean > student(seeds - 1) * error if seeds > 1 else False


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact for one and two degrees of freedom, else to one percent.

    Source: the expansion of Cornish and Fisher (Abramowitz and Stegun 26.7.5).
    """
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2.0 / (4.0 * 0.975 * 0.025))
    z, n = 1.959964, freedom  # the normal distribution's own
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + (z**3 + z) / 4 / n + second / n**2 + third / n**3


def remarks(stage: Stage) -> list[str]:
    """What the table at one budget does and does not say, in sentences."""
    ran = [row for row in stage.rows if not math.isnan(row.best[0])]
    said = [_first(ran, stage.keys)]
    by_kind: dict[str, list[str]] = {}
    for row in ran:
        by_kind.setdefault(row.mean_of, []).append(row.method)
    if len(by_kind) > 1:
        kinds = "; ".join(f"{', '.join(names)}: {kind}" for kind, names in by_kind.items())
        said.append(f"mean rewards are of different things ({kinds}); compare the best samples across them")
    for row in ran:
        seeds = stage.keys - len(row.failed)
        for name, (change, error) in row.of_best_gain.items():
            if certain(row.gain, seeds) and certain((-change, error), seeds):
                rise, fall = with_error(*row.gain), with_error(-change, error)
                said.append(
                    f"{row.method}'s best samples have a higher reward than best-of-N's ({rise}) and a lower {name} "
                    f"({fall} less): look whether the reward is exploited"
                )
        if not _SPENT <= row.share <= 1.0 + 1e-9:
            said.append(f"{row.method} spent {row.share:.0%} of the budget")
    for row in stage.rows:
        if row.failed:
            said.append(f"{row.method} failed on {len(row.failed)} of {stage.keys} seeds: {row.failed[0]}")
    return said


def _first(rows: Sequence[Row], keys: int) -> str:
    """Which methods find the best samples."""
    first = max(rows, key=lambda row: row.best[0])
    found = f"{first.method} finds the best samples, of reward {with_error(*first.best)}"
    if keys < 2:
        return f"{found}; one seed tells no error, so take keys=5 or more before you choose"
    others = [row.method for row in rows if row.tied and row is not first]
    if len(others) == len(rows) - 1:
        return f"the best samples of the methods are not told apart at 95 % over {keys} seeds"
    if others:
        return f"{found}; not told apart from them at 95 % over {keys} seeds are those of {', '.join(others)}"
    return f"{found}; every other method is behind, at 95 % over {keys} seeds"
