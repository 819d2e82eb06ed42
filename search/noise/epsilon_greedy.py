"""Epsilon-greedy search over the noise of every step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steer.core.loop import Loop, completed
from steer.core.run import Run
from steer.core.trajectory import Trajectory, required
from steer.errors import NotStochasticError, StateSpaceError, SteerError
from steer.processes.gaussian import need_gaussian
from steer.processes.transitions import Normal
from steer.types import ReverseProcess

from ..budget import split_evenly
from ..values import evaluate, x0_hat
from .strategy import StrategyResult, prior_of

CURE = "use search.svdd, or strategy=search.random_search()"


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
        process, loop = run.process, Loop(run)
        root = torch.arange(particles).expand(run.problems, -1)
        amounts = self._amounts(process, calls)
        state = run.begin(particles)
        law = prior_of(process, state.x, CURE)
        noise = run.key.fold("prior").normal(law.mean.shape, dtype=law.mean.dtype, device=law.mean.device)
        with loop.keeping_partial(), torch.no_grad():
            with loop.steps():
                for k in range(process.steps):
                    for state in self._rounds(run, law, noise, k, amounts[k]):
                        loop.predicted(state)
                    law, before = _normal(process, state, k), state
                    shape, dtype, device = state.x.shape, state.x.dtype, state.x.device
                    noise = run.key.fold("step").at(k).normal(shape, dtype=dtype, device=device)
                    state = loop.stepped(before, Trajectory.begin(process, _at(law, noise), k=k + 1))
            last = loop.last_predicted
            assert last is not None
            clean, score = completed(last).x, required(last.cache.score)
            if loop.interrupted:
                return StrategyResult(clean, score, root.to(clean.device), interrupted=True)
            known = law.std == 0.0 and torch.equal(clean, state.x)
            return StrategyResult(state.x, score if known else run.score(state.x), root.to(state.x.device))

    def _rounds(self, run: Run, law: Normal, pivot: Tensor, k: int, amount: int) -> Iterator[Trajectory]:
        """The best state for level k after each round, `amount` predictions per chain in all; begins with the pivot."""
        count, best, turn = pivot.shape[1], None, 0
        while amount > 0:
            tried = min(self.candidates, amount)
            fresh = tried - 1 if best is None else tried
            noise = self._near(run, pivot, k, turn, fresh) if fresh else pivot[:, :0]
            noise = torch.cat([pivot, noise], 1) if best is None else noise
            x = _at(replace(law, mean=torch.cat([law.mean] * tried, 1)), noise)
            x0, score = evaluate(run, x, k, x0_hat())
            assert x0 is not None
            found = Trajectory.begin(run.process, x, k=k).with_step_cache(x0=x0, score=score, noise=noise)
            if best is not None:  # the pivot competes
                found = _side_by_side(best, found)
            score = required(found.cache.score)
            winner = score.view(len(score), -1, count).argmax(1) * count + torch.arange(count, device=score.device)
            best = found.select(winner)
            pivot, amount, turn = required(best.cache.noise), amount - tried, turn + 1
            yield best

    def _near(self, run: Run, pivot: Tensor, k: int, turn: int, tried: int) -> Tensor:
        """Noises (B, tried N, *event): with probability epsilon fresh, else a step away from the pivot."""
        key, count, event = run.key.fold("candidate", turn).at(k), pivot.shape[1], pivot.shape[2:]
        normal = key.normal((len(pivot), tried * count, *event), dtype=pivot.dtype, device=pivot.device)
        fresh, length = key.fold("mode").uniform((len(pivot), tried * count, 2), device=pivot.device).unbind(2)
        wide = (len(pivot), tried * count, *(1 for _ in event))
        norm = normal.flatten(2).norm(dim=2).clamp_min(torch.finfo(normal.dtype).tiny).view(wide)
        length = (self.radius * math.sqrt(math.prod(event)) * length).to(pivot.dtype).view(wide)
        moved = torch.cat([pivot] * tried, 1) + length * normal / norm
        return torch.where((fresh < self.epsilon).view(wide), normal, moved)

    def _amounts(self, process: ReverseProcess, calls: int) -> list[int]:
        """Predictions per level: one where nothing is drawn, what is left spread over the others."""
        need_gaussian(process, "epsilon_greedy, which moves Gaussian noise a little,", cure=CURE)
        free = [k == 0 or process.stochastic(k - 1) for k in range(process.steps)]
        if process.steps > 1 and not any(free[1:]):
            raise NotStochasticError(
                "epsilon_greedy searches the noise of the steps, and this process's transitions add none; use a "
                "stochastic rule, for instance process.with_rule(steer.ddim(eta=1.0)), or strategy=search.zero_order()"
            )
        amount = iter(split_evenly(calls - free.count(False), sum(free)))
        return [next(amount) if draws else 1 for draws in free]


def epsilon_greedy(candidates: int = 4, *, epsilon: float = 0.4, radius: float = 0.15) -> EpsilonGreedy:
    """At every step, rounds of `candidates` noises: each fresh with probability epsilon, else at most radius sqrt(d)
    from the pivot, which becomes the best by r(x0_hat). The budget decides the number of rounds.

    With budget = 80 K on one chain it has the paper's 20 rounds of 4. The smallest move is one prediction per chain.
    Needs Gaussian steps that draw noise (any rule but `ExactStep`).
    Source: Ramesh & Mardani 2025 (2506.03164). Differs: the starting noise is searched too, the pivot is evaluated and
    competes, and the prediction of the chosen noise serves its own step, so K (rounds candidates) rows, where the
    paper's count is K (rounds candidates + 1).
    """
    if candidates < 1 or not 0.0 <= epsilon <= 1.0 or not radius > 0.0:
        raise SteerError(
            f"epsilon_greedy takes candidates >= 1, epsilon in [0, 1] and radius > 0, got {candidates}, {epsilon} and "
            f"{radius}"
        )
    return EpsilonGreedy(candidates, epsilon, radius)


def _normal(process: ReverseProcess, state: Trajectory, k: int) -> Normal:
    law = process.transition(state.x, required(state.cache.x0), k)
    if not isinstance(law, Normal):
        raise StateSpaceError(
            f"epsilon_greedy needs steps drawn as mean + std noise, got {type(law).__name__}; use search.svdd"
        )
    return law


def _at(law: Normal, noise: Tensor) -> Tensor:
    """mean + std noise, as `Normal.sample` computes it."""
    return law.mean if law.std == 0.0 else torch.add(law.mean, noise, alpha=law.std)


def _side_by_side(first: Trajectory, second: Trajectory) -> Trajectory:
    """The particles of both."""
    cache = first.cache.map(lambda a, b: torch.cat([a, b], 1), second.cache)
    return replace(Trajectory.begin(first.process, torch.cat([first.x, second.x], 1), k=first.k), cache=cache)
