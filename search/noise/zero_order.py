"""Zero-order search around the best noise found."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from steer.core.loop import keeping
from steer.core.population import gather
from steer.core.run import Run
from steer.errors import SteerError
from steer.processes.second_order import begun, noisy
from steer.types import ReverseProcess

from .strategy import StrategyResult, concat, gaussian_prior, prior_of, sample_and_score

CURE = "use strategy=search.random_search() or search.paths()"


@dataclass(frozen=True)
class ZeroOrder:
    """A pivot that moves over starting noises. Built by `zero_order`."""

    neighbours: int
    radius: float
    chains: int = 1

    def least(self, process: ReverseProcess) -> int:
        """The first pivot's sample."""
        return process.steps

    def __call__(self, run: Run, particles: int, calls: int) -> StrategyResult:
        """Rounds of neighbours until the calls are spent; the N pivots' samples are returned."""
        gaussian_prior(run.process, CURE)
        rollouts = calls // run.process.steps
        pivot = noisy(run.process, run.begin(particles).x)
        best = sample_and_score(run, begun(run.process, pivot), particles)
        done, turn = 1, 0
        while done < rollouts and self.neighbours and not best.interrupted:
            count = min(self.neighbours, rollouts - done)
            fresh = noisy(
                run.process, run.process.prior(run.key.fold("neighbour", turn), run.problems, count * particles)
            )
            mean = prior_of(run.process, fresh, CURE).mean
            moved = torch.cat([pivot] * count, 1) - mean + self.radius * (fresh - mean)
            near = mean + moved / math.sqrt(1.0 + self.radius**2)
            try:
                with keeping(best):
                    found = sample_and_score(run, begun(run.process, near), particles)
            except KeyboardInterrupt:
                return best._replace(interrupted=True)
            if found.interrupted:
                return best._replace(interrupted=True)
            # Each chain's pivot comes first, then its neighbours, candidate by candidate; of equals the first wins.
            both, noise = concat(best, found), torch.cat([pivot, near], 1)
            winner = both.reward.view(run.problems, count + 1, particles).argmax(1) * particles + best.root
            best = StrategyResult(gather(both.x, winner), both.reward.gather(1, winner), best.root)
            pivot = gather(noise, winner)
            done, turn = done + count, turn + 1
        return best


def zero_order(neighbours: int = 2, radius: float = 0.5) -> ZeroOrder:
    """Local search: moves to the best of a pivot and `neighbours` noises near it, round after round.

        z = starting noise
        while the budget lasts:    z^i = (z + radius u^i) / sqrt(1 + radius^2),  u^i ~ N(0, 1),  i = 1..neighbours
                                   z = whichever of z, z^1, z^2, ... has the sample of the highest reward

    Args:
        neighbours: noises tried per round, at least 0; 0 is the plain sample.
        radius: > 0, distance of the neighbours, in standard deviations of the noise. Neighbours are distributed as the
            starting noise is.

    Returns:
        A strategy for `noise_search(strategy=)`. Where steps draw noise, the pivot and its neighbours share that of
        their chain, or nearness would mean nothing.

    Raises:
        SteerError: where an argument is out of its range.

    Cost: K network rows (K = process.steps) and one reward per noise tried; the smallest move is one sample per chain.
    Source: Ma et al. 2025 (2501.09732), zero-order search, with 2 neighbours.
    Differs: the distance, which the paper leaves open.
    """
    if neighbours < 0 or not radius > 0.0:
        raise SteerError(
            f"zero_order takes neighbours >= 0 and radius > 0, got neighbours={neighbours}, radius={radius}"
        )
    return ZeroOrder(neighbours, radius)
