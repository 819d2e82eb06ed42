"""What several problems in one call of a pipeline do to each other, found by calling it.

Two questions are settled here, by no table of names: which arguments hold an entry for each problem, and which problems
may share a call. Everything else steer does with one problem per call, where none of this can go wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..key import Key
from .argument_division import Division, blanked, divided, first_other_problem
from .pipeline_call import PipelineCall
from .row_composition import composed_of


def divide_arguments(call: PipelineCall) -> None:
    """Find out how arguments that may be shared or hold an entry per problem are divided, and note it.

    In a call of two problems, the first problem's entry is exchanged for another: where only the first problem's
    prediction changes, entries belong to problems (one image per prompt); where the second changes too, they do not
    (one image per control network, reference images).

    Args:
        call: The opened pipeline, before its first call.

    Raises:
        ModelError: Where the pipeline does not run with two problems, so that this cannot be found out.

    Cost: none without such arguments; for each, two network evaluations of two rows, or more where its entries matter
    at later steps only.
    """
    conditioning = call.conditioning
    if not conditioning.undecided:
        return
    likeliest: dict[str, Division] = {name: found[0] for name, found in conditioning.undecided.items()}
    conditioning.division.update(likeliest)
    with call.forgetting():
        problem = _why_not(call)
        if problem is not None:
            for name in likeliest:
                conditioning.division[name] = "whole"
            if _why_not(call) is None:
                return  # lists of another length than two make no call for two prompts, and their whole does
            raise _cannot_tell(call, next(iter(likeliest)), f"with two prompts the pipeline raised {problem}")
        for name, possible in conditioning.undecided.items():
            conditioning.division[name] = _division_of(call, name, possible)


class SharedCalls:
    """Which problems of a pipeline may share a call: `may_share`, found out once for each number of rows.

    Args:
        call: The opened pipeline.
    """

    def __init__(self, call: PipelineCall):
        self.call = call
        self._known: dict[tuple[tuple[int, ...], int], bool] = {}

    def __call__(self, problems: tuple[int, ...], rows_each: int) -> bool:
        """Whether these problems may share a call, with so many rows each."""
        key = problems, rows_each
        if key not in self._known:
            self._known[key] = may_share(self.call, problems, rows_each)
        return self._known[key]


def may_share(call: PipelineCall, problems: tuple[int, ...], rows_each: int) -> bool:
    """Whether several problems in one call give the networks what each problem alone would, at three of the steps.

    Args:
        call: The opened pipeline.
        problems: The problems, in order.
        rows_each: Rows per problem.

    Returns:
        False also where the pipeline raises for several problems.

    Cost: no network evaluation, as networks are stubbed; prompts are encoded.
    """
    length = call.scheduler.length
    x = Key(2).normal((len(problems), rows_each, *call.start.shape[1:])).to(call.start)
    before = set(call.computed)
    shared = False
    try:
        for index in sorted({0, length // 2, length - 1}):
            together = call.network_inputs(x.flatten(0, 1), problems, rows_each, index)
            alone = [call.network_inputs(x[i], (b,), rows_each, index) for i, b in enumerate(problems)]
            if not composed_of(together, alone, rows_each):
                break
        else:
            shared = True
    except torch.OutOfMemoryError:
        raise
    except Exception:  # many pipelines take lists of one prompt only
        shared = False
    # What was prepared for the calls that are not made from now on is not kept.
    call.forget(lambda known: known not in before and (known[2] == problems) is not shared)
    return shared


def _why_not(call: PipelineCall) -> str | None:
    """What the pipeline raises for the first two problems in a call; None where it runs."""
    try:
        call.first_predictions((0, 1), 0)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _division_of(call: PipelineCall, name: str, possible: list[Division]) -> Division:
    """How one argument is divided, by exchanging entries of it."""
    conditioning = call.conditioning
    value, problems = conditioning.given[name], conditioning.problems or 1
    unused = False
    for division in possible:
        other = first_other_problem(value, division, problems)
        if other is None:
            exchanged = blanked(value, division)
            if exchanged is None:
                return "whole"  # equal numbers: every problem gets the same either way
            pair, replaced = (0, 1), divided(exchanged, division, [0, 1], problems)
        else:
            pair, replaced = (0, other), divided(value, division, [other, other], problems)
        conditioning.division[name] = division
        changed = _changed(call, pair, name, replaced)
        if changed == {0}:
            return division
        unused = unused or not changed
    if not unused:
        return "whole"
    if isinstance(value, tuple):
        return "whole"  # a size, or another pair of numbers
    if isinstance(value, list) and all(isinstance(entry, (int, float)) for entry in value):
        raise _cannot_tell(call, name, "its entries change no prediction of two prompts")
    return possible[0]


def _changed(call: PipelineCall, pair: tuple[int, int], name: str, replaced: Any) -> set[int]:
    """Which of two problems' predictions an exchanged argument changes, at the first step where it changes any."""
    rounding = max(1e-5, 4.0 * torch.finfo(call.network_dtype).eps)  # of encoders in batches of another size
    for index in range(call.scheduler.length):
        try:
            plain, other = (call.first_predictions(pair, index, **given) for given in ({}, {name: replaced}))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _cannot_tell(call, name, f"with entries exchanged, the pipeline raised {error}") from error
        changes = [_change(a, b) for a, b in zip(plain, other, strict=True)]
        if max(changes) > rounding:
            return {row for row, change in enumerate(changes) if change > max(rounding, 0.02 * max(changes))}
    return set()


def _change(one: list[Tensor], other: list[Tensor]) -> float:
    """How much one problem's prediction and next latents differ, relative to the largest value."""
    return max(
        float((a - b).abs().max() / (a.abs().max() or 1.0)) if a.shape == b.shape else 1.0
        for a, b in zip(one, other, strict=True)
    )


def _cannot_tell(call: PipelineCall, name: str, why: str) -> ModelError:
    """The error for arguments of which it is not known whether problems share them."""
    return ModelError(
        f"{name} has as many entries as there are prompts, and steer cannot tell whether "
        f"{type(call.user_pipe).__name__} gives each prompt its own or all to every prompt: {why}; open one process "
        "per prompt"
    )
