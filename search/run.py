"""A run in progress: what every search opens with and closes with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steer.core import log_weights
from steer.core.objective import Objective, check_finite, check_temperature, conditioned, open_run
from steer.core.trajectory import Seen, Trajectory
from steer.cost import Meter, check_counts
from steer.key import Key, as_key
from steer.results.result import Result
from steer.types import ReverseProcess, Reward

from .values import Value


@dataclass(frozen=True, eq=False)
class Run:
    """A search in progress: what every one of them opens with and closes with. chunk: states evaluated at once."""

    process: ReverseProcess
    objective: Objective
    meter: Meter
    batch: int
    temperature: float
    key: Key
    chunk: int = 256

    @classmethod
    def open(
        cls, process: ReverseProcess, reward: Reward, batch: int, temperature: float, key: Key | int, chunk: int = 256
    ) -> Run:
        """A run with its own ledger."""
        temperature, key = check_temperature(temperature), as_key(key)
        check_counts(chunk=chunk)
        process, objective, meter = open_run(process, reward, key=key)
        return cls(process, objective, meter, conditioned(process, batch), temperature, key, chunk)

    def only(self, problem: int) -> Run:
        """The run of one problem of a conditioned process, for searches whose problems move at their own pace."""
        process = self.process.only(problem)
        return replace(self, process=process, objective=replace(self.objective, process=process))

    def begin(self, count: int) -> Trajectory:
        """`count` draws of the prior per problem."""
        return Trajectory.begin(self.process, self.process.prior(self.key.fold("prior"), self.batch, count))

    def predict(self, x: Tensor, k: int) -> Tensor:
        """Predictions of states (B, n, *event) at level k, in chunks."""
        return torch.cat([self.process.denoise(part, k) for part in self._parts(x)], 1)

    def _parts(self, x: Tensor) -> Iterator[Tensor]:
        """Chunks of states (B, n, *event); what hooks draw for each is named by its slots."""
        for first in range(0, x.shape[1], self.chunk):
            self.meter.key = self.key.shifted(slot=first)
            yield x[:, first : first + self.chunk]

    def score(self, clean: Tensor, where: str = "of the finished samples") -> Tensor:
        """Rewards (B, n) of clean states, in chunks, checked."""
        scores = torch.cat([self.objective(part) for part in clean.split(self.chunk, 1)], 1)
        check_finite(scores, where)
        return scores

    def evaluate(self, x: Tensor, k: int, value: Value) -> tuple[Tensor | None, Tensor]:
        """Predictions, where the value reads them, and values (B, n) of states at level k: one call per state."""
        predictions, values = [], []
        for part in self._parts(x):
            x0 = self.process.denoise(part, k) if value.predicts else None
            predictions += [] if x0 is None else [x0]
            values.append(value(self.objective, part, k, x0))
        scores = torch.cat(values, 1)
        check_finite(scores, f"at level {k} of {self.process.steps}")
        return torch.cat(predictions, 1) if predictions else None, scores

    def step(self, state: Trajectory) -> Trajectory:
        """One level on, by the model's own transition from the prediction that the state carries."""
        model = self.process.transition(state.x, state.carried["x0"], state.k)
        return state.step(model, self.key.fold("step"))

    def result(
        self,
        x: Tensor,
        reward: Tensor,
        root: Tensor,
        *,
        keep: int | None = None,
        seen: Sequence[Seen] = (),
        interrupted: bool = False,
    ) -> Result:
        """The Result of samples (B, n, *event): the `keep` best share the weight; None: all of them."""
        log_weight = (
            log_weights.normalise(torch.zeros_like(reward)) if keep is None else log_weights.of_best(reward, keep)
        )
        none = torch.full_like(reward[:, 0], torch.nan)
        seen = (*seen, Seen(self.process.steps, log_weights.ess(log_weight), reward))
        return Result(
            process=self.process, x=x, reward=reward, log_weight=log_weight, log_evidence=none, root=root,
            key=self.key, cost=self.meter.cost(), temperature=self.temperature, seen=seen, interrupted=interrupted,
        )  # fmt: skip
