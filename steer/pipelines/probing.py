"""What opening finds out about a pipeline's loop: how latents enter it, which of them it samples, what a step costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ModelError, SteerError
from ..key import Key
from .steered_scheduler import Job

if TYPE_CHECKING:
    from .pipeline_call import PipelineCall

_CHANGES_LATENTS = (
    "changes the latents between its steps, by more than pasting a known part over them, which steer would have to "
    "copy; wrap the network by steer.from_eps, from_v, from_velocity or from_denoiser"
)


def probe(call: PipelineCall) -> None:
    """Find out how latents enter a pipeline, and what one prediction costs at each step.

    Args:
        call: The pipeline's call; its `by_step`, `skip`, `free`, `rows` and `changed_by_opening` are set.

    Raises:
        ModelError: For pipelines whose loop does more with latents than predict, step, and paste a known part over
            them.

    Cost: one or two network evaluations of one row.
    """
    try:
        entered = _probe(call)
        call.rows = _rows_by_step(call) if entered else []
        call.changed_by_opening = call.modules.changes(call.found)
    except (SteerError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the pipeline's own call has worked by now, so steering is the cause
        raise ModelError(
            f"{type(call.user_pipe).__name__} cannot be steered: given latents in the form of those that it gives "
            f"to scheduler.step, it raised {type(error).__name__}: {error}; open its network: steer.from_velocity, "
            "from_eps, from_edm or from_denoiser"
        ) from error
    if not entered:
        raise ModelError(f"{type(call.user_pipe).__name__} {_CHANGES_LATENTS}")


def _probe(call: PipelineCall) -> bool:
    """Whether the loop uses the latents that it is given, by one way or the other."""
    free = torch.stack([_passed_on(call, problem) for problem in range(call.conditioning.problems or 1)])
    call.free = None if bool(free.all()) else free
    entered = not call.by_step and _enters(call, free[0])
    if not entered:
        call.by_step = True  # the scheduler steps something else than what prepare_latents returns
        entered = _enters(call, free[0])
    if entered and call.free is not None:
        call.skip = _skipping_is_safe(call)
    return entered


def _enters(call: PipelineCall, free: Tensor) -> bool:
    """Whether the loop uses the latents that it is given."""
    other = Key(1).normal(call.start.shape).to(call.start)
    job = Job((0,), 1, index=0, x=torch.where(free, other, call.start))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        seen = call.capture(job).sample
    if job.sent is None or seen.shape != call.start.shape:
        return False
    return torch.equal(seen, torch.where(free, job.sent[:1].to(seen), call.start))


def _rows_by_step(call: PipelineCall) -> list[int]:
    """Network rows of one row's prediction at every step of the loop, from one pass over stubbed networks.

    They change where guidance begins late or ends early, and where one network takes over from another.
    """
    last = Job((0,), 1, index=call.scheduler.length - 1, stubbed=True)
    skip, call.skip = call.skip, False
    try:
        call.capture(last)
    finally:
        call.skip = skip
    return [last.rows_by_step[step] for step in range(call.scheduler.length)]


def _skipping_is_safe(call: PipelineCall) -> bool:
    """Whether skipping earlier steps and running them on stubbed networks lead to the same latents.

    Skipped steps draw nothing, so a loop that draws what it pastes has to run them all. No network runs here.
    """
    last = Job((0,), 1, index=call.scheduler.length - 1, x=call.start, stubbed=True)
    skipped = call.capture(last).sample.clone()
    if not call.skip:
        return False
    call.skip = False
    return torch.equal(skipped, call.capture(last).sample)


def _passed_on(call: PipelineCall, problem: int) -> Tensor:
    """Coordinates [1, *event] at which a problem's second step starts from the result of its first.

    Elsewhere it must not depend on that result: raises ModelError where it mixes that with other latents.
    """
    returned = Key(0).normal((2, *call.start.shape)).to(call.start)
    # Cast back, as a change of dtype on the way is not a change of the latents.
    jobs = [Job((problem,), 1, index=0, stubbed=True, after=lambda _, __, y=y: y.clone()) for y in returned]
    one, two = (call.capture(job).sample.to(returned) for job in jobs)
    if one.shape == two.shape == returned.shape[1:]:
        kept = torch.isclose(one, returned[0]) & torch.isclose(two, returned[1])
        if bool((kept | (one == two)).all()):
            return kept
    raise ModelError(f"{type(call.user_pipe).__name__} {_CHANGES_LATENTS}")
