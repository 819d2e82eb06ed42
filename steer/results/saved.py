"""A result read back from its files."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.trajectory import LevelRecord, ResamplingRecord, Trajectory
from ..cost import Cost
from ..errors import SteerError
from ..key import Key
from ..types import ReverseProcess
from .result import Result
from .saving import _REFERENCE, FACTS, SCHEMA, TENSORS


@dataclass(frozen=True, eq=False)
class Saved:
    """A run read back.

    tensors: by name: x, reward, log_weight, log_evidence, root; scores, ess and seen_levels; with lineage also
             ancestors, ancestor_levels and resampled; with a reference also reference_x and reference_reward.
    facts:   what result.json holds.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def cost(self) -> Cost:
        """The ledger."""
        return Cost(**self.facts["cost"])

    @property
    def key(self) -> Key:
        """The key the run was started with."""
        key = self.facts["key"]
        return Key(key["seed"], tuple(key["stream"]), key.get("problem", 0), key.get("slot", 0), key.get("step", 0))

    def result(self, process: ReverseProcess) -> Result:
        """The run again, on the process that made it (of the same steps): its lineage, without states and tree."""
        self._check(process)
        where = process.device
        read = {name: tensor.to(where) for name, tensor in self.tensors.items()}
        seen = ()
        if "seen_levels" in read:
            levels = zip(self.tensors["seen_levels"].tolist(), read["ess"], read["scores"], strict=True)
            seen = tuple(LevelRecord(k, ess, score[:, ~score.isnan().all(0)]) for k, ess, score in levels)
        trajectory = None
        if "ancestors" in read:
            moves = zip(self.tensors["ancestor_levels"].tolist(), read["ancestors"], read["resampled"], strict=True)
            past = tuple(ResamplingRecord(k, index[:, index[0] >= 0].long(), done.bool()) for k, index, done in moves)
            trajectory = Trajectory.begin(process, read["x"], k=process.steps)._with(
                past=past,
                diagnostics={name: _numbers(found) for name, found in self.facts.get("diagnostics", {}).items()},
            )
        return Result(
            process=process,
            key=self.key,
            cost=self.cost,
            temperature=math.inf if self.facts["temperature"] is None else self.facts["temperature"],
            interrupted=self.facts["interrupted"],
            seen=seen,
            trajectory=trajectory,
            law=self.facts.get("law", "none"),
            log_evidence_variance=_numbers(self.facts["log_evidence_variance"]).to(read["reward"].device),
            x=read["x"],
            reward=read["reward"],
            log_weight=read["log_weight"],
            log_evidence=read["log_evidence"],
            root=read["root"],
        )

    def reference(self, process: ReverseProcess) -> Result | None:
        """The unsteered samples that were saved beside it."""
        if "reference_x" not in self.tensors:
            return None
        self._check(process)
        x, reward = (self.tensors[name].to(process.device) for name in _REFERENCE)
        equal = torch.full_like(reward, -math.log(reward.shape[1]))
        root = torch.arange(reward.shape[1], device=reward.device).expand(reward.shape)
        return Result(
            process=process, x=x, reward=reward, log_weight=equal, log_evidence=torch.zeros_like(reward[:, 0]),
            root=root, key=self.key, cost=Cost(**self.facts["reference_cost"]),
        )  # fmt: skip

    def _check(self, process: ReverseProcess) -> None:
        made = self.facts["process"]
        if tuple(made["event"]) != tuple(process.event) or made["steps"] != process.steps:
            raise SteerError(
                f"the run was made by a process of {made['steps']} steps with states {tuple(made['event'])}, got one "
                f"of {process.steps} with {tuple(process.event)}"
            )

    def slots(self) -> Tensor:
        """The slot each final particle's noise was drawn at, step by step: [B, N, steps].

        With it a single candidate is made again alone: start at `key.fold("prior").shifted(problem=b, slot=s[0])`,
        then step k draws with `key.fold("step").shifted(problem=b, slot=s[k]).at(k)`.
        That is so of runs from the prior by the model's own transitions; guided proposals, MCMC starts, moves and
        pinned paths make states of more than these draws.
        """
        if "ancestors" not in self.tensors:
            raise SteerError("this run was saved without its lineage, so the slots of its noise are unknown")
        problems, particles = self.tensors["reward"].shape
        index = torch.arange(particles).expand(problems, particles)
        moves = list(zip(self.tensors["ancestor_levels"].tolist(), self.tensors["ancestors"].long(), strict=True))
        slots = []
        for k in reversed(range(self.facts["process"]["steps"])):
            # Newest first: what was rearranged after step k's draw separates today's particles from that draw.
            while moves and moves[-1][0] > k:
                index = moves.pop()[1].gather(1, index)
            slots.append(index)
        return torch.stack(slots[::-1], dim=2)


def _numbers(entries: list[float | None]) -> torch.Tensor:
    """Numbers of a JSON list, whose NaN are null there."""
    return torch.tensor([math.nan if entry is None else entry for entry in entries], dtype=torch.float64)


def load_result(directory: str | Path) -> Saved:
    """A saved run; SteerError where a file is missing, unreadable, or not the one that was written."""
    from safetensors.torch import load

    directory = Path(directory)
    try:
        facts = json.loads((directory / FACTS).read_bytes())
        blob = (directory / TENSORS).read_bytes()
    except OSError as error:
        raise SteerError(f"a run is a directory with {FACTS} and {TENSORS}; cannot read {error.filename}") from error
    except ValueError as error:
        raise SteerError(f"{directory / FACTS} is not JSON ({error}); restore it or run again") from error
    if facts.get("schema") != SCHEMA:
        raise SteerError(
            f"{directory / FACTS} must have schema {SCHEMA}, got {facts.get('schema')}; read it with the version of "
            f"steer that wrote it, {facts.get('versions', {}).get('steer', 'unknown')}"
        )
    wanted, got = facts["sha256"][TENSORS], hashlib.sha256(blob).hexdigest()
    if got != wanted:
        raise SteerError(
            f"{directory / TENSORS} is not the file that was saved: its SHA-256 must be {wanted[:12]}..., got "
            f"{got[:12]}...; restore it from a copy, or run again"
        )
    return Saved(load(blob), facts)
