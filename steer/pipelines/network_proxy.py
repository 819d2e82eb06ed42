"""A proxy for a pipeline's network: it counts rows, and can return outputs recorded earlier instead of computing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
        rows = _rows(args, kwargs)
        if stage == "before":
            return self._before_loop((job.problems, job.rows_each, job.noise, job.given), args, kwargs)
        job.rows_by_step[self._scheduler.loop_step] += rows
        if stage in ("stub", "enter", "next") or (stage == "at" and job.stubbed):
            # In a stubbed step only the form of the output matters: the module runs once per number of rows, and later
            # calls with as many rows return the same output.
            if (self._name, rows) not in self._recorded:
                with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                    self._recorded[self._name, rows] = self._module(*args, **kwargs)
            return self._recorded[self._name, rows]
        return self._module(*args, **kwargs)

    def _before_loop(self, call: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network's output before the loop (in a prior's own loop, say), computed once per set of arguments."""
        answers = self._recorded.setdefault((self._name, *call), [])
        known = next((answer for given, answer in answers if _same(given, (args, kwargs))), None)
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


def _same(one: Any, other: Any) -> bool:
    """Whether two calls have the same arguments, by value."""
    if torch.is_tensor(one) and torch.is_tensor(other):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return one is other or (isinstance(one, (str, int, float)) and one == other)


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Rows in a call: the length of the first argument that is a list or a tensor with two axes or more."""
    first: Callable[[Any], bool] = lambda v: isinstance(v, list) or (torch.is_tensor(v) and v.ndim > 1)  # noqa: E731
    return next((len(value) for value in (*args, *kwargs.values()) if first(value)), 0)
