"""`steer.from_latents`: starts a run at latents that the user has, such as an inverted photograph or saved noise."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.objective import Objective
from ..core.start import Start
from ..core.trajectory import Trajectory
from ..errors import ShapeError, StateSpaceError
from ..key import Key
from ..processes.gaussian import GaussianProcess
from ..processes.masked import MaskedProcess
from ..types import ReverseProcess
from .from_pipeline import PipelineDenoiser


def from_latents(latents: Tensor) -> Start:
    """Start every sampler at given latents: particle n of problem b at row b * N + n.

    Args:
        latents: Latents [B * N, ...], in the form of the pipeline's own argument `latents`: noise of standard deviation
            1, say, which the pipeline scales and packs itself. For processes without a pipeline: states
            [B * N, *event] at level 0.

    Returns:
        A start, for the argument `start=` of any sampler. A run has at most N particles, and uses the first rows of
        each problem where it has fewer. As these starts are not drawn from the prior, weights and the normalizing
        constant refer to the distribution that can be reached from them, not to the target.

    Raises:
        StateSpaceError: When the run starts, if they are tokens other than the process's own prompt.
        ShapeError: When the run starts, if its particles are more than there are rows, or batch does not divide them.
    """

    def start(process: ReverseProcess, objective: Objective, key: Key, batch: int, particles: int) -> Trajectory:
        del objective
        each, last = len(latents) // batch, key.slot + particles
        if len(latents) % batch or last > each:
            raise ShapeError(
                f"{batch} problem(s) of {last} particles each need {batch * last} rows of latents, got "
                f"{len(latents)}; give the sampler particles={max(1, each)}, or more latents"
            )
        rows = [[b * each + n for n in range(key.slot, last)] for b in range(batch)]
        denoiser = process.denoiser if isinstance(process, GaussianProcess) else None
        if isinstance(denoiser, PipelineDenoiser):
            call = denoiser.call
            several = call.conditioning.problems and denoiser.problem is None
            named = range(batch) if several else [denoiser.problem or 0] * batch
            starts = [
                torch.cat([call.state_of_latents(latents[i : i + 1], b) for i in chosen])
                for b, chosen in zip(named, rows, strict=True)
            ]
            x = torch.stack(starts)
            return replace(Trajectory.begin(process, x.float()), biased_start=True)
        chosen = latents[torch.tensor(rows, device=latents.device)].to(process.device, process.dtype)
        if isinstance(process, MaskedProcess) and not torch.equal(chosen, process.prior(key, batch, particles)):
            raise StateSpaceError(
                "a masked chain starts from its prompt and masks, and tokens that it is given another way would be "
                "masked by whatever goes back to earlier levels; use process.with_prompt(tokens), or "
                "from_logits(prompt=tokens), and no start"
            )
        return replace(Trajectory.begin(process, chosen), biased_start=True)

    return start
