"""`steer.verify`: compares an opened pipeline with the pipeline itself, to find differences that raise no error."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ModelError, SteerError
from ..processes.gaussian import GaussianProcess
from .from_pipeline import PipelineDecoder, PipelineDenoiser
from .preparation import copy_pipeline
from .steered_scheduler import steered_grid


class Verified(NamedTuple):
    """Largest differences found by `steer.verify`, relative to the largest value compared; 0 is bitwise equality.

    Args:
        steps: Number of steps compared.
        prediction: From the pipeline's predictions in its own run.
        output: From what the pipeline returns for the same latents; None where the process does not decode.
        batched: Of a row in a batch from the same row alone; None where every row is a call of its own. Networks round
            differently in batches of different sizes.
    """

    steps: int
    prediction: float
    output: float | None
    batched: float | None


class _RecordedStep(NamedTuple):
    """One step of the pipeline's own run: its prediction, the latents before it and the latents after it."""

    prediction: Tensor
    latents: Tensor
    following: Tensor


def verify(process: GaussianProcess, *, steps: int = 3, tolerance: float = 1e-5) -> Verified:
    """Compare a process from `steer.from_pipeline` with its pipeline, over the first steps and the decoder.

    The pipeline runs its first `steps` steps and decodes, one row of problem 0, with its own scheduler and nothing of
    steer's. The process then predicts from the same latents, last step first, and decodes the same final latents. That
    finds networks that remember earlier steps, loops that keep state, and outputs made of more than the latents. A row
    in a batch with another is compared with the row alone, which finds rows that affect each other, and inputs that the
    pipeline draws anew for every row.

    Args:
        process: A process from `steer.from_pipeline`.
        steps: Number of steps to compare. Loops that paste a known part over their latents do it differently after
            their last step than after one that a shortened loop ends with, so for those all K steps are compared.
        tolerance: Largest difference allowed, relative to the largest value. The default suits float32; give about 1e-2
            where the networks run in bfloat16.

    Returns:
        The differences found.

    Raises:
        ModelError: Where they differ by more than `tolerance`, where the pipeline cannot run row by row, and for
            processes without a pipeline.

    Cost: 2 `steps` + 2 network evaluations and four decodes of one row; run it once for every pipeline new to you.
    """
    denoiser = process.denoiser
    if not isinstance(denoiser, PipelineDenoiser):
        raise ModelError("verify compares a process with its pipeline; this one calls a network directly")
    steps = len(denoiser.grid.indices) if denoiser.call.free is not None else min(steps, len(denoiser.grid.indices))
    with torch.no_grad():
        try:
            seen, output = _run_pipeline(denoiser, denoiser.grid.indices[steps - 1] + 1)
            return _compare(process, denoiser, steps, tolerance, seen, output)
        except (SteerError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ModelError(
                f"verify runs {type(denoiser.call.user_pipe).__name__} row by row with the arguments that it was "
                f"opened with, and it raised {type(error).__name__}: {error}; wrap its network by steer.from_eps, "
                "from_v, from_velocity or from_denoiser"
            ) from error


def _compare(
    process: GaussianProcess,
    denoiser: PipelineDenoiser,
    steps: int,
    tolerance: float,
    seen: list[_RecordedStep],
    output: Tensor,
) -> Verified:
    """Compare steer's predictions and output with those recorded; raises ModelError above the tolerance."""
    call = denoiser.call
    worst = 0.0
    for k in reversed(range(steps)):
        index = denoiser.grid.indices[k]
        ours = call.predict(seen[index].latents, (0,), 1, index)
        worst = max(worst, _relative_difference(ours, seen[index].prediction))
    decoded = None
    if isinstance(process.decoder, PipelineDecoder):
        decoded = _relative_difference(call.decode(seen[-1].following, (0,), 1), output)
    batched = _batch_difference(denoiser, seen) if denoiser.chunk > 1 else None
    if batched is not None and isinstance(process.decoder, PipelineDecoder):
        pair = torch.cat([seen[-1].following, seen[0].latents])
        batched = max(batched, _relative_difference(process.decoder.only(0)(pair)[:1].reshape_as(output), output))
    for name, error in (("predictions", worst), ("output", decoded)):
        if error is not None and not error <= tolerance:
            raise ModelError(
                f"steer's {name} of {type(call.user_pipe).__name__} differ from the pipeline's own by {error:.2g} of "
                f"the largest value (tolerance {tolerance:.2g}): the pipeline keeps state from step to step, or does "
                "more than predict, step and decode; switch its caches off, or wrap its network by steer.from_denoiser"
            )
    rounding = 10.0 * tolerance  # batches of another size are computed with other rounding
    if batched is not None and not batched <= rounding:
        raise ModelError(
            f"a row in a batch differs from the row alone by {batched:.2g} of the largest value (tolerance "
            f"{rounding:.2g}): {type(call.user_pipe).__name__} mixes rows, or repeats its inputs for one row only; "
            "open it with chunk=1"
        )
    return Verified(steps, worst, decoded, batched)


def _batch_difference(denoiser: PipelineDenoiser, seen: list[_RecordedStep]) -> float | None:
    """Difference between the first step's prediction in a batch and the same prediction alone.

    None where a call with several rows raises, so that every row is a call of its own.
    """
    denoiser, index = denoiser.only(0), denoiser.grid.indices[0]
    rows = torch.stack([seen[index].latents, seen[-1].following], 1)
    output, alone = denoiser.output(rows, index)[:, 0], seen[index].prediction
    return _relative_difference(output, alone[:, : output.shape[1]]) if denoiser.chunk > 1 else None


def _run_pipeline(denoiser: PipelineDenoiser, length: int) -> tuple[list[_RecordedStep], Tensor]:
    """The first `length` steps of the pipeline's own loop, and its output after them."""
    call = denoiser.call
    scheduler, seen = copy.deepcopy(call.owner.scheduler), []
    set_timesteps, step = scheduler.set_timesteps, scheduler.step

    def shortened(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        # The loop ends after these, and the pipeline decodes what it has.
        scheduler.timesteps = steered_grid(scheduler.timesteps, lambda grid: iter(grid.unbind()[:length]))

    def recorded(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = step(model_output, timestep, sample, *args, **kwargs)
        following = result[0] if isinstance(result, tuple) else result.prev_sample
        # Copies, as some loops write into their latents.
        seen.append(
            _RecordedStep(*(call.first_copy(tensor, 1).clone() for tensor in (model_output, sample, following)))
        )
        return result

    scheduler.set_timesteps = functools.wraps(set_timesteps)(shortened)
    scheduler.step = functools.wraps(step)(recorded)
    return seen, call.output(copy_pipeline(call.user_pipe, scheduler), (0,), 1)


def _relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value of `theirs`; infinite for different shapes."""
    if ours.shape != theirs.shape:
        return float("inf")
    scale = float(theirs.float().abs().max())
    return float((ours.float() - theirs.float()).abs().max()) / (scale or 1.0)
