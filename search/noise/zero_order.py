"""Zero-order search around the best noise found."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from steer.core.trajectory import gather
from steer.errors import StateSpaceError, SteerError
from steer.types import OnStep, ReverseProcess

from ..run import Run
from .strategy import Found, follow, joined, starting_law


@dataclass(frozen=True)
class ZeroOrder:
    """A walk of pivots over starting noises. Built by `zero_order`."""

    neighbours: int
    radius: float
    chains: int = 1

    def least(self, process: ReverseProcess) -> int:
        """The first pivot's sample."""
        return process.steps

    def __call__(self, run: Run, particles: int, calls: int, on_step: OnStep | None) -> Found:
        """Rounds of neighbours until the calls are spent; N pivots return."""
        if not hasattr(run.process, "prior_moments"):
            raise StateSpaceError(
                "zero_order moves a Gaussian starting noise a little, which the states of "
                f"{type(run.process).__name__} do not begin from; use strategy=search.random_search() or search.paths()"
            )
        rollouts = calls // run.process.steps
        pivot = run.begin(particles).x
        best = follow(run, pivot, particles, on_step)
        done, turn = 1, 0
        while done < rollouts and self.neighbours and not best.interrupted:
            count = min(self.neighbours, rollouts - done)
            fresh = run.process.prior(run.key.fold("neighbour", turn), run.batch, count * particles)
            mean = starting_law(run.process, fresh).mean
            away = torch.cat([pivot] * count, 1) - mean + self.radius * (fresh - mean)
            near = mean + away / math.sqrt(1.0 + self.radius**2)
            try:
                found = follow(run, near, particles, on_step)
            except KeyboardInterrupt:
                return best._replace(interrupted=True)
            if found.interrupted:
                return best._replace(interrupted=True)
            # Each chain's pivot and its neighbours, candidate by candidate; the first of equals stays.
            both, noise = joined(best, found), torch.cat([pivot, near], 1)
            winner = both.reward.view(run.batch, count + 1, particles).argmax(1) * particles + best.root
            best = Found(gather(both.x, winner), both.reward.gather(1, winner), best.root)
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
