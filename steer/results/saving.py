"""A run on disk: result.safetensors, which is all of it, and result.json, its record for people to read."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.snapshot import about, save_trajectory, stacked, trajectory_parts
from ..core.trajectory import Trajectory
from ..errors import SteerError
from ..files import machine, read_sealed, sealed, to_archive, versions, write_atomically
from ..report.run_result import RunResult

KIND, SCHEMA = "result", 2
TENSORS, FACTS, PARTIAL = "result.safetensors", "result.json", "partial.safetensors"
REFERENCE = ("reference_x", "reference_reward")
POPULATION = ("x", "reward", "log_weight", "log_evidence", "log_evidence_variance", "root")


def save_partial(partial: Any, directory: Path, **notes: Any) -> Path | None:
    """Writes what an error left of a run in its `.partial`, and returns where; None where there is nothing to write.

    A Result, as any run's; a Trajectory, states under way, as partial.safetensors (`steer.load_trajectory`).
    """
    if isinstance(partial, Trajectory):
        return save_trajectory(partial, directory / PARTIAL)
    return partial.save(directory, **notes) if hasattr(partial, "save") else None


def save_result(
    result: RunResult,
    directory: Path,
    *,
    reference: RunResult | None = None,
    states: bool = False,
    **notes: Any,
) -> Path:
    """The directory, now holding result.safetensors (the run) and, written last, result.json (its record).

    Each is written atomically and begins with a digest of all its bytes. The first is all that `steer.load_run` needs;
    the second is there where the first is the whole file of the same run.

    Args:
        result: the run.
        directory: it is made; files of an earlier run there are replaced.
        reference: unsteered samples to keep beside it.
        states: whether the states on the way go along, where the run kept them (`keep_states`).
        **notes: anything of plain JSON types: names of model and options.
    """
    tensors, facts = _parts(result, reference, states)
    facts["run"] = notes
    blob, record = to_archive(tensors, facts), sealed(_record(result, facts))
    with suppress(OSError, ValueError):  # where there is no such directory, writing says so
        (directory / FACTS).unlink(missing_ok=True)  # a crash must not leave an earlier run's record beside this one
    write_atomically(directory / TENSORS, blob)
    write_atomically(directory / FACTS, record)
    return directory


def check_record(directory: Path) -> None:
    """Raises SteerError where a bit of a run's result.json has changed; it may be missing."""
    try:
        read_sealed(directory / FACTS)
    except SteerError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise SteerError(f"{error}; the run is whole in {TENSORS}: its record may also be deleted") from error


def _parts(result: RunResult, reference: RunResult | None, states: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A run as tensors and facts."""
    tensors = {name: getattr(result, name) for name in POPULATION}
    if result.seen:
        tensors["seen_levels"] = torch.tensor([seen.k for seen in result.seen])
        tensors["ess"] = torch.stack([seen.ess for seen in result.seen])
        tensors["scores"] = stacked([seen.score for seen in result.seen], math.nan)
    trajectory = tree = None
    if result.trajectory is not None:
        tensors, trajectory = trajectory_parts(result.trajectory, tensors, states=states)
    if result.tree is not None:
        own, tree = result.tree.parts()
        tensors |= {f"tree.{name}": tensor for name, tensor in own.items()}
    if reference is not None:
        tensors |= {"reference_x": reference.x, "reference_reward": reference.reward}
    key = result.key
    facts = {
        "kind": KIND,
        "schema": SCHEMA,
        "made_by": result.made_by._asdict(),
        "interrupted": result.interrupted,
        "temperature": result.temperature,  # null for infinity
        "temperature_choice": None if result.temperature_choice is None else asdict(result.temperature_choice),
        "method_choice": None if result.method_choice is None else asdict(result.method_choice),
        "law": result.law,
        "key": {
            "seed": key.seed,
            "stream": list(key.stream),
            "problem": key.problem,
            "slot": key.slot,
            "step": key.step,
        },
        "process": about(result.process),
        "cost": result.cost.to_dict(),
        "reference_cost": None if reference is None else reference.cost.to_dict(),
        "trajectory": trajectory,
        "tree": tree,
        "machine": machine() | {"device": str(result.x.device)},
        "versions": versions(),
    }
    return tensors, facts


def _record(result: RunResult, facts: dict[str, Any]) -> dict[str, Any]:
    """What people read of a run: its facts, with its numbers in place of how the file keeps them."""
    scores, slots, shares = result.reward.tolist(), result.root.tolist(), result.log_weight.exp().tolist()
    problems, particles = result.reward.shape
    numbers = {
        "log_evidence": result.log_evidence,
        "log_evidence_variance": result.log_evidence_variance,
        "diagnostics": dict(result.diagnostics),
        "tree": None if result.tree is None else repr(result.tree),
        # The starting noise of a candidate is key.fold("prior").shifted(problem=problem, slot=slot).
        "candidates": [
            {
                "problem": b,
                "particle": n,
                "slot": slots[b][n],
                "reward": scores[b][n],
                "weight": shares[b][n],
            }
            for b in range(problems)
            for n in range(particles)
        ],
    }
    return {name: fact for name, fact in facts.items() if name not in ("kind", "trajectory")} | numbers
