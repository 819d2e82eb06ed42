"""The start by selection: the best of many prior draws."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..core.loop import keeping
from ..core.objective import Objective
from ..core.population import gather, log_potential
from ..core.start import Start
from ..core.trajectory import Trajectory
from ..errors import SteerError
from ..key import Key
from ..types import ReverseProcess
from .tilted_prior import Predictor, given, predicting


@dataclass(frozen=True)
class TopK:
    """A start from the best of many prior draws. Built by `top_k_of_n`."""

    candidates: int
    temperature: float | None = None
    x0_predictor: Predictor | None = None
    predictor_rows: int = 1

    def prepare(self, process: ReverseProcess, temperature: float) -> tuple[Start, int]:
        """The start at its own or else the run's temperature, and the network rows per problem it spends."""
        own = temperature if self.temperature is None else self.temperature
        rows = process.rows if self.x0_predictor is None else self.predictor_rows
        return replace(self, temperature=own), self.candidates * rows

    def check(self, process: ReverseProcess, objective: Objective, particles: int) -> None:
        """Raises where there are more particles than candidates."""
        del process, objective
        if particles > self.candidates:
            raise SteerError(f"top_k_of_n keeps N = {particles} of its {self.candidates} candidates; draw more")

    def __call__(
        self, process: ReverseProcess, objective: Objective, key: Key, batch: int, particles: int
    ) -> Trajectory:
        """Draws, scores, and keeps the best."""
        self.check(process, objective, particles)
        objective = predicting(process, objective, self.x0_predictor, self.predictor_rows)
        x = process.prior(key.fold("prior"), batch, self.candidates)
        with keeping(Trajectory.begin(process, x)), torch.no_grad():
            scores = objective(process.complete(x, objective.process.denoise(x, 0, key)), "of the start's candidates")
        best, index = scores.topk(particles, dim=1)
        value = log_potential(best, given(self.temperature))
        state = Trajectory.begin(process, gather(x, index))
        return replace(
            state.with_path_state(log_potential=value.masked_fill(value == -torch.inf, 0.0)),
            log_evidence=torch.full_like(state.log_evidence, torch.nan),
            biased_start=True,
        )


def top_k_of_n(
    candidates: int,
    *,
    temperature: float | None = None,
    x0_predictor: Predictor | None = None,
    predictor_rows: int = 1,
) -> TopK:
    """A start from the N best of `candidates` prior draws, by r(x0_predictor(x)): greedy, for comparisons.

    No weight corrects for the choice, so the samples follow no known distribution.

    Args:
        candidates: prior draws per problem, at least N.
        temperature: of the tilt exp(r / temperature) that the choice is taken for, so that the reward is not counted
            again; None takes the run's.
        x0_predictor: what the reward judges x by, from states [B, n, *event] to clean states; the model's own E[x_0 |
            x] if None.
        predictor_rows: network rows that x0_predictor costs per state, for the cost.

    Returns:
        A start for `steer.smc(start=...)` and every other sampler; the run's log_evidence is NaN.

    Raises:
        SteerError: where `candidates` is below 1, or the run below has more particles than candidates.

    Cost: per problem `candidates` network rows and rewards, no gradients.
    Source: the baseline of Yoon et al. 2025, Table 1.
    """
    if candidates < 1:
        raise SteerError(f"candidates must be at least 1, got {candidates}")
    return TopK(
        candidates=candidates, temperature=temperature, x0_predictor=x0_predictor, predictor_rows=predictor_rows
    )
