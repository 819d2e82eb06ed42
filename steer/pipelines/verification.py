"""`steer.verify`: compares an opened pipeline with the pipeline itself, to find differences that raise no error."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ModelError, SteerError
from ..processes.gaussian import GaussianProcess, need_gaussian_process
from . import several_problems
from .argument_division import divided
from .families import PER_PROBLEM_ARGUMENTS
from .from_pipeline import PipelineDecoder, PipelineDenoiser
from .network_proxy import rows_of_arguments
from .pipeline_call import PipelineCall
from .preparation import constant_draw, copy_pipeline
from .probing import probe
from .steered_scheduler import steered_grid


class Verified(NamedTuple):
    """Largest differences found by `steer.verify`, relative to the largest value compared; 0 is bitwise equality.

    Args:
        steps: Number of steps compared.
        prediction: From the pipeline's predictions in its own run, for each problem alone.
        output: From what the pipeline returns for the same latents; None where the process does not decode.
        batched: Of several rows of all problems together, from each problem and row alone; None where every row is a
            call of its own. Networks round differently in batches of different sizes.
        divided: From the pipeline's own call with all problems at once, which shows how arguments are divided among
            them; None where there is one problem, no argument to divide, or no such call.
    """

    steps: int
    prediction: float
    output: float | None
    batched: float | None
    divided: float | None = None


class _RecordedStep(NamedTuple):
    """One step of the pipeline's own run: its prediction, the latents before it and the latents after it."""

    prediction: Tensor
    latents: Tensor
    following: Tensor


class _PlainRun(NamedTuple):
    """The pipeline's own run for one problem: its steps, by the loop's own index, and its output."""

    problem: int
    steps: list[_RecordedStep]
    output: Tensor


def verify(process: GaussianProcess, *, steps: int = 3, tolerance: float = 1e-5) -> Verified:
    """Compare a process from `steer.from_pipeline` with its pipeline, over the first steps and the decoder.

    For each problem alone, the pipeline runs its first `steps` steps and decodes, one row, with its own scheduler and
    nothing of steer's. Compared with that are:

    - the process's predictions from the same latents, last step first, and its output. That finds networks that
      remember earlier steps, loops that keep state, and outputs made of more than the latents;
    - three rows of every problem in one batch, the first two of them equal. That finds problems that get each
      other's conditions, rows that affect each other, and inputs that the pipeline draws anew for every row;
    - the pipeline's own call with all problems at once, all with the first problem's texts, which would be padded to
      the longest otherwise. That finds images, masks and other arguments that reach the wrong problem;
    - the rows that reach the networks with those that a run would be charged, at each of the steps, and the rows
      that the networks are asked for at all others;
    - the state of all modules (attention processors, dtypes, hooks, adapter scales) with that before opening, and
      before all this.

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

    Cost: for each of B problems, 6 `steps` network evaluations and four decodes of one row; run it once for every
    pipeline new to you.
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
    call, indices = denoiser.call, denoiser.grid.indices
    steps = len(indices) if call.free is not None else min(steps, len(indices))
    all_problems = range(call.conditioning.problems or 1)
    problems = all_problems if denoiser.problem is None else [denoiser.problem]
    with torch.no_grad():
        try:
            _check_modules(call, call.changed_by_opening, "opening")
            before = call.modules.read()
            runs = [_run_alone(call, indices[steps - 1] + 1, b) for b in problems]
            _check_rows(process, denoiser, steps, runs[0])
            found = _compare(process, denoiser, steps, tolerance, runs)
            found = found._replace(divided=_check_division(call, indices[:steps], tolerance))
            _check_modules(call, call.modules.changes(before), "predicting or decoding")
            return found
        except (SteerError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ModelError(
                f"verify runs {type(denoiser.call.user_pipe).__name__} row by row with the arguments that it was "
                f"opened with, and it raised {type(error).__name__}: {error}; wrap its network by steer.from_eps, "
                "from_v, from_velocity or from_denoiser"
            ) from error


def _compare(
    process: GaussianProcess, denoiser: PipelineDenoiser, steps: int, tolerance: float, runs: list[_PlainRun]
) -> Verified:
    """Compare steer's predictions and outputs with those recorded; raises ModelError above the tolerance."""
    call = denoiser.call
    decoder = process.decoder if isinstance(process.decoder, PipelineDecoder) else None
    worst, decoded = 0.0, None
    for run in runs:
        for k in reversed(range(steps)):
            index = denoiser.grid.indices[k]
            ours = call.predict(run.steps[index].latents, (run.problem,), 1, index)
            worst = max(worst, _relative_difference(ours, run.steps[index].prediction))
        if decoder is not None:
            output = call.decode(run.steps[-1].following, (run.problem,), 1)
            decoded = max(decoded or 0.0, _relative_difference(output, run.output))
    for name, error in (("predictions", worst), ("output", decoded)):
        if error is not None and not error <= tolerance:
            raise ModelError(
                f"steer's {name} of {type(call.user_pipe).__name__} differ from the pipeline's own by {error:.2g} of "
                f"the largest value (tolerance {tolerance:.2g}): the pipeline keeps state from step to step, or does "
                "more than predict, step and decode; switch its caches off, or wrap its network by steer.from_denoiser"
            )
    batched = _batch_difference(denoiser, steps, runs)
    if decoder is not None and batched is not None:
        batched = max(batched, _decoded_difference(decoder, runs))
    rounding = 10.0 * tolerance  # batches of another size are computed with other rounding
    if batched is not None and not batched <= rounding:
        raise ModelError(
            f"a row in a batch differs from the row alone by {batched:.2g} of the largest value (tolerance "
            f"{rounding:.2g}): {type(call.user_pipe).__name__} mixes rows, or repeats its inputs for one row only; "
            "open it with chunk=1"
        )
    return Verified(steps, worst, decoded, batched)


def _batch_difference(denoiser: PipelineDenoiser, steps: int, runs: list[_PlainRun]) -> float | None:
    """Difference of predictions in a batch of three rows per problem, the first two equal, from each alone.

    The second row tells: where conditions are in the order p0, p1, p0, p1, a problem's first and third may be right.
    None where every row is a call of its own, also because a call with several rows raises.
    """
    denoiser = PipelineDenoiser(denoiser.call, denoiser.grid, denoiser.chunk, denoiser.problem)
    worst = 0.0
    for index in denoiser.grid.indices[:steps]:
        own = [run.steps[index].latents[0] for run in runs]
        others = [run.steps[0 if index else -1].following[0] for run in runs]
        rows = torch.stack([torch.stack([x, x, other]) for x, other in zip(own, others, strict=True)])
        output = denoiser.output(rows, index)
        if denoiser.chunk == 1 and len(runs) == 1:
            return None
        for b, run in enumerate(runs):
            alone = run.steps[index].prediction[0][: output.shape[2]]
            worst = max(worst, *(_relative_difference(output[b, n], alone) for n in (0, 1)))
    return worst


def _decoded_difference(decoder: PipelineDecoder, runs: list[_PlainRun]) -> float:
    """Difference of outputs in a batch of two rows per problem from each problem's output alone."""
    rows = torch.cat([torch.cat([run.steps[-1].following, run.steps[0].latents]) for run in runs])
    outputs = decoder(rows)[::2]
    return max(
        _relative_difference(ours[None].reshape_as(run.output), run.output)
        for ours, run in zip(outputs, runs, strict=True)
    )


def _check_division(call: PipelineCall, indices: Any, tolerance: float) -> float | None:
    """Difference from the pipeline's own call with all problems; raises ModelError above the tolerance.

    None where there is nothing to divide but texts, where the pipeline does not take several problems, and for combined
    pipelines, whose prior draws for all of them in turn.
    """
    given, problems = call.conditioning.given, call.conditioning.problems or 1
    texts = [name for name, value in given.items() if name.startswith(PER_PROBLEM_ARGUMENTS) or _are_texts(value)]
    others = [value for name, value in given.items() if name not in (*texts, "generator", "latents")]
    plain = all(isinstance(value, (str, int, float, type(None))) for value in others)
    if problems == 1 or plain or call.owner is not call.user_pipe:
        return None
    same = {
        name: divided(value, call.conditioning.division.get(name, "whole"), [0] * problems, problems)
        for name, value in given.items()
        if name in texts
    }
    equal = PipelineCall(call.user_pipe, {**given, **same}, call.conditioning.steps)
    several_problems.divide_arguments(equal)
    equal.draw = lambda rows: constant_draw(0.0)  # what is drawn for each prompt in turn is none of its arguments
    equal.record_start()
    probe(equal)
    try:
        steps, _ = _run_pipeline(equal, max(indices) + 1, None)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # one prompt at a time is all that the pipeline takes
        return None
    if len(steps[0].latents) != problems:
        return None
    worst = 0.0
    for index in indices:
        for b in range(problems):
            ours = equal.predict(steps[index].latents[b : b + 1], (b,), 1, index)
            worst = max(worst, _relative_difference(ours, steps[index].prediction[b : b + 1]))
    if not worst <= 10.0 * tolerance:
        raise ModelError(
            f"with all prompts in one call, {type(call.user_pipe).__name__} predicts otherwise than steer does for "
            f"each alone, by {worst:.2g} of the largest value (tolerance {10.0 * tolerance:.2g}): an argument with an "
            "entry per prompt reaches another prompt; open one process per prompt"
        )
    return worst


def _are_texts(value: Any) -> bool:
    """Whether a value is several texts."""
    return isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)


def _check_rows(process: GaussianProcess, denoiser: PipelineDenoiser, steps: int, run: _PlainRun) -> None:
    """Raises ModelError where other rows reach the networks, or are asked of them, than a run is charged for."""
    call, denoiser = denoiser.call, denoiser.only(run.problem)
    for k, index in enumerate(denoiser.grid.indices):
        if k < steps:
            row = run.steps[index].latents
            two = torch.stack([row[:1], row[:1]], 1)
            if k == 0:  # some pipelines take several rows of none of their arguments, which is found out once
                denoiser.output(two, index)
            for rows in (two[:, :1], two):
                with _rows_counted(call) as counted:
                    denoiser.output(rows, index)
                if sum(counted) != rows.shape[1] * process.rows_at(k):
                    raise _wrong_rows(call, k, sum(counted), rows.shape[1] * process.rows_at(k))
        elif call.rows_asked_for(index) != process.rows_at(k):
            raise _wrong_rows(call, k, call.rows_asked_for(index), process.rows_at(k))


def _wrong_rows(call: PipelineCall, k: int, rows: int, charged: int) -> ModelError:
    return ModelError(
        f"a prediction of {type(call.user_pipe).__name__} at step {k} takes {rows} network rows, and {charged} are "
        "counted, so budgets and costs would be wrong; wrap its network by steer.from_denoiser"
    )


def _check_modules(call: PipelineCall, changed: list[str], when: str) -> None:
    """Raises ModelError where modules are not what they were."""
    if changed:
        raise ModelError(
            f"{when} left the {', '.join(changed)} of {type(call.user_pipe).__name__}'s modules changed, so what else "
            "uses them computes something else; load the pipeline again, and wrap its network by steer.from_denoiser"
        )


@contextmanager
def _rows_counted(call: PipelineCall) -> Iterator[list[int]]:
    """The rows of every call of the pipeline's networks in its loop, counted at the modules themselves."""
    counted: list[int] = []

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if call.scheduler.stage != "before":
            counted.append(rows_of_arguments(args, kwargs))

    handles = [network.register_forward_pre_hook(count, with_kwargs=True) for network in call.networks]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


def _run_alone(call: PipelineCall, length: int, problem: int) -> _PlainRun:
    """The pipeline's own run for one problem."""
    return _PlainRun(problem, *_run_pipeline(call, length, problem))


def _run_pipeline(call: PipelineCall, length: int, problem: int | None) -> tuple[list[_RecordedStep], Tensor]:
    """The first `length` steps of the pipeline's own loop, and its output after them.

    Args:
        call: The opened pipeline, of which arguments and random numbers are taken.
        length: Number of steps.
        problem: The problem; None: all in one call, with the arguments as the user gave them.
    """
    scheduler, seen = copy.deepcopy(call.owner.scheduler), []
    rows = 1 if problem is not None else call.conditioning.problems or 1
    set_timesteps, step = scheduler.set_timesteps, scheduler.step

    def shortened(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        # The loop ends after these, and the pipeline decodes what it has.
        scheduler.timesteps = steered_grid(scheduler.timesteps, lambda grid: iter(grid.unbind()[:length]))

    def recorded(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = step(model_output, timestep, sample, *args, **kwargs)
        following = result[0] if isinstance(result, tuple) else result.prev_sample
        # Copies, as some loops write into their latents.
        seen.append(_RecordedStep(*(_first_copy(tensor, rows).clone() for tensor in (model_output, sample, following))))
        return result

    scheduler.set_timesteps = functools.wraps(set_timesteps)(shortened)
    scheduler.step = functools.wraps(step)(recorded)
    pipe = copy_pipeline(call.user_pipe, scheduler)
    return seen, call.output(pipe, None if problem is None else (problem,), 1)


def _first_copy(tensor: Tensor, rows: int) -> Tensor:
    """The rows of a batch, where some loops carry one copy per guidance branch."""
    return tensor[:rows] if len(tensor) % rows == 0 else tensor


def _relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value of `theirs`; infinite for different shapes."""
    if ours.shape != theirs.shape:
        return float("inf")
    scale = float(theirs.float().abs().max())
    return float((ours.float() - theirs.float()).abs().max()) / (scale or 1.0)
