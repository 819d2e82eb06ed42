"""One call of a method: the metered process, its objective, the key, and what every method opens with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..cost import Meter, check_counts
from ..key import Key, as_key
from ..types import ReverseProcess
from .event import Event, OnStep, as_one
from .objective import FINISHED, Objective, check_temperature, from_column, num_problems, open_objective
from .trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class Run:
    """A method's run in progress.

    name:      of the method (and of its pass), for events.
    process:   metered: what is evaluated on it is in the ledger.
    objective: the reward on it.
    problems:  B, independent problems or prompts.
    key:       names all noise of the run.
    chunk:     states evaluated at once, where a method evaluates in chunks.
    """

    name: str
    process: ReverseProcess
    objective: Objective
    meter: Meter
    problems: int
    temperature: float
    key: Key
    on_step: Callable[[Event], None] | None = None
    chunk: int = 256
    first_problem: int = 0

    @classmethod
    def open(
        cls,
        name: str,
        process: ReverseProcess,
        reward: Callable[..., Any],
        *,
        batch: int,
        temperature: float,
        key: Key | int,
        seed: int | None = None,
        on_step: OnStep | None = None,
        groupwise: bool = False,
        chunk: int = 256,
    ) -> Run:
        """A run with its own ledger; its arguments are checked here, as every method's are.

        groupwise: whether the method only ranks or reports finished samples, and so can do with a reward whose scores
        depend on the other samples in the call.
        """
        temperature, key = check_temperature(temperature), as_key(key, seed)
        check_counts(chunk=chunk)
        process, objective, meter = open_objective(process, reward, groupwise=groupwise)
        problems = num_problems(process, batch)
        return cls(name, process, objective, meter, problems, temperature, key, as_one(on_step), chunk)

    def only(self, problem: int) -> Run:
        """The run of one problem of a conditioned process, for searches whose problems move at their own pace."""
        process = self.process.only(problem)
        return replace(self, process=process, objective=replace(self.objective, process=process), first_problem=problem)

    def begin(self, count: int) -> Trajectory:
        """`count` draws of the prior per problem."""
        return Trajectory.begin(self.process, self.process.prior(self.key.fold("prior"), self.problems, count))

    def predicted(self, state: Trajectory) -> Trajectory:
        """A state carrying its prediction."""
        return state.with_step_cache(x0=self.predict(state.x, state.k))

    def predict(self, x: Tensor, k: int) -> Tensor:
        """Predictions of states [B, n, *event] at level k, in chunks."""
        return torch.cat([self.process.denoise(part, k, key) for part, key in self.parts(x)], 1)

    def parts(self, x: Tensor) -> Iterator[tuple[Tensor, Key]]:
        """Chunks of states [B, n, *event], each with the key at its slots, by which hooks name their draws."""
        for first in range(0, x.shape[1], self.chunk):
            yield x[:, first : first + self.chunk], self.key.shifted(slot=first)

    def score(self, clean: Tensor, where: str = FINISHED) -> Tensor:
        """Rewards [B, n] of clean states, in chunks, checked; without a gradient, which some rewards refuse."""
        parts = enumerate(clean.split(self.chunk, 1))
        with torch.no_grad():
            return torch.cat([self.objective.of(from_column(i * self.chunk))(part, where) for i, part in parts], 1)

    def report(self, before: Trajectory, after: Trajectory, chunk: int = 0) -> None:
        """Calls `on_step` with a step that was taken from `before`, which carries what was predicted there."""
        if self.on_step is None:
            return
        problems = range(self.first_problem, self.first_problem + len(after.x))
        cache = before.cache
        self.on_step(Event(self.name, after, cache.x0, cache.score, problems, chunk, self.meter))
