"""Epsilon-greedy search over the noise of every step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from steer.core.loop import Loop, completed
from steer.core.run import Run
from steer.core.trajectory import Trajectory, required
from steer.errors import NotStochasticError, StateSpaceError, SteerError
from steer.processes.gaussian import need_gaussian
from steer.processes.second_order import Remembering, beginning, beside, noisy, normal_of
from steer.processes.transitions import Normal
from steer.types import ReverseProcess

from ..budget import split_evenly
from ..values import evaluate, x0_hat
from .strategy import StrategyResult, prior_of

CURE = "use search.svdd, or strategy=search.random_search()"
Source = Normal | Remembering
"""What a state is drawn from: mean + std noise, and what it is to remember."""


@dataclass(frozen=True)
class EpsilonGreedy:
    """Rounds of noises near a pivot, at every step. Built by `epsilon_greedy`."""

    candidates: int
    epsilon: float
    radius: float
    chains: int = 1

    def least(self, process: ReverseProcess) -> int:
        """One prediction per level."""
        return process.steps

    def __call__(self, run: Run, particles: int, calls: int) -> StrategyResult:
        """One noise after another: that of the prior, then that of every step."""
        process, amounts = run.process, self._predictions_per_level(run.process, calls)
        root = torch.arange(particles).expand(run.problems, -1)
        state = run.begin(particles)
        loop = Loop(run, state)
        first = noisy(process, state.x)
        shape, dtype, device = first.shape, first.dtype, first.device
        source = beginning(process, prior_of(process, first, CURE))  # what the states at level k are drawn from
        noise = run.key.fold("prior").normal(shape, dtype=dtype, device=device)
        with loop.keeping_partial(), torch.no_grad():
            with loop.steps():
                for k in range(process.steps):
                    for state in self._rounds(run, source, noise, k, amounts[k]):
                        loop.predicted(state)
                    source, before = _gaussian_step(process, state, k), state
                    noise = run.key.fold("step").at(k).normal(shape, dtype=dtype, device=device)
                    state = loop.stepped(before, Trajectory.begin(process, _state_from(source, noise), k=k + 1))
            last = loop.last_predicted
            assert last is not None
            clean, score = completed(last).x, required(last.cache.score)
            if loop.interrupted:
                return StrategyResult(clean, score, root.to(clean.device), interrupted=True)
            known = source.std == 0.0 and torch.equal(clean, state.x)  # it was scored as a prediction
            return StrategyResult(state.x, score if known else run.score(state.x), root.to(state.x.device))

    def _rounds(self, run: Run, source: Source, pivot: Tensor, k: int, amount: int) -> Iterator[Trajectory]:
        """The best states for level k after each round; `amount` predictions per chain in all, the pivot's first."""
        count, best, turn = pivot.shape[1], None, 0
        while amount > 0:
            tried = min(self.candidates, amount)
            fresh = tried - 1 if best is None else tried
            noise = self._draw_near(run, pivot, k, turn, fresh) if fresh else pivot[:, :0]
            noise = torch.cat([pivot, noise], 1) if best is None else noise
            x = _state_from(_repeated(source, tried), noise)
            x0, score = evaluate(run, x, k, x0_hat())
            assert x0 is not None
            found = Trajectory.begin(run.process, x, k=k).with_step_cache(x0=x0, score=score, noise=noise)
            if best is not None:  # the pivot competes
                found = _concat(best, found)
            score = required(found.cache.score)
            winner = score.view(len(score), -1, count).argmax(1) * count + torch.arange(count, device=score.device)
            best = found.select(winner)
            pivot, amount, turn = required(best.cache.noise), amount - tried, turn + 1
            yield best

    def _draw_near(self, run: Run, pivot: Tensor, k: int, turn: int, tried: int) -> Tensor:
        """Noises [B, tried N, *event]: with probability epsilon fresh, else a random distance away from the pivot."""
        key, count, event = run.key.fold("candidate", turn).at(k), pivot.shape[1], pivot.shape[2:]
        normal = key.normal((len(pivot), tried * count, *event), dtype=pivot.dtype, device=pivot.device)
        fresh, length = key.fold("mode").uniform((len(pivot), tried * count, 2), device=pivot.device).unbind(2)
        wide = (len(pivot), tried * count, *(1 for _ in event))
        norm = normal.flatten(2).norm(dim=2).clamp_min(torch.finfo(normal.dtype).tiny).view(wide)
        length = (self.radius * math.sqrt(math.prod(event)) * length).to(pivot.dtype).view(wide)
        moved = torch.cat([pivot] * tried, 1) + length * normal / norm
        return torch.where((fresh < self.epsilon).view(wide), normal, moved)

    def _predictions_per_level(self, process: ReverseProcess, calls: int) -> list[int]:
        """Predictions per chain at each level: one where nothing is drawn, the rest spread over the other levels."""
        need_gaussian(process, "epsilon_greedy, which moves Gaussian noise a little,", cure=CURE)
        drawn = [k == 0 or process.stochastic(k - 1) for k in range(process.steps)]
        if process.steps > 1 and not any(drawn[1:]):
            raise NotStochasticError(
                "epsilon_greedy searches the noise of the steps, and this process's transitions add none; use a "
                "stochastic rule, for instance process.with_rule(steer.ddim(eta=1.0)), or strategy=search.zero_order()"
            )
        amount = iter(split_evenly(calls - drawn.count(False), sum(drawn)))
        return [next(amount) if random else 1 for random in drawn]


def epsilon_greedy(candidates: int = 4, *, epsilon: float = 0.4, radius: float = 0.15) -> EpsilonGreedy:
    """At every step, rounds of noises near a pivot, which becomes the best of them by r(x0_hat).

        for each step:    z = a fresh noise, the pivot
                          for each round:    `candidates` noises, each fresh with probability epsilon,
                                             else at most radius sqrt(d) away from z, in d dimensions
                                             z = the best, by the reward of the prediction it leads to
                          step with z

    The budget decides the number of rounds: budget = 80 K on one chain has the paper's 20 rounds of 4.

    Args:
        candidates: noises per round, at least 1; the pivot is one of the first round's.
        epsilon: probability of a fresh noise, in [0, 1].
        radius: > 0, largest distance from the pivot, in units of sqrt(d) standard deviations.

    Returns:
        A strategy for `noise_search(strategy=)`. It needs Gaussian steps that draw noise (any rule except `ExactStep`).

    Raises:
        SteerError: where an argument is out of its range.

    Cost: K (rounds candidates) network rows and rewards per chain, K = process.steps; the smallest move is one
        prediction per chain.
    Source: Ramesh & Mardani 2025 (2506.03164).
    Differs: the starting noise is searched too, the pivot is evaluated and competes, and the prediction of the noise
        chosen serves its own step, where the paper's count is K (rounds candidates + 1).
    """
    if candidates < 1 or not 0.0 <= epsilon <= 1.0 or not radius > 0.0:
        raise SteerError(
            f"epsilon_greedy takes candidates >= 1, epsilon in [0, 1] and radius > 0, got candidates={candidates}, "
            f"epsilon={epsilon}, radius={radius}"
        )
    return EpsilonGreedy(candidates, epsilon, radius)


def _gaussian_step(process: ReverseProcess, state: Trajectory, k: int) -> Source:
    """The step from level k; StateSpaceError where it is not drawn as mean + std noise."""
    step = process.transition(state.x, required(state.cache.x0), k)
    if normal_of(step) is None:
        raise StateSpaceError(
            f"epsilon_greedy needs steps drawn as mean + std noise, got {type(step).__name__}; use search.svdd"
        )
    return cast(Source, step)


def _repeated(source: Source, times: int) -> Source:
    """The step of every chain, candidate by candidate."""
    if isinstance(source, Remembering):
        law = _repeated(cast(Normal, source.law), times)
        return Remembering(law, torch.cat([source.memory] * times, 1))
    return replace(source, mean=torch.cat([source.mean] * times, 1))


def _state_from(source: Source, noise: Tensor) -> Tensor:
    """The state of mean + std noise, as `Normal.sample` computes it."""
    mean, std = source.mean, source.std
    return beside(source, mean if std == 0.0 else torch.add(mean, noise, alpha=std))


def _concat(first: Trajectory, second: Trajectory) -> Trajectory:
    """The particles of both, side by side."""
    cache = first.cache.map(lambda a, b: torch.cat([a, b], 1), second.cache)
    return replace(Trajectory.begin(first.process, torch.cat([first.x, second.x], 1), k=first.k), cache=cache)
