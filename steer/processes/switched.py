"""`steer.switched`: one chain whose steps are predicted by several models, each from a level on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import SteerError
from ..types import ReverseProcess
from .gaussian import GaussianProcess, need_gaussian_process
from .parameterization import only


@dataclass(frozen=True, eq=False)
class Switched:
    """The denoiser of whichever process is in force: `parts[i]` at times below or at `since[i]`, until the next."""

    parts: tuple[GaussianProcess, ...]
    since: tuple[float, ...]

    def __call__(self, x: Tensor, t: float) -> Tensor:
        part = self.at(t)
        x0 = part.denoiser(x, t)
        return x0 if part.clip is None else part.clip(x0)

    def at(self, t: float) -> GaussianProcess:
        """The part in force at a time."""
        begun = (part for part, since in zip(self.parts[::-1], self.since[::-1], strict=True) if t <= since)
        return next(begun, self.parts[0])

    def rows_at(self, t: float) -> int:
        """Network rows of a prediction at a time."""
        part = self.at(t)
        return getattr(part.denoiser, "rows_at", lambda t: part.rows)(t)

    def only(self, problem: int) -> Switched:
        """The same for one problem."""
        parts = (p if p.problems is None else replace(p, denoiser=only(p.denoiser, problem)) for p in self.parts)
        return replace(self, parts=tuple(parts))


def switched(parts: Mapping[int, ReverseProcess]) -> GaussianProcess:
    """One chain whose steps are predicted by several models, each from a level on: one process for every method.

        guided, plain = (steer.load("digits", labels=3, steps=20, guidance_scale=w) for w in (4.0, 1.0))
        process = steer.switched({0: guided, 12: plain})     # two rows a prediction for 12 steps, then one

    Guidance that is dropped where it changes nothing, or is used within an interval alone; a student early and its
    teacher late; a cached network early and the exact one late.

    Args:
        parts: level k -> the process that predicts from there on; one of them from level 0. All on one grid: the same
            times, path and states, and the same conditionings where they have any.

    Returns:
        A GaussianProcess: starts as the first part does, steps by the rule of the last and decodes by its decoder. Its
        `rows` are the most of a part's, and `rows_at(k)` those in force. Under `steer.second_order`, the first step of
        every part is of first order, as the prediction that is remembered is another model's.

    Raises:
        SteerError: no part from level 0, levels outside of the grid, or parts that are not on one grid.
        StateSpaceError: a part that is no GaussianProcess; guide the switched process, or give it the rule.

    Cost: what the part in force costs at each level; budgets count by level.

    Source: guidance by level as in adaptive guidance (2312.12487) and guidance intervals (2404.07724).
    """
    levels = sorted(parts)
    cure = "switch first, and give rules and hooks to the whole"
    processes = [need_gaussian_process(parts[k], "switching by level", cure=cure) for k in levels]
    if levels[:1] != [0] or levels[-1] >= processes[0].steps:
        steps = f", which has {processes[0].steps} steps" if processes else ""
        raise SteerError(f"parts are given by the level that they begin at on the grid{steps}, one by 0; got {levels}")
    first, last = processes[0], processes[-1]
    for k, part in zip(levels, processes, strict=True):
        _check_same_grid(first, part, k)
    conditioned = next((part for part in processes if part.problems is not None), last)
    return replace(
        last,
        denoiser=Switched(tuple(processes), tuple(first.times[k] for k in levels)),
        rows=max(part.rows for part in processes),
        initial=first.initial,
        problems=conditioned.problems,
        prompts=last.prompts or conditioned.prompts,
        reference=None,
        clip=None,
    )


def _check_same_grid(first: GaussianProcess, part: GaussianProcess, k: int) -> None:
    """Raises SteerError where a part cannot go on with the states of the first."""
    problems = {first.problems, part.problems} - {None}
    near = len(first.levels) == len(part.levels) and all(
        math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6)
        for here, there in zip(first.levels, part.levels, strict=True)
        for a, b in ((here.t, there.t), (here.alpha, there.alpha), (here.sigma, there.sigma))
    )
    for name, same in (
        ("times and noise levels", near),
        ("events", first.event == part.event),
        ("dtypes", first.dtype == part.dtype),
        ("numbers of problems", len(problems) < 2),
    ):
        if not same:
            raise SteerError(
                f"parts of a chain go on with each other's states, and the part from level {k} has other {name} than "
                f"the first: {part} and {first}; open them with the same steps, times and prompts"
            )
