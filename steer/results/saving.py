"""A run on disk: result.safetensors and result.json, written atomically, verified on the way back."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.trajectory import ResamplingRecord
from ..files import to_json, versions, write_atomically
from ..report.run_result import RunResult

SCHEMA = 1
TENSORS, FACTS = "result.safetensors", "result.json"
_REFERENCE = ("reference_x", "reference_reward")


def save_result(
    result: RunResult,
    directory: Path,
    *,
    reference: RunResult | None = None,
    **notes: Any,
) -> Path:
    """The directory, now holding result.safetensors (numbers) and, written last, result.json (facts and digest).

    reference: unsteered samples to keep beside it.
    notes:     anything of plain JSON types: names of model, reward and method, options.
    """
    from safetensors.torch import save

    directory.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(result, reference)
    blob = save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()})
    facts = _facts(result)
    facts["reference_cost"] = None if reference is None else reference.cost.to_dict()
    facts["sha256"] = {TENSORS: hashlib.sha256(blob).hexdigest()}
    facts["run"] = notes
    write_atomically(directory / TENSORS, blob)
    write_atomically(directory / FACTS, to_json(facts))
    return directory


def _tensors(result: RunResult, reference: RunResult | None) -> dict[str, Tensor]:
    tensors = {name: getattr(result, name) for name in ("x", "reward", "log_weight", "log_evidence", "root")}
    if result.seen:
        tensors["seen_levels"] = torch.tensor([seen.k for seen in result.seen])
        tensors["ess"] = torch.stack([seen.ess for seen in result.seen])
        tensors["scores"] = _stacked([seen.score for seen in result.seen], math.nan)
    if result.trajectory is not None:
        moves = [event for event in result.trajectory.past if isinstance(event, ResamplingRecord)]
        tensors["ancestor_levels"] = torch.tensor([move.k for move in moves], dtype=torch.int64)
        tensors["resampled"] = _stacked([move.happened for move in moves], 0)
        tensors["ancestors"] = _stacked([move.parent.int() for move in moves], -1)
    if reference is not None:
        tensors |= {"reference_x": reference.x, "reference_reward": reference.reward}
    return tensors


def _stacked(levels: list[Tensor], blank: float) -> Tensor:
    """Levels (..., M) as one tensor (L, ..., M); where a method changed the number of particles, padded at the end."""
    if not levels:
        return torch.empty(0)
    width = max(level.shape[-1] for level in levels)
    return torch.stack([pad(level, (0, width - level.shape[-1]), value=blank) for level in levels])


def _facts(result: RunResult) -> dict[str, Any]:
    process, shares = result.process, result.log_weight.exp().tolist()
    scores, slots = result.reward.tolist(), result.root.tolist()
    problems, particles = result.reward.shape
    return {
        "schema": SCHEMA,
        "interrupted": result.interrupted,
        "temperature": result.temperature,
        "log_evidence": result.log_evidence,
        "log_evidence_variance": result.log_evidence_variance,
        "law": result.law,
        "key": {
            "seed": result.key.seed, "stream": list(result.key.stream), "problem": result.key.problem,
            "slot": result.key.slot, "step": result.key.step,
        },
        "process": {
            "event": list(process.event),
            "steps": process.steps,
            "times": getattr(process, "times", None),
            "schedule": repr(getattr(process, "schedule", None)),
            "rule": repr(getattr(process, "rule", None)),
        },
        # The starting noise of a candidate is key.fold("prior").shifted(problem=problem, slot=slot).
        "candidates": [
            {"problem": b, "particle": n, "slot": slots[b][n], "reward": scores[b][n],
             "weight": shares[b][n]}
            for b in range(problems)
            for n in range(particles)
        ],
        "cost": result.cost.to_dict(),
        "diagnostics": dict(result.diagnostics),
        # Trees live in memory, to be grown further there; their leaves are the samples saved.
        "tree": None if result.tree is None else {"saved": False, "was": repr(result.tree)},
        "versions": versions(),
    }  # fmt: skip
