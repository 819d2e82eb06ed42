"""Search over the noise that a sampler begins from and draws on its way."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from steer.core.trajectory import Trajectory, gather
from steer.cost import affordable, check_counts
from steer.errors import StateSpaceError, SteerError
from steer.key import Key
from steer.processes.transitions import Normal
from steer.results.result import Result
from steer.types import OnStep, ReverseProcess, Reward, Stop

from .run import Run


class Found(NamedTuple):
    """What a strategy ends with: samples (B, n, *event), rewards (B, n), slots of their starting noise (B, n)."""

    x: Tensor
    reward: Tensor
    root: Tensor
    interrupted: bool = False


class Strategy(Protocol):
    """How noises are tried. Built by `random_search`, `zero_order`, `paths`, `epsilon_greedy`."""

    @property
    def chains(self) -> int:
        """Chains per problem where the caller says nothing."""
        ...

    def least(self, process: ReverseProcess) -> int:
        """Predictions that one chain needs at least."""
        ...

    def __call__(self, run: Run, particles: int, calls: int, on_step: OnStep | None) -> Found:
        """Searches with `calls` predictions per chain, on `particles` chains per problem."""
        ...


def noise_search(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    strategy: Strategy | None = None,
    keep: int = 1,
    chunk: int = 256,
    on_step: OnStep | None = None,
) -> Result:
    """The best samples of N searches over noise.

    particles: N searches per problem, independent but for `paths`, which compete; 1 by default, 2 for `paths`.
    budget:    network rows per problem, never exceeded, used but for less than the strategy's smallest move per chain;
               by default what 16 samples per chain cost.
    strategy:  `zero_order()` by default; `random_search()`, `paths()`, `epsilon_greedy()`.
    keep:      how many of the samples returned share the weight. temperature changes nothing.
    chunk:     states evaluated at once. on_step: called after every step; `Stop` or an interrupt returns the best
               samples so far, or predictions where there are none.

    random_search, zero_order and paths run on deterministic processes by design, epsilon_greedy searches the noise of
    the steps and needs it.
    Returns x (B, n, *event), reward, log_weight (B, n); log_evidence NaN.
    Raises BudgetError, StateSpaceError (zero_order, epsilon_greedy on states without Gaussian noise),
    NotStochasticError, NonFiniteError, RewardError.
    Source: Ma et al. 2025 (2501.09732); Ramesh & Mardani 2025 (2506.03164) for epsilon_greedy.
    """
    check_counts(keep=keep)
    strategy, run = strategy or zero_order(), Run.open(process, reward, batch, temperature, key, chunk)
    least, rows, chains = strategy.least(run.process), run.process.rows, particles or strategy.chains
    budget = 16 * run.process.steps * rows * chains if budget is None else budget
    most = affordable(least * rows, particles=particles, budget=budget)
    chains = min(chains, most) if particles is None else particles
    found = strategy(run, chains, budget // rows // chains, on_step)
    return run.result(found.x, found.reward, found.root, keep=keep, interrupted=found.interrupted)


@dataclass(frozen=True)
class RandomSearch:
    """Independent noises. Built by `random_search`."""

    chains: int = 1

    def least(self, process: ReverseProcess) -> int:
        """One sample."""
        return process.steps

    def __call__(self, run: Run, particles: int, calls: int, on_step: OnStep | None) -> Found:
        """As many samples as are paid for, all returned."""
        count = particles * (calls // run.process.steps)
        parts: list[Found] = []
        for first in range(0, count, run.chunk):
            here = replace(run, key=run.key.shifted(slot=first))
            try:
                found = follow(here, here.begin(min(run.chunk, count - first)).x, None, on_step)
            except KeyboardInterrupt:
                if not parts:
                    raise
                parts[-1] = parts[-1]._replace(interrupted=True)
                break
            parts.append(found._replace(root=found.root + first))
            if found.interrupted:
                break
        return joined(*parts)


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


def random_search() -> RandomSearch:
    """Independent noises: best-of-N by another name, all samples returned. The smallest move is one sample."""
    return RandomSearch()


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


def starting_law(process: ReverseProcess, like: Tensor) -> Normal:
    """The prior N(mean, std^2) of a process on a Gaussian path, for states shaped like these."""
    mean, std = process.prior_moments  # type: ignore[attr-defined]
    return Normal(torch.zeros_like(like) + (0.0 if mean is None else mean), std)


def joined(*parts: Found) -> Found:
    """The samples of all parts, side by side."""
    x, reward, root = (torch.cat(tensors, 1) for tensors in zip(*(part[:3] for part in parts), strict=True))
    return Found(x, reward, root, parts[-1].interrupted)


def follow(run: Run, x: Tensor, chains: int | None, on_step: OnStep | None) -> Found:
    """Samples from starting states x (B, M N, *event), scored; stopped early, scored predictions.

    chains: N where the M candidates of a chain share its noise, None where nobody does.
    """
    state, interrupted = carried_on(
        run, Trajectory.begin(run.process, x), run.process.steps, run.key.fold("step"), on_step, chains
    )
    root = torch.arange(x.shape[1], device=x.device) % (chains or x.shape[1])
    try:
        with torch.no_grad():
            return Found(state.x, run.score(state.x), root.expand(x.shape[:2]), interrupted)
    except SteerError as error:
        error.keep(state)
        raise


def carried_on(
    run: Run, state: Trajectory, until: int, key: Key, on_step: OnStep | None, chains: int | None = None
) -> tuple[Trajectory, bool]:
    """A population at level `until`, or, where it was stopped on the way, its last predictions and True.

    It remembers the predictions of the level before as "clean".
    """
    process, clean, size = run.process, None, chains or state.x.shape[1]
    try:
        with torch.no_grad():
            for k in range(state.k, until):
                x0 = state.carried["x0"] if "x0" in state.carried else run.predict(state.x, k)
                clean = process.complete(state.x, x0)
                parts = zip(state.x.split(size, 1), x0.split(size, 1), strict=True)
                x = torch.cat([process.transition(part, ahead, k).sample(key.at(k)) for part, ahead in parts], 1)
                state = replace(state, x=x, k=k + 1, carried={}, memory={"clean": clean})
                if on_step is not None:
                    on_step(state)
    except (Stop, KeyboardInterrupt):
        if clean is None:
            raise
        return replace(state, x=clean), True
    return state, False
