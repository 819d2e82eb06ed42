"""Epsilon-greedy search over the noise of every step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steer.core.trajectory import Trajectory
from steer.errors import NotStochasticError, StateSpaceError, SteerError
from steer.processes.transitions import Normal
from steer.types import OnStep, ReverseProcess, Stop

from ..budget import spread
from ..run import Run
from ..values import x0_hat
from .strategy import Found, starting_law


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

    def __call__(self, run: Run, particles: int, calls: int, on_step: OnStep | None) -> Found:
        """One noise after another: that of the prior, then that of every step."""
        process = run.process
        paid: Trajectory | None = None
        root = torch.arange(particles).expand(run.batch, -1)
        amounts = self._amounts(process, calls)
        state = run.begin(particles)
        law = starting_law(process, state.x)
        noise = run.key.fold("prior").normal(law.mean.shape, dtype=law.mean.dtype, device=law.mean.device)
        try:
            with torch.no_grad():
                for k in range(process.steps):
                    for state in self._rounds(run, law, noise, k, amounts[k]):
                        paid = state
                    law = _normal(process, state, k)
                    shape, dtype, device = state.x.shape, state.x.dtype, state.x.device
                    noise = run.key.fold("step").at(k).normal(shape, dtype=dtype, device=device)
                    state = Trajectory.begin(process, _at(law, noise), k=k + 1)
                    if on_step is not None:
                        on_step(state)
                assert paid is not None
                clean = process.complete(paid.x, paid.carried["x0"])
                known = law.std == 0.0 and torch.equal(clean, state.x)
                score = paid.carried["score"] if known else run.score(state.x)
                return Found(state.x, score, root.to(state.x.device))
        except (Stop, KeyboardInterrupt):
            if paid is None:
                raise
            clean = process.complete(paid.x, paid.carried["x0"])
            return Found(clean, paid.carried["score"], root.to(clean.device), interrupted=True)
        except SteerError as error:
            error.keep(paid)
            raise

    def _rounds(self, run: Run, law: Normal, pivot: Tensor, k: int, amount: int) -> Iterator[Trajectory]:
        """The best state for level k after each round, `amount` predictions per chain in all; begins with the pivot."""
        count, best, turn = pivot.shape[1], None, 0
        while amount > 0:
            tried = min(self.candidates, amount)
            fresh = tried - 1 if best is None else tried
            noise = self._near(run, pivot, k, turn, fresh) if fresh else pivot[:, :0]
            noise = torch.cat([pivot, noise], 1) if best is None else noise
            x = _at(replace(law, mean=torch.cat([law.mean] * tried, 1)), noise)
            x0, score = run.evaluate(x, k, x0_hat())
            assert x0 is not None
            found = Trajectory.begin(run.process, x, k=k).carry(x0=x0, score=score, noise=noise)
            if best is not None:  # the pivot competes
                found = _joined(best, found)
            score = found.carried["score"]
            winner = score.view(len(score), -1, count).argmax(1) * count + torch.arange(count, device=score.device)
            best = found.select(winner)
            pivot, amount, turn = best.carried["noise"], amount - tried, turn + 1
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
        if not hasattr(process, "levels"):
            raise StateSpaceError(
                f"epsilon_greedy moves Gaussian noise a little, which {type(process).__name__} does not draw; use "
                "search.svdd, or strategy=search.random_search()"
            )
        free = [k == 0 or process.stochastic(k - 1) for k in range(process.steps)]
        if process.steps > 1 and not any(free[1:]):
            raise NotStochasticError(
                "epsilon_greedy searches the noise of the steps, and this process's transitions add none; use a "
                "stochastic rule, for instance process.with_rule(steer.ddim(eta=1.0)), or strategy=search.zero_order()"
            )
        amount = iter(spread(calls - free.count(False), sum(free)))
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
    law = process.transition(state.x, state.carried["x0"], k)
    if not isinstance(law, Normal):
        raise StateSpaceError(
            f"epsilon_greedy needs steps drawn as mean + std noise, got {type(law).__name__}; use search.svdd"
        )
    return law


def _at(law: Normal, noise: Tensor) -> Tensor:
    """mean + std noise, as `Normal.sample` computes it."""
    return law.mean if law.std == 0.0 else torch.add(law.mean, noise, alpha=law.std)


def _joined(first: Trajectory, second: Trajectory) -> Trajectory:
    """The particles of both, side by side."""
    carried = {name: torch.cat([first.carried[name], second.carried[name]], 1) for name in second.carried}
    return Trajectory.begin(first.process, torch.cat([first.x, second.x], 1), k=first.k).carry(**carried)
