"""A proxy for a pipeline's network: it counts rows, and can return outputs recorded earlier instead of computing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .argument_division import same_value
from .families import PARTS_OUTSIDE_LOOP
from .steered_scheduler import IgnoresInterrupt, SteeredScheduler


class NetworkProxy:
    """Forwards calls and attributes to a module, which itself is never modified.

    Offload hooks, adapters and compiled code are in the module and act as usual. `isinstance` sees the module's class;
    attributes are read from and set on the module.

    Args:
        module: The pipeline's network.
        scheduler: The steered scheduler, which knows the current job and the stage of the loop.
        recorded: Outputs recorded so far, shared by all networks of a pipeline.
        name: The component's name in the pipeline.

    Raises:
        IgnoresInterrupt: When called in a step that the pipeline was asked to skip.
    """

    def __init__(self, module: torch.nn.Module, scheduler: SteeredScheduler, recorded: dict[Any, Any], name: str):
        vars(self).update(_module=module, _scheduler=scheduler, _recorded=recorded, _name=name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        job, stage = self._scheduler.job, self._scheduler.stage
        if stage == "skip":
            raise IgnoresInterrupt  # before the network runs, so this costs nothing
        rows = rows_of_arguments(args, kwargs)
        if stage == "before":
            return self._before_loop((job.problems, job.rows_each, job.noise, job.given), args, kwargs)
        job.rows_by_step[self._scheduler.loop_step] += rows
        if stage == "at" and job.inputs is not None:
            job.inputs.append((self._name, args, kwargs))
        if stage in ("stub", "enter", "next") or (stage == "at" and job.stubbed):
            return self._of_same_form(rows, args, kwargs)
        return self._module(*args, **kwargs)

    def _of_same_form(self, rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An output in which only the form is right: the module runs once, and its rows are repeated ever after."""
        if self._name not in self._recorded:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                self._recorded[self._name] = rows, self._module(*args, **kwargs)
        recorded, output = self._recorded[self._name]
        return output if recorded == rows else _with_rows(output, recorded, rows)

    def _before_loop(self, call: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network's output before the loop (in a prior's own loop, say), computed once per set of arguments."""
        answers = self._recorded.setdefault((self._name, *call), [])
        known = next((answer for given, answer in answers if same_value(given, (args, kwargs))), None)
        if known is None:
            known = self._module(*args, **kwargs)
            answers.append(((args, kwargs), known))
        return list(known) if isinstance(known, list) else known  # pipelines scale the lists of adapters in place

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._module, name)


def is_network(name: str, component: Any) -> bool:
    """Whether a component of a pipeline is a network of its loop, by its type and `families.PARTS_OUTSIDE_LOOP`.

    Args:
        name: The component's name in the pipeline.
        component: The component.
    """
    return isinstance(component, torch.nn.Module) and not any(part in name for part in PARTS_OUTSIDE_LOOP)


def _with_rows(value: Any, recorded: int, rows: int) -> Any:
    """A network's output with its rows repeated, or left out, until they are as many as wanted."""
    if torch.is_tensor(value):
        each = len(value) // recorded if value.ndim and recorded else 0  # frames, where they are in the axis of rows
        if not each or len(value) % recorded:
            return value
        index = torch.arange(rows * each, device=value.device) % len(value)
        return value.index_select(0, index)
    if isinstance(value, list) and len(value) == recorded and not _are_batches(value, recorded):
        return [value[row % recorded] for row in range(rows)]
    if isinstance(value, (list, tuple)):
        return type(value)(_with_rows(part, recorded, rows) for part in value)
    if hasattr(value, "items"):  # diffusers' outputs are ordered dictionaries and dataclasses
        return type(value)(**{name: _with_rows(part, recorded, rows) for name, part in value.items()})
    return value


def _are_batches(parts: list[Any], rows: int) -> bool:
    """Whether the tensors of a list have an axis of rows each, so that the list itself is not that axis."""
    return rows > 1 and all(torch.is_tensor(part) and part.ndim > 0 and len(part) == rows for part in parts)


def rows_of_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Rows in a call: the length of the first argument that is a list or a tensor with two axes or more.

    Args:
        args: The call's arguments.
        kwargs: Those by name.
    """
    first: Callable[[Any], bool] = lambda v: isinstance(v, list) or (torch.is_tensor(v) and v.ndim > 1)  # noqa: E731
    return next((len(value) for value in (*args, *kwargs.values()) if first(value)), 0)
