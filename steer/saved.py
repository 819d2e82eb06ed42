"""`steer.load_run`: a saved run, read back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .core.method_choice import MethodChoice
from .core.snapshot import check_process, trajectory_from
from .core.temperature import TemperatureChoice
from .core.trajectory import LevelRecord
from .cost import Cost
from .errors import SteerError
from .files import from_archive
from .key import Key
from .results.result import MadeBy, Result
from .results.saving import KIND, POPULATION, REFERENCE, SCHEMA, TENSORS, check_record
from .types import ReverseProcess


@dataclass(frozen=True, eq=False)
class Saved:
    """A run read back.

    path:    the file.
    tensors: by name: x, reward, log_weight, log_evidence, log_evidence_variance, root; scores, ess and seen_levels;
             with lineage also ancestors, ancestor_levels and resampled; with a reference also reference_x and
             reference_reward; what else the trajectory and the trees hold.
    facts:   what result.json shows beside the numbers.
    """

    path: Path
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
        return Key(key["seed"], tuple(key["stream"]), key["problem"], key["slot"], key["step"])

    def result(self, process: ReverseProcess) -> Result:
        """The run again, as it was in memory: its lineage, its trees, and whether it was closed or interrupted.

        Args:
            process: the one that made it, opened again.

        Returns:
            The Result. States on the way are there where they were saved (`Result.save(..., states=True)`).

        Raises:
            SteerError: the process is not the one that made it, as far as both say; or the file contradicts itself.
        """
        check_process(self.facts["process"], process)
        with self._consistent():
            read = {name: tensor.to(process.device) for name, tensor in self.tensors.items()}
            seen = ()
            if "seen_levels" in read:
                levels = zip(self.tensors["seen_levels"].tolist(), read["ess"], read["scores"], strict=True)
                seen = tuple(LevelRecord(k, ess, score[:, ~score.isnan().all(0)]) for k, ess, score in levels)
            trajectory, choice = self.facts["trajectory"], self.facts.get("temperature_choice")
            chosen = self.facts.get("method_choice")
            return Result(
                process=process,
                key=self.key,
                cost=self.cost,
                temperature=math.inf if self.facts["temperature"] is None else self.facts["temperature"],
                temperature_choice=None if choice is None else TemperatureChoice(**choice),
                method_choice=None if chosen is None else MethodChoice(**chosen),
                interrupted=self.facts["interrupted"],
                seen=seen,
                trajectory=None if trajectory is None else trajectory_from(self.tensors, trajectory, process),
                tree=self._tree(process),
                law=self.facts["law"],
                made_by=MadeBy(**self.facts["made_by"]),
                **{name: read[name] for name in POPULATION},
            )

    def reference(self, process: ReverseProcess) -> Result | None:
        """The unsteered samples that were saved beside it."""
        if "reference_x" not in self.tensors:
            return None
        check_process(self.facts["process"], process)
        x, reward = (self.tensors[name].to(process.device) for name in REFERENCE)
        equal = torch.full_like(reward, -math.log(reward.shape[1]))
        root = torch.arange(reward.shape[1], device=reward.device).expand(reward.shape)
        return Result(
            process=process,
            x=x,
            reward=reward,
            log_weight=equal,
            log_evidence=torch.zeros_like(reward[:, 0]),
            root=root,
            key=self.key,
            cost=Cost(**self.facts["reference_cost"]),
        )

    def slots(self) -> Tensor:
        """The slots that each final particle's noise was drawn at: [B, N, 1 + steps], its start and step by step.

        With them a single candidate is made again alone: it starts at
        `key.fold("prior").shifted(problem=b, slot=s[0])`, and step k draws with
        `key.fold("step").shifted(problem=b, slot=s[1 + k]).at(k)`.
        That is so of runs from the prior by the model's own transitions; guided proposals, MCMC starts, moves and
        pinned paths make states of more than these draws. An interrupted run has the steps that it took: it ends with
        the predictions of the states there.
        """
        if "ancestors" not in self.tensors:
            raise SteerError("this run was saved without its lineage, so the slots of its noise are unknown")
        problems, particles = self.tensors["reward"].shape
        index = torch.arange(particles).expand(problems, particles)
        moves = list(zip(self.tensors["ancestor_levels"].tolist(), self.tensors["ancestors"].long(), strict=True))
        slots = []
        for k in reversed(range(-1, self.facts["trajectory"]["fields"]["k"])):
            # Newest first. Particles are rearranged at level k before step k draws, so later levels alone separate
            # today's particles from that draw, and all levels from the start, -1 here.
            while moves and moves[-1][0] > k:
                index = moves.pop()[1].gather(1, index)
            slots.append(index)
        return torch.stack(slots[::-1], dim=2)

    def _tree(self, process: ReverseProcess) -> Any:
        if self.facts["tree"] is None:
            return None
        own = {name.removeprefix("tree."): t for name, t in self.tensors.items() if name.startswith("tree.")}
        return import_module("steer.search.trees.snapshot").tree_from(own, self.facts["tree"], process.device)

    def _check(self) -> Saved:
        """Itself; SteerError where parts of it are missing, or are not of one population."""
        with self._consistent():
            _ = self.key, self.cost, self.facts["process"]["steps"], self.facts["run"]
            shape = self.tensors["reward"].shape
            for name in POPULATION:
                wanted, got = (shape[:1] if "evidence" in name else shape), self.tensors[name].shape
                if got[: len(wanted)] != wanted or (name != "x" and got != wanted):
                    raise ValueError(f"{name} has shape {tuple(got)}, where the rewards have {tuple(shape)}")
        return self

    @contextmanager
    def _consistent(self) -> Iterator[None]:
        """What a file cannot be read by, as an error that names it."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise SteerError(
                f"{self.path} contradicts itself ({type(error).__name__}: {error}): it was changed, and given a digest "
                "again; restore it from a copy, or run again"
            ) from error


def load_run(directory: str | Path) -> Saved:
    """A run that `Result.save` or `steer generate` wrote.

    Args:
        directory: where it was saved.

    Returns:
        Its tensors and facts; `.result(process)` makes it a `Result` again, which is reported, searched and grown on as
        the one in memory.

    Raises:
        SteerError: a file is missing, damaged (every bit is covered by a digest), or of another version.
    """
    directory = Path(directory)
    tensors, facts = from_archive(directory / TENSORS)
    if (facts.get("kind"), facts.get("schema")) != (KIND, SCHEMA):
        raise SteerError(
            f"{directory / TENSORS} must hold a {KIND} of schema {SCHEMA}, got a {facts.get('kind')} of schema "
            f"{facts.get('schema')}; read it with the version of steer that wrote it, "
            f"{(facts.get('versions') or {}).get('steer', 'unknown')}"
        )
    check_record(directory)
    return Saved(directory / TENSORS, tensors, facts)._check()
