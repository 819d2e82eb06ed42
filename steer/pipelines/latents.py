"""A start at latents that the user has: last week's favourite, an inverted photograph, a seed from another tool."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.objective import Objective
from ..core.start import Start
from ..core.trajectory import Trajectory
from ..errors import ShapeError
from ..key import Key
from ..types import ReverseProcess
from .from_pipeline import PipelineDenoiser


def from_latents(latents: Tensor) -> Start:
    """A start for every sampler: particle n of problem b begins at row b * N + n of these latents.

    latents: (B * N, ...), in the form that the pipeline's own argument `latents` has: noise of standard deviation 1,
             say, which the pipeline scales and packs itself. For processes that no pipeline is behind: states
             (B * N, *event) at level 0.
    A run takes at most N particles, and the first of them where it takes fewer. No law is sampled by a start that was
    chosen by hand: weights and evidence are those of what can be reached from it.
    """

    def start(process: ReverseProcess, objective: Objective, key: Key, batch: int, particles: int) -> Trajectory:
        del objective
        each, last = len(latents) // batch, key.slot + particles
        if len(latents) % batch or last > each:
            raise ShapeError(
                f"{batch} problem(s) of {last} particles each start from {batch * last} rows of latents, got "
                f"{len(latents)}; give the sampler particles={max(1, each)}, or more latents"
            )
        rows = [[b * each + n for n in range(key.slot, last)] for b in range(batch)]
        denoiser = getattr(process, "denoiser", None)
        if isinstance(denoiser, PipelineDenoiser):
            call = denoiser.call
            several = call.conditioning.problems and denoiser.problem is None
            named = range(batch) if several else [denoiser.problem or 0] * batch
            x = torch.stack([
                torch.cat([call.entering(latents[i : i + 1], b) for i in chosen])
                for b, chosen in zip(named, rows, strict=True)
            ])  # fmt: skip
            return replace(Trajectory.begin(process, x.float()), biased_start=True)
        dtype, device = getattr(process, "dtype", latents.dtype), getattr(process, "device", latents.device)
        x = latents[torch.tensor(rows, device=latents.device)].to(device, dtype)
        return replace(Trajectory.begin(process, x), biased_start=True)

    return start
