"""`steer.verify`: an opened pipeline against the pipeline itself, for the cases that would go wrong in silence."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ModelError, SteerError
from ..processes.gaussian import GaussianProcess, need_gaussian_process
from .from_pipeline import Decoder, PipelineDenoiser
from .preparation import copied
from .steered_scheduler import steered_grid


class Verified(NamedTuple):
    """Largest differences, relative to the largest value compared; 0 is bitwise equality.

    prediction: from what the pipeline predicts in its own run. output: from what it returns for the same latents; None
    where the process does not decode. batched: of a row among others from the row alone, None where every row is a
    call of its own; networks compute batches of different sizes with different rounding.
    """

    steps: int
    prediction: float
    output: float | None
    batched: float | None


class _Seen(NamedTuple):
    prediction: Tensor
    latents: Tensor
    following: Tensor


def verify(process: GaussianProcess, *, steps: int = 3, tolerance: float = 1e-5) -> Verified:
    """How far a process from `steer.from_pipeline` is from its pipeline, over its first steps and the decoder.

    The pipeline runs its first `steps` steps and decodes, problem 0, one row, with its own scheduler and nothing of
    steer's. The process then predicts from the same latents, last step first, and decodes the same final latents.
    That finds networks that remember earlier steps, loops that keep state, and outputs made of more than the latents.
    A row in a batch with another is compared with the row alone, which finds rows that see each other, and inputs that
    the pipeline draws anew for every row.
    Cost: 2 `steps` + 2 network evaluations and four decodes of one row; a cheap insurance for a pipeline that is new
    to you. Loops that paste a known part over their latents do it otherwise after their last step than after one that
    a shortened loop ends with, so of those all steps are run, whatever `steps`. `tolerance` suits float32; give about
    1e-2 where the networks run in bfloat16.

    Raises ModelError where they differ by more than `tolerance`, and for processes that no pipeline is behind.
    """
    process = need_gaussian_process(
        process, "verify, which compares a process with its pipeline,", cure="give it what steer.from_pipeline returned"
    )
    denoiser = process.denoiser
    if not isinstance(denoiser, PipelineDenoiser):
        raise ModelError(
            "verify compares a process with its pipeline; this one calls a network directly; "
            "open the pipeline by steer.from_pipeline"
        )
    steps = len(denoiser.grid.indices) if denoiser.call.free is not None else min(steps, len(denoiser.grid.indices))
    with torch.no_grad():
        try:
            seen, output = _plain_run(denoiser, denoiser.grid.indices[steps - 1] + 1)
            return _compared(process, denoiser, steps, tolerance, seen, output)
        except (SteerError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ModelError(
                f"{type(denoiser.call.user).__name__} cannot be compared: row by row, with the arguments that it was "
                f"opened with, it raised {type(error).__name__}: {error}; wrap its "
                "network by steer.from_eps, from_v, from_velocity or from_denoiser"
            ) from error


def _compared(
    process: GaussianProcess,
    denoiser: PipelineDenoiser,
    steps: int,
    tolerance: float,
    seen: list[_Seen],
    output: Tensor,
) -> Verified:
    """Steer against what was seen. Raises ModelError above the tolerance."""
    call = denoiser.call
    worst = 0.0
    for k in reversed(range(steps)):
        index = denoiser.grid.indices[k]
        ours = call.predict(seen[index].latents, (0,), 1, index)
        worst = max(worst, _difference(ours, seen[index].prediction))
    decoded = None
    if isinstance(process.decoder, Decoder):
        decoded = _difference(call.decode(seen[-1].following, (0,), 1), output)
    batched = _batched(denoiser, seen) if denoiser.chunk > 1 else None
    if batched is not None and isinstance(process.decoder, Decoder):
        pair = torch.cat([seen[-1].following, seen[0].latents])
        batched = max(batched, _difference(process.decoder.only(0)(pair)[:1].reshape_as(output), output))
    for name, error in (("predictions", worst), ("output", decoded)):
        if error is not None and not error <= tolerance:
            raise ModelError(
                f"steer's {name} of {type(call.user).__name__} differ from the pipeline's own by {error:.2g} of the "
                f"largest value (tolerance {tolerance:.2g}): the pipeline keeps state from step to step, or does more "
                "than predict, step and decode; switch its caches off, or wrap its network by steer.from_denoiser"
            )
    rounding = 10.0 * tolerance  # batches of another size are computed with other rounding
    if batched is not None and not batched <= rounding:
        raise ModelError(
            f"a row in a batch differs from the row alone by {batched:.2g} of the largest value (tolerance "
            f"{rounding:.2g}): {type(call.user).__name__} mixes rows, or repeats its inputs for one row only; open it "
            "with chunk=1"
        )
    return Verified(steps, worst, decoded, batched)


def _batched(denoiser: PipelineDenoiser, seen: list[_Seen]) -> float | None:
    """Difference of the first step's prediction in a batch with other latents from the same prediction alone.

    None where several rows in one call raise, so that every row is a call of its own.
    """
    denoiser, index = denoiser.only(0), denoiser.grid.indices[0]
    rows = torch.stack([seen[index].latents, seen[-1].following], 1)
    output, alone = denoiser.output(rows, index)[:, 0], seen[index].prediction
    return _difference(output, alone[:, : output.shape[1]]) if denoiser.chunk > 1 else None


def _plain_run(denoiser: PipelineDenoiser, length: int) -> tuple[list[_Seen], Tensor]:
    """What the pipeline itself does in the first `length` bodies of its loop, and its output after them."""
    call = denoiser.call
    scheduler, seen = copy.deepcopy(call.owner.scheduler), []
    set_timesteps, step = scheduler.set_timesteps, scheduler.step

    def shortened(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        # The loop ends early, and the pipeline decodes what it has.
        scheduler.timesteps = steered_grid(scheduler.timesteps, lambda grid: iter(grid.unbind()[:length]))

    def recorded(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = step(model_output, timestep, sample, *args, **kwargs)
        following = result[0] if isinstance(result, tuple) else result.prev_sample
        # Copies, as some loops write into their latents.
        seen.append(_Seen(*(call.first_copy(tensor, 1).clone() for tensor in (model_output, sample, following))))
        return result

    scheduler.set_timesteps = functools.wraps(set_timesteps)(shortened)
    scheduler.step = functools.wraps(step)(recorded)
    return seen, call.output(copied(call.user, scheduler), (0,), 1)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    scale = float(theirs.float().abs().max())
    return float((ours.float() - theirs.float()).abs().max()) / (scale or 1.0)
