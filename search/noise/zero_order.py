"""Zero-order search around the best noise found."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from steer.core.population import gather
from steer.core.run import Run
from steer.errors import SteerError
from steer.types import ReverseProcess

from .strategy import StrategyResult, concat, gaussian_prior, prior_of, sample_and_score

CURE = "use strategy=search.random_search() or search.paths()"


@dataclass(frozen=True)
class ZeroOrder:
    """A walk of pivots over starting noises. Built by `zero_order`."""

    neighbours: int
    radius: float
    chains: int = 1

    def least(self, process: ReverseProcess) -> int:
        """The first pivot's sample."""
        return process.steps

    def __call__(self, run: Run, particles: int, calls: int) -> StrategyResult:
        """Rounds of neighbours until the calls are spent; N pivots return."""
        gaussian_prior(run.process, CURE)
        rollouts = calls // run.process.steps
        pivot = run.begin(particles).x
        best = sample_and_score(run, pivot, particles)
        done, turn = 1, 0
        while done < rollouts and self.neighbours and not best.interrupted:
            count = min(self.neighbours, rollouts - done)
            fresh = run.process.prior(run.key.fold("neighbour", turn), run.problems, count * particles)
            mean = prior_of(run.process, fresh, CURE).mean
            away = torch.cat([pivot] * count, 1) - mean + self.radius * (fresh - mean)
            near = mean + away / math.sqrt(1.0 + self.radius**2)
            try:
                found = sample_and_score(run, near, particles)
            except KeyboardInterrupt:
                return best._replace(interrupted=True)
            if found.interrupted:
                return best._replace(interrupted=True)
            # Each chain's pivot and its neighbours, candidate by candidate; the first of equals stays.
            both, noise = concat(best, found), torch.cat([pivot, near], 1)
            winner = both.reward.view(run.problems, count + 1, particles).argmax(1) * particles + best.root
            best = StrategyResult(gather(both.x, winner), both.reward.gather(1, winner), best.root)
            pivot = gather(noise, winner)
            done, turn = done + count, turn + 1
        return best


def zero_order(neighbours: int = 2, radius: float = 0.5) -> ZeroOrder:
    """Moves to the best of a pivot and `neighbours` noises near it, round after round, as long as the budget lasts.

    radius: neighbours are (z + radius u) / sqrt(1 + radius^2), u ~ N(0, 1): the noise keeps its law. The paper leaves
            the distance open and has 2 neighbours.
    Where steps draw noise, pivot and neighbours share that of their chain, or nearness would mean nothing. The smallest
    move is one sample per chain. 0 neighbours is the plain sample.
    """
    if neighbours < 0 or not radius > 0.0:
        raise SteerError(f"zero_order takes neighbours >= 0 and radius > 0, got {neighbours} and {radius}")
    return ZeroOrder(neighbours, radius)
