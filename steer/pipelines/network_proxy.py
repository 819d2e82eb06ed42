"""A stand-in for a pipeline's network: counts its rows, and can answer with outputs recorded earlier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .steered_scheduler import IgnoresInterrupt, SteeredScheduler


class Network:
    """Passes everything on to a module, which itself is never modified.

    Offload hooks, adapters and compiled code live in the module and act as they always do. `isinstance` sees the
    module's class; attributes are read from and set on the module.
    """

    def __init__(self, module: torch.nn.Module, scheduler: SteeredScheduler, recorded: dict[Any, Any], name: str):
        vars(self).update(_module=module, _scheduler=scheduler, _recorded=recorded, _name=name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        job, stage = self._scheduler.job, self._scheduler.stage
        if stage == "skip":
            raise IgnoresInterrupt  # before the network has run, so finding out costs nothing
        rows = _rows(args, kwargs)
        if stage == "before":
            return self._prelude((job.problems, job.per, job.noise, job.given), args, kwargs)
        if stage in ("stub", "enter", "next") or (stage == "at" and job.stubbed):
            # What a stub answers does not matter, only its form: the first answer for a number of rows is the module's
            # own, the others repeat it.
            if (self._name, rows) not in self._recorded:
                with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                    self._recorded[self._name, rows] = self._module(*args, **kwargs)
            return self._recorded[self._name, rows]
        if stage == "at":
            job.rows += rows
        return self._module(*args, **kwargs)

    def _prelude(self, call: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the network answers before the loop (a prior's own loop, say): computed once, as all of the prelude."""
        answers = self._recorded.setdefault((self._name, *call), [])
        known = next((answer for given, answer in answers if _same(given, (args, kwargs))), None)
        if known is None:
            known = self._module(*args, **kwargs)
            answers.append(((args, kwargs), known))
        return list(known) if isinstance(known, list) else known  # adapters' lists are scaled in place

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
    """Whether a component is called in the loop, rather than before or after it."""
    around = ("vae", "vqvae", "movq", "vqgan", "encoder", "checker", "vocoder", "projection")
    return isinstance(component, torch.nn.Module) and not any(part in name for part in around)


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
    """Rows of a call: the batch of its first tensor of two axes or more, or the length of a list of tensors."""
    first: Callable[[Any], bool] = lambda v: isinstance(v, list) or (torch.is_tensor(v) and v.ndim > 1)  # noqa: E731
    return next((len(value) for value in (*args, *kwargs.values()) if first(value)), 0)
