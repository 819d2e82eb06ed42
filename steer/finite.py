"""Where NaN and infinities come from: one flag for every tensor that the network, the decoder or the reward returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import NonFiniteError

Explain = Callable[[], NonFiniteError]


class _Flag(NamedTuple):
    """Whether something is wrong, on its way to the host; what to raise then; and the device's sign of its arrival."""

    bad: Tensor
    explain: Explain
    arrived: Any


class FiniteWatch:
    """Finds numbers that are not finite in the step where they appear, without stalling the device.

    On the CPU a flag is read at once. On a device it is copied to the host behind the work that is queued, and read
    when the next prediction has been queued: the device never waits for the host, and an error is one step late. A run
    reads what is left by `settle` before it returns.
    """

    def __init__(self) -> None:
        self._flags: list[_Flag] = []

    def __reduce__(self) -> tuple[type[FiniteWatch], tuple[()]]:
        return FiniteWatch, ()  # flags under way belong to a device

    def look(self, bad: Tensor, explain: Explain) -> None:
        """Raises `explain()` where the flag `bad` (a boolean on the device) is true; on a device, later."""
        if bad.device.type == "cpu":
            if bool(bad):
                raise explain()
            return
        arrived = None
        if bad.device.type == "cuda":
            bad = bad.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._flags.append(_Flag(bad, explain, arrived))

    def settle(self) -> None:
        """Reads the flags so far."""
        flags, self._flags = self._flags, []
        for bad, explain, arrived in flags:
            if arrived is not None:
                arrived.synchronize()
            if bool(bad):
                raise explain()

    def prediction(self, x: Tensor, x0: Tensor, k: int, steps: int) -> None:
        """Looks at what a network made of states x at level k of `steps`. Reads the flags of the step before."""
        self.settle()
        x, x0 = x.detach(), x0.detach()
        self.look(_bad(x0, x.is_floating_point()), lambda: _of_prediction(x, x0, k, steps))

    def samples(self, x: Tensor, samples: Tensor, where: str) -> None:
        """Looks at what a decoder made of clean states x, before rewards see it."""
        if samples.is_floating_point():
            x, samples = x.detach(), samples.detach()
            self.look(_bad(samples, True), lambda: _of_samples(x, samples, where))


def _bad(values: Tensor, infinite: bool) -> Tensor:
    """Whether a tensor has a NaN, or an infinity where that is wrong too (log-probabilities of tokens may be -inf)."""
    return ~values.isfinite().all() if infinite else values.isnan().any()


def first_bad(values: Tensor, infinite: bool = True) -> tuple[tuple[int, ...], float] | None:
    """Index and value of the first number that is not finite (not a number, where `infinite` is false)."""
    bad = (~values.isfinite() if infinite else values.isnan()).nonzero()
    if not len(bad):
        return None
    index = tuple(int(i) for i in bad[0])
    return index, values[index].item()


def _of_prediction(x: Tensor, x0: Tensor, k: int, steps: int) -> NonFiniteError:
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
    assert found is not None
    (problem, particle, *_), value = found
    return NonFiniteError(
        f"the network gave {value} at level {k} of {steps} from finite states (problem {problem}, particle {particle} "
        f"of a call on {x.shape[0]} x {x.shape[1]}): run it in bfloat16 or float32 where it is in float16, or start "
        "the time grid at a level that it was trained on"
    )


def _of_samples(x: Tensor, samples: Tensor, where: str) -> NonFiniteError:
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
    assert found is not None
    (row, *_), value = found
    problem, particle = divmod(row, x.shape[1])
    return NonFiniteError(
        f"the decoder gave {value} for a finite state (problem {problem}, particle {particle} {where}); run it in "
        "bfloat16 or float32 where it is in float16"
    )
