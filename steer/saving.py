"""A run on disk: result.safetensors and result.json, written atomically, verified on the way back."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .core.trajectory import Ancestors
from .cost import Cost
from .errors import SteerError
from .key import Key
from .version import __version__

if TYPE_CHECKING:
    from .result import Result
    from .types import ReverseProcess

SCHEMA = 1
TENSORS, FACTS = "result.safetensors", "result.json"
_REFERENCE = ("reference_x", "reference_reward")


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
        from .core.trajectory import Seen, Trajectory
        from .result import Result

        self._check(process)
        where = getattr(process, "device", "cpu")
        read = {name: tensor.to(where) for name, tensor in self.tensors.items()}
        seen = ()
        if "seen_levels" in read:
            levels = zip(self.tensors["seen_levels"].tolist(), read["ess"], read["scores"], strict=True)
            seen = tuple(Seen(k, ess, score[:, ~score.isnan().all(0)]) for k, ess, score in levels)
        trajectory = None
        if "ancestors" in read:
            moves = zip(self.tensors["ancestor_levels"].tolist(), read["ancestors"], read["resampled"], strict=True)
            past = tuple(Ancestors(k, index[:, index[0] >= 0].long(), done.bool()) for k, index, done in moves)
            trajectory = Trajectory.begin(process, read["x"], k=process.steps)._with(
                past=past,
                diagnostics={
                    name: torch.tensor([math.nan if entry is None else entry for entry in found], dtype=torch.float64)
                    for name, found in self.facts.get("diagnostics", {}).items()
                },
            )
        return Result(
            process=process, key=self.key, cost=self.cost,
            temperature=math.inf if self.facts["temperature"] is None else self.facts["temperature"],
            interrupted=self.facts["interrupted"], seen=seen, trajectory=trajectory,
            **{name: read[name] for name in ("x", "reward", "log_weight", "log_evidence", "root")},
        )  # fmt: skip

    def reference(self, process: ReverseProcess) -> Result | None:
        """The unsteered samples that were saved beside it."""
        from .result import Result

        if "reference_x" not in self.tensors:
            return None
        self._check(process)
        x, reward = (self.tensors[name].to(getattr(process, "device", "cpu")) for name in _REFERENCE)
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
        """The slot each final particle's noise was drawn at, step by step: (B, N, steps).

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


def save_result(
    result: Result,
    directory: Path,
    *,
    reference: Result | None = None,
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


def write_atomically(path: Path, blob: bytes) -> Path:
    """The path, now holding the bytes: a reader or a crash finds the old file or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(draft, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself survives a power cut only once the directory is on disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path


def to_json(value: Any) -> bytes:
    """Readable, strict JSON: NaN and infinities, which JSON lacks, become null."""
    return (json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def plain(value: Any) -> Any:
    """The value in JSON's own types: tensors as lists, what is no number as null, anything else by its repr."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(entry) for entry in value]
    return repr(value)


def versions() -> dict[str, str | None]:
    """Versions that a run depends on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "steer": __version__}
    for name in ("torch", "diffusers", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _tensors(result: Result, reference: Result | None) -> dict[str, Tensor]:
    tensors = {name: getattr(result, name) for name in ("x", "reward", "log_weight", "log_evidence", "root")}
    if result.seen:
        tensors["seen_levels"] = torch.tensor([seen.k for seen in result.seen])
        tensors["ess"] = torch.stack([seen.ess for seen in result.seen])
        tensors["scores"] = _stacked([seen.score for seen in result.seen], math.nan)
    if result.trajectory is not None:
        moves = [event for event in result.trajectory.past if isinstance(event, Ancestors)]
        tensors["ancestor_levels"] = torch.tensor([k for k, _, _ in moves], dtype=torch.int64)
        tensors["resampled"] = _stacked([happened for _, _, happened in moves], 0)
        tensors["ancestors"] = _stacked([index.int() for _, index, _ in moves], -1)
    if reference is not None:
        tensors |= {"reference_x": reference.x, "reference_reward": reference.reward}
    return tensors


def _stacked(levels: list[Tensor], blank: float) -> Tensor:
    """Levels (..., M) as one tensor (L, ..., M); where a method changed the number of particles, padded at the end."""
    if not levels:
        return torch.empty(0)
    width = max(level.shape[-1] for level in levels)
    return torch.stack([pad(level, (0, width - level.shape[-1]), value=blank) for level in levels])


def _facts(result: Result) -> dict[str, Any]:
    process, shares = result.process, result.log_weight.exp().tolist()
    scores, slots = result.reward.tolist(), result.root.tolist()
    problems, particles = result.reward.shape
    return {
        "schema": SCHEMA,
        "interrupted": result.interrupted,
        "temperature": result.temperature,
        "log_evidence": result.log_evidence,
        "log_evidence_variance": result.log_evidence_variance,
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
