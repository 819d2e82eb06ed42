"""Where NaN and infinities come from: one flag for every tensor that the network, the decoder or the reward returns."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import NonFiniteError

Explain = Callable[[], NonFiniteError | None]


class _Flag(NamedTuple):
    """A number that says whether all is well, on its way to the host; what then; and the sign of its arrival."""

    number: Tensor
    allowed: float
    explain: Explain
    arrived: Any


class FiniteWatch:
    """Finds numbers that are not finite in the step where they appear, without stalling the device.

    Each tensor is summed up in one number. On the CPU that is read at once. On a device it is copied to the host behind
    the work that is queued, and read when the next prediction has been queued: the device never waits for the host, and
    an error is one step late. A run reads what is left by `settle` before it returns.
    """

    def __init__(self) -> None:
        self._flags: list[_Flag] = []
        self._seen: Callable[[], Tensor | None] = lambda: None  # the last prediction, while it lives

    def __reduce__(self) -> tuple[type[FiniteWatch], tuple[()]]:
        return FiniteWatch, ()  # flags under way belong to a device

    def look(self, number: Tensor, explain: Explain, allowed: float = math.nan) -> None:
        """Raises what `explain` finds where a number is NaN or infinite, but for one infinity that is allowed."""
        arrived = None
        if number.device.type == "cuda":
            number = number.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        flag = _Flag(number, allowed, explain, arrived)
        if number.device.type == "cpu" and arrived is None:
            _read(flag)
        else:
            self._flags.append(flag)

    def settle(self) -> None:
        """Reads the flags so far."""
        flags, self._flags = self._flags, []
        for flag in flags:
            _read(flag)

    def prediction(self, x: Tensor, x0: Tensor, k: int, steps: int) -> None:
        """Looks at what a network made of states x at level k of `steps`. Reads the flags of the step before."""
        self.settle()
        self._seen = weakref.ref(x0)
        x, x0 = x.detach(), x0.detach()
        if x.is_floating_point():
            self.look(total(x0), lambda: _of_prediction(x, x0, k, steps))
        else:  # log-probabilities of tokens, which may be -inf
            self.look(x0.amax(), lambda: _of_prediction(x, x0, k, steps), -math.inf)

    def samples(self, x: Tensor, samples: Tensor, where: str) -> None:
        """Looks at what a decoder made of clean states x, before rewards see it."""
        if samples.is_floating_point() and not self._is_seen(samples):
            x, samples = x.detach(), samples.detach()
            self.look(total(samples), lambda: _of_samples(x, samples, where))

    def _is_seen(self, samples: Tensor) -> bool:
        """Whether samples are the prediction that was just looked at, where nothing decodes it."""
        seen = self._seen()
        return seen is not None and seen.data_ptr() == samples.data_ptr() and seen.numel() == samples.numel()


def total(values: Tensor) -> Tensor:
    """The sum of all entries, wide enough that it is finite where they are: one kernel."""
    return values.sum(dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)


def _read(flag: _Flag) -> None:
    if flag.arrived is not None:
        flag.arrived.synchronize()
    number = flag.number.item()
    if math.isfinite(number) or number == flag.allowed:
        return
    error = flag.explain()
    if error is not None:
        raise error


def first_bad(values: Tensor, infinite: bool = True) -> tuple[tuple[int, ...], float] | None:
    """Index and value of the first number that is not finite (not a number, where `infinite` is false)."""
    bad = (~values.isfinite() if infinite else values.isnan()).nonzero()
    if not len(bad):
        return None
    index = tuple(int(i) for i in bad[0])
    return index, values[index].item()


def _of_prediction(x: Tensor, x0: Tensor, k: int, steps: int) -> NonFiniteError | None:
    """The error of a prediction, which is the network's where its states were finite."""
    before = first_bad(x) if x.is_floating_point() else None
    if before is not None:
        (problem, particle, *_), value = before
        return NonFiniteError(
            f"a state is {value} at level {k} of {steps}, before the network saw it (problem {problem}, particle "
            f"{particle} of a call on {x.shape[0]} x {x.shape[1]}): the step that led there ran away; lower the scale "
            "of what moves particles (guidance, a proposal, a hook), or keep states in float32"
        )
    found = first_bad(x0, x.is_floating_point())
    if found is None:
        return None
    (problem, particle, *_), value = found
    return NonFiniteError(
        f"the network gave {value} at level {k} of {steps} from finite states (problem {problem}, particle {particle} "
        f"of a call on {x.shape[0]} x {x.shape[1]}): run it in bfloat16 or float32 where it is in float16, or start "
        "the time grid at a level that it was trained on"
    )


def _of_samples(x: Tensor, samples: Tensor, where: str) -> NonFiniteError | None:
    """The error of decoded samples, which is the decoder's where their states were finite."""
    before = first_bad(x) if x.is_floating_point() else None
    if before is not None:
        (problem, particle, *_), value = before
        return NonFiniteError(
            f"the state of problem {problem}, particle {particle} {where} is {value}, before it was decoded and "
            "scored: the step that led there ran away, or the function that predicted it; lower the scale of what "
            "moves particles (guidance, a proposal, a hook), or keep states in float32"
        )
    found = first_bad(samples)
    if found is None:
        return None
    (row, *_), value = found
    problem, particle = divmod(row, x.shape[1])
    return NonFiniteError(
        f"the decoder gave {value} for a finite state (problem {problem}, particle {particle} {where}); run it in "
        "bfloat16 or float32 where it is in float16"
    )
