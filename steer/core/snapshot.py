"""A Trajectory as tensors and facts, and back: all of it, so that it goes on as the one in memory does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import SteerError
from ..files import from_archive, to_archive, write_atomically
from ..types import ReverseProcess
from .trajectory import ParticleFields, PathState, ResamplingRecord, StepCache, StepRecord, Trajectory

KIND = "trajectory"
_CLASSES = {"cache": StepCache, "path": PathState}
_APART = ("process", "past")


def save_trajectory(state: Trajectory, path: str | Path) -> Path:
    """Writes a trajectory to one file, atomically, with a digest over all of it.

    Args:
        state: any; one to go on from is an `Event.state` that `on_step` was called with.
        path: the file, usually ending in .safetensors.

    Returns:
        The path.
    """
    tensors, facts = trajectory_parts(state)
    return write_atomically(Path(path), to_archive(tensors, {"kind": KIND, "process": about(state.process), **facts}))


def load_trajectory(path: str | Path, process: ReverseProcess) -> Trajectory:
    """A trajectory that `save_trajectory` wrote, to go on from: `steer.smc(process, reward, start=trajectory)`.

    Args:
        path: the file.
        process: the one that made it, opened again.

    Returns:
        The trajectory, on the process's device, equal to the one saved to the last bit.

    Raises:
        SteerError: the file is missing or damaged, holds something else, or was made by another process.
    """
    tensors, facts = from_archive(Path(path))
    if facts.get("kind") != KIND:
        raise SteerError(
            f"{path} must hold a trajectory, and holds a {facts.get('kind')}; read the directory of a run with "
            "steer.load_run"
        )
    check_process(facts["process"], process)
    return trajectory_from(tensors, facts, process)


def trajectory_parts(
    state: Trajectory, beside: Mapping[str, Tensor] | None = None, *, states: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A trajectory as tensors and facts of JSON's types.

    Args:
        state: the trajectory.
        beside: tensors by name that go into the same file; those that it shares with them are not held twice.
        states: whether the remembered steps go along, which are as large as all of its states on the way.

    Returns:
        All tensors, also those beside it; and the facts.
    """
    tensors = dict(beside or {})
    names = [f.name for f in fields(state) if f.name not in _APART]
    facts = {name: packed(getattr(state, name), f"trajectory.{name}", tensors) for name in names}
    past = [event for event in state.past if states or isinstance(event, ResamplingRecord)]
    moves = [event for event in past if isinstance(event, ResamplingRecord)]
    tensors["ancestor_levels"] = torch.tensor([move.k for move in moves], dtype=torch.int64)
    tensors["resampled"] = stacked([move.happened for move in moves], 0)
    tensors["independent"] = torch.tensor([move.independent for move in moves], dtype=torch.bool)
    tensors["ancestors"] = stacked([move.parent.int() for move in moves], -1)
    past_facts = []
    for i, event in enumerate(past):
        step = event._asdict() if isinstance(event, StepRecord) else None
        past_facts.append(None if step is None else packed(step, f"trajectory.past.{i}", tensors))
    return tensors, {"fields": facts, "past": past_facts}


def trajectory_from(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], process: ReverseProcess) -> Trajectory:
    """The trajectory of `trajectory_parts`, on a process and its device."""
    held = {name: tensor.to(process.device) for name, tensor in tensors.items()}
    flags = (held[name].tolist() for name in ("ancestor_levels", "independent"))
    moves = zip(*flags, held["ancestors"], held["resampled"], strict=True)
    records = (
        ResamplingRecord(k, index[:, index[0] >= 0].long(), done.bool(), independent)
        for k, independent, index, done in moves
    )
    past = tuple(next(records) if step is None else StepRecord(**unpacked(step, held)) for step in facts["past"])
    values = {name: unpacked(fact, held) for name, fact in facts["fields"].items()}
    for name, kind in _CLASSES.items():
        values[name] = kind(**values[name])
    return Trajectory(process=process, past=past, **values)


def stacked(levels: list[Tensor], blank: float) -> Tensor:
    """Levels (..., M) as one tensor (L, ..., M); where a method changed the number of particles, padded at the end."""
    if not levels:
        return torch.empty(0)
    width = max(level.shape[-1] for level in levels)
    return torch.stack([pad(level, (0, width - level.shape[-1]), value=blank) for level in levels])


def packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as a fact; its tensors go to `tensors`, each once, under names that begin with `name`."""
    if isinstance(value, Tensor):
        known = next((known for known, tensor in tensors.items() if tensor is value), None)
        tensors[known or name] = value
        return {"tensor": known or name}
    if isinstance(value, ParticleFields):
        value = value.__dict__
    if isinstance(value, Mapping):
        return {"of": {str(key): packed(entry, f"{name}.{key}", tensors) for key, entry in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [packed(entry, f"{name}.{i}", tensors) for i, entry in enumerate(value)]}
    if isinstance(value, float):
        return {"float": repr(float(value))}  # to the bit, and NaN and infinities, which JSON lacks
    if value is None or isinstance(value, bool | int | str):
        return value
    raise SteerError(
        f"a trajectory is saved as tensors, numbers and texts, and its {name} is a {type(value).__name__}; keep a "
        "tensor [B, N, ...] there"
    )


def unpacked(fact: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `packed` was given, its tensors looked up; sequences are lists."""
    if not isinstance(fact, Mapping):
        return fact
    if "tensor" in fact:
        return tensors[fact["tensor"]]
    if "float" in fact:
        return float(fact["float"])
    if "list" in fact:
        return [unpacked(entry, tensors) for entry in fact["list"]]
    return {key: unpacked(entry, tensors) for key, entry in fact["of"].items()}


# -- the process


def about(process: ReverseProcess) -> dict[str, Any]:
    """What a record says of a process, and what a process that the record is opened on must agree with."""
    found = {"type": type(process).__name__, "event": list(process.event), "steps": process.steps}
    for name in ("prompts", "times", "schedule", "rule"):
        try:
            value = getattr(process, name, None)
        except SteerError:  # hooks have changed what it is about
            value = None
        found[name] = value if value is None or name in ("prompts", "times") else repr(value)
        found[name] = list(found[name]) if isinstance(found[name], tuple) else found[name]
    return found | {"clip": repr(getattr(process, "clip", None))}  # "None" is known, and null of an older record is not


def check_process(made: Mapping[str, Any], process: ReverseProcess) -> None:
    """Raises SteerError where a process is not the one that a record is about, as far as both say."""
    given = about(process)
    if (made["event"], made["steps"]) != (given["event"], given["steps"]):
        raise SteerError(
            f"the run was made by a process of {made['steps']} steps with states {tuple(made['event'])}, got one of "
            f"{given['steps']} with {tuple(given['event'])}; open the process as it was"
        )
    for name in ("prompts", "times", "schedule", "rule", "clip"):
        before, now = made.get(name), given[name]
        unknown = before is None or now is None or " at 0x" in f"{before}{now}"  # objects without a repr of their own
        if not unknown and before != now:
            raise SteerError(
                f"the run was made by a process with {name} {_short(before)}, got one with {_short(now)}; open the "
                "process as it was"
            )


def _short(value: Any, most: int = 120) -> str:
    """The value in a message."""
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= most else f"{text[:most]}..."
