"""The ends of a run's steps, where its whole state is offered to the journal around it, and taken up again.

A journal (`steer.resumable`) keeps what network and reward answered, and grows with every step. A method whose state is
a value can be gone on with from that alone: it says so by a `Checkpoints`, in one place, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..calls import Parts, fingerprint, keeper
from ..errors import SteerError
from ..types import ReverseProcess
from .run import Run
from .snapshot import about as about_process
from .snapshot import packed, trajectory_from, trajectory_parts, unpacked
from .trajectory import LevelRecord, Trajectory


@runtime_checkable
class Notes(Protocol):
    """What a part of a run writes down on the way, beside the state: the strength of guidance, say."""

    def noted_so_far(self) -> list[Any]:
        """All of it, as tensors, numbers and texts in lists."""
        ...

    def restore(self, noted: list[Any]) -> None:
        """Has it hold that, and nothing else."""
        ...


class Checkpoints:
    """Offers a run's whole state at the ends of its steps, and finds the one that an earlier start has left.

        kept = Checkpoints(run, state, proposal, weight, seen=history)
        state = kept.state                          # as given, or of the end of a later step
        for _ in range(state.k, process.steps):
            state = ...                             # a step
            kept.reached(state)

    Outside of a journal it does nothing.

    Args:
        run: whose ledger is part of the state.
        state: that the steps begin from; None where there is no one population.
        *options: all else that the steps depend on; another run has others.
        seen: what the run has seen so far, a list, which is filled up.

    Attributes:
        state:   to go on from.
        carried: what `reached` was given beside the state then, tensors on the CPU; empty where the run begins.
    """

    def __init__(self, run: Run, state: Any, *options: Any, seen: list[LevelRecord] | None = None) -> None:
        self.run, self.seen = run, [] if seen is None else seen
        self.state: Any = state
        self.carried: dict[str, Any] = {}
        self._options, self._place, around = options, None, keeper()
        if around is not None:
            self._place = around.begin(run.meter, self._about(), run.process.problems)
            if self._place.found is not None:
                self._restore(*self._place.found)

    def reached(self, state: Trajectory | None, **carried: Any) -> None:
        """The end of a step. carried: what else the next step needs, as tensors, numbers and texts, also in lists."""
        if self._place is not None:
            self._place.offer(lambda: self._parts(state, carried))

    def _parts(self, state: Trajectory | None, carried: Mapping[str, Any]) -> Parts:
        meter = self.run.meter
        meter.finite.settle()  # nothing that is not finite is gone on from
        tensors, facts = ({}, {}) if state is None else trajectory_parts(state)
        own = {"ledger": meter.spent, "seen": [list(record) for record in self.seen]}
        own["notes"] = [notes.noted_so_far() for notes in _notes(self.run.process, *self._options)]
        facts = {"state": facts, "own": packed(own, "run", tensors), "carried": packed(carried, "carried", tensors)}
        return Parts(tensors, facts)

    def _restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        held = {name: tensor.to(self.run.process.device) for name, tensor in tensors.items()}
        own, self.carried = unpacked(facts["own"], held), unpacked(facts["carried"], tensors)
        self.run.meter.spent = own["ledger"]
        self.seen[:] = [LevelRecord(*record) for record in own["seen"]]
        for notes, noted in zip(_notes(self.run.process, *self._options), own["notes"], strict=True):
            notes.restore(noted)
        self.state = trajectory_from(tensors, facts["state"], self.run.process) if facts["state"] else None

    def _about(self) -> dict[str, str]:
        """What makes this run another one than others."""
        run, state = self.run, self.state
        found = {
            "run": run.name,
            "key": repr(run.key),
            "problems": f"{run.problems} from {run.first_problem}",
            "temperature": repr(run.temperature),
            "chunk": repr(run.chunk),
            "process": described(_facts_of(run.process)),
            "options": described(self._options),
        }
        if state is not None:
            found["beginning"] = f"{fingerprint(state.x)} {fingerprint(state.log_weight)} at level {state.k}"
        return found


def _facts_of(process: ReverseProcess) -> dict[str, Any]:
    """What is known of a process beside its network: other ones are noticed by what their network answers."""
    known = {name: value for name, value in about_process(process).items() if " at 0x" not in str(value)}
    for name in ("rule", "schedule", "hooks", "exponents", "clip"):
        try:
            known[name] = getattr(process, name, None)
        except SteerError:  # hooks have changed what it is about
            known[name] = None
    return known


def _notes(*parts: Any) -> Iterator[Notes]:
    """What the parts of a run write down, in the order of their fields."""
    for part in parts:
        if isinstance(part, Notes):
            yield part
        elif isinstance(part, list | tuple):
            yield from _notes(*part)
        elif is_dataclass(part) and not isinstance(part, type):
            yield from _notes(*(getattr(part, field.name) for field in fields(part)))


def described(value: Any) -> str:
    """A value as a text that is the same in another process, and another for what a run can be told apart by.

    Functions are their names, those without one (lambdas, functions made by functions) their code and what they close
    over. Of objects with a state that is their own affair, networks and rewards among them, only the class is told:
    whether they are the same is seen by what they answer.
    """
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {fingerprint(value)}"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, partial):
        return f"partial({described((value.func, value.args, value.keywords))})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{described(k)}: {described(v)}" for k, v in value.items())) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(described, value))) + "}"
    if isinstance(value, list | tuple | range):
        return "(" + ", ".join(map(described, value)) + ")"
    if isinstance(value, type):
        return value.__qualname__
    if is_dataclass(value):
        own = (f"{f.name}={described(getattr(value, f.name))}" for f in fields(value) if f.init)
        return f"{type(value).__qualname__}({', '.join(own)})"
    owner = getattr(value, "__self__", None)
    if owner is not None and hasattr(value, "__func__"):
        return f"{described(owner)}.{value.__name__}"
    return _function(value) if hasattr(value, "__code__") else type(value).__qualname__


def _function(function: Any) -> str:
    """A function; one that its name does not tell, with its code and what it closes over."""
    name = f"{function.__module__}.{function.__qualname__}"
    if "<" not in name:
        return name
    cells = (cell.cell_contents for cell in function.__closure__ or () if _set(cell))
    # Containers may be caches, which are full in one start and empty in the next.
    held = [type(c).__qualname__ if isinstance(c, dict | list | set) or c is function else described(c) for c in cells]
    return f"{name}({_code(function.__code__)}, {described(function.__defaults__)}, {', '.join(held)})"


def _code(code: Any) -> str:
    """What a function does, without where it is written."""
    inner = (_code(const) if hasattr(const, "co_code") else described(const) for const in code.co_consts)
    return fingerprint(_bytes("\n".join([code.co_code.hex(), *code.co_names, *inner])))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _set(cell: Any) -> bool:
    """Whether a variable that is closed over has a value yet."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
