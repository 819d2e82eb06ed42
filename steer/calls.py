"""The one seam at which a run pays: every prediction, score and gradient passes here, and can be answered elsewhere.

A run is a function of its key and of what its paid calls return. So whatever must see a run from outside stands here,
and no sampler knows of it: a journal that remembers the answers (`steer.resumable`). Runs whose state is a value offer
it at the ends of their steps (`core.checkpoints`), to a caller that can keep it in place of the calls before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Answer = dict[str, Tensor]
"""What a paid call returns, by name."""


class Caller(Protocol):
    """Makes a paid call, or answers it without making it.

    Args:
        meter: the run's ledger, into which `function` counts.
        kind: "denoise", "score" and "value_and_grad", whose rows are independent; "groupwise" (a score that depends on
            the other samples); "point" (predictions of a weighted SDE and derivatives through them) and "guided" (a
            prediction with what hooks make of it, who draw by the place of a particle).
        k: the level; -1 where a call has none.
        function: makes the call.
        tensors: its arguments, [B, N, ...].
        named: what else the answer depends on, as text.
    """

    def __call__(
        self, meter: Any, kind: str, k: int, function: Callable[..., Answer], *tensors: Tensor, named: str = ""
    ) -> Answer: ...


class Parts(NamedTuple):
    """The state of a run: tensors by name, and facts of JSON's types."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoint(Protocol):
    """A run's place with a `Keeper`. found: the state that an earlier start has left there, to go on from."""

    @property
    def found(self) -> Parts | None: ...

    def offer(self, parts: Callable[[], Parts]) -> None:
        """The end of a step, whose state may be asked for."""
        ...


@runtime_checkable
class Keeper(Protocol):
    """A caller that keeps states of runs in place of the calls that led there."""

    def begin(self, meter: Any, about: dict[str, str], problems: int | None) -> Checkpoint:
        """The place of a run that begins its steps.

        about: what makes it another run than others, by name. problems: that its process is conditioned on.
        """
        ...


_callers: ContextVar[tuple[Caller, ...]] = ContextVar("callers", default=())


def callers() -> tuple[Caller, ...]:
    """Those of the `with` blocks around, outermost first."""
    return _callers.get()


def keeper() -> Keeper | None:
    """That of the `with` blocks around; None where there is none, or several, of which each would need all calls."""
    found = [caller for caller in _callers.get() if isinstance(caller, Keeper)]
    return found[0] if len(found) == 1 else None


@contextmanager
def through(caller: Caller) -> Iterator[None]:
    """Paid calls pass this caller, inside those of the `with` blocks around it."""
    token = _callers.set((*_callers.get(), caller))
    try:
        yield
    finally:
        _callers.reset(token)


def call(meter: Any, kind: str, k: int, function: Callable[..., Answer], *tensors: Tensor, named: str = "") -> Answer:
    """function(*tensors), by the callers of the `with` blocks around. Calls that it makes itself are part of it."""
    callers = _callers.get()
    if not callers:
        return function(*tensors)
    token = _callers.set(())
    try:
        for caller in reversed(callers):
            function = partial(caller, meter, kind, k, function, named=named)
        return function(*tensors)
    finally:
        _callers.reset(token)


def fingerprint(tensor: Tensor) -> str:
    """A 64-bit hash of a tensor's contents, as hexadecimal digits. Reads the device."""
    raw = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.data, digest_size=8).hexdigest()
