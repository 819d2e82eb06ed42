"""A model of one Gaussian path run on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from ..errors import SteerError
from ..types import Denoiser, Schedule
from . import parameterization, schedules
from .gaussian import _CONVERT_FIRST, GaussianProcess, need_gaussian_process
from .second_order import SecondOrderProcess


def convert(
    process: GaussianProcess, schedule: Schedule, times: Sequence[float] | int | None = None
) -> GaussianProcess:
    """The same model run on another Gaussian path, for instance a rectified flow as a variance-preserving SDE.

    Two paths differ only by the clock and a scale: with rho = alpha / sigma equal at times t and s, the state on the
    new path is c x_t with c = sigma_new(s) / sigma_old(t), and both have the same E[x_0]. The denoiser is therefore
    the old one at x / c; transition rule, decoder and conditioning carry over.

    Args:
        process: a model's own GaussianProcess.
        schedule: of the new path.
        times: grid on the new path; default, as many steps, uniform in its time, from the noisiest level at which the
            old grid starts (or the new schedule starts, if that is less noisy).

    Raises:
        StateSpaceError: for another kind of process.
        SteerError: where the new grid starts noisier than the model's own path ever gets.

    Source: Kim et al. 2025 (RBF, 2503.19385), in x_0 form, where no derivative of the clock is needed.
    """
    if isinstance(process, SecondOrderProcess):
        return cast(Any, process.around(lambda base: convert(base, schedule, times)))
    process = need_gaussian_process(process, "exchanging Gaussian paths", cure=_CONVERT_FIRST)
    old = process.schedule
    ceiling = min(schedules.angle(old, process.times[0]), schedules.angle(schedule, schedule.start))
    if times is None or isinstance(times, int):
        first = schedules.time_at(schedule, ceiling)
        grid = schedules.uniform_times(schedule, times or process.steps, start=first)
    else:
        grid = schedules.check_times(times)
        if schedules.angle(schedule, grid[0]) > schedules.angle(old, 1.0) + 1e-9:
            raise SteerError(
                f"the new grid starts at t = {grid[0]}, noisier than the model's own path ever gets; "
                f"start it at or below {schedules.time_at(schedule, ceiling):.6g}"
            )

    return replace(
        process, denoiser=ReparameterizedDenoiser(process.denoiser, old, schedule), schedule=schedule, times=grid
    )


@dataclass(frozen=True, eq=False)
class ReparameterizedDenoiser:
    """A denoiser of one path, asked about states of another."""

    denoiser: Denoiser
    old: Schedule
    new: Schedule

    def __call__(self, x: Tensor, s: float) -> Tensor:
        t = schedules.time_at(self.old, schedules.angle(self.new, s))
        return self.denoiser(x * (self.old(t).sigma / self.new(s).sigma), t)

    def only(self, problem: int) -> ReparameterizedDenoiser:
        return replace(self, denoiser=parameterization.only(self.denoiser, problem))
