"""Search over paths: samples near the data are noised back and brought down again, and the best go on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steer.core.chain import run_chain
from steer.core.loop import Loop, keeping
from steer.core.population import gather
from steer.core.run import Run
from steer.core.trajectory import Trajectory
from steer.errors import SteerError
from steer.types import ReverseProcess

from ..values import evaluate, x0_hat
from .strategy import StrategyResult, concat


@dataclass(frozen=True)
class PathSearch:
    """N paths that compete. Built by `paths`."""

    copies: int
    first: float
    back: float
    ahead: float
    chains: int = 2

    def least(self, process: ReverseProcess) -> int:
        """One sample per path."""
        return process.steps

    def __call__(self, run: Run, particles: int, calls: int) -> StrategyResult:
        """Paths to near the data, then rounds of re-noising until the calls are spent."""
        steps, left, turn = run.process.steps, calls * particles, 0
        until = min(steps, max(1, round((1.0 - self.first) * steps)))
        loop = Loop(run)
        best: StrategyResult | None = None  # finished samples
        with keeping(lambda: best), loop.keeping_partial(), torch.no_grad():
            state = run_chain(loop, run.begin(particles), until=until)
            left -= until * particles
            try:
                while not loop.interrupted:
                    if state.k == steps and best is None:
                        best = StrategyResult(state.x, run.score(state.x), state.root)
                        state = Trajectory.begin(run.process, best.x, k=steps)
                    start, end = self._move(steps, state.k, left // particles)
                    if start == end:
                        break
                    # One copy of every path: its steps, and unless it ends at the data a prediction to score it by.
                    each = particles * (end - start + (end < steps))
                    copies = min(self.copies, (left - particles * max(0, steps - end - 1)) // each)
                    if copies < 1:  # what is left pays for the way to the data, and for shorter rounds from there
                        left -= particles * (steps - state.k - (state.cache.x0 is not None))
                        state = run_chain(loop, state, noise=run.key.fold("step", "last"))
                        continue
                    left -= copies * each
                    state, best = self._round(loop, state, best, (start, end), copies, turn)
                    turn += 1
            except KeyboardInterrupt:
                loop.interrupted = True
                if best is None:
                    state = loop.ended(state)
            if best is None:
                best = StrategyResult(state.x, run.score(state.x, "of the predictions"), state.root)
        return best._replace(interrupted=loop.interrupted)

    def _move(self, steps: int, k: int, left: int) -> tuple[int, int]:
        """Where the next round starts and ends, for paths at level k with `left` predictions each to spend."""
        back = max(1, round(self.back * steps))
        if k == steps:
            return steps - min(back, left), steps
        start = max(0, k - back)
        return start, min(steps, max(k + 1, start + round(self.ahead * steps)))

    def _round(
        self,
        loop: Loop,
        state: Trajectory,
        best: StrategyResult | None,
        move: tuple[int, int],
        copies: int,
        turn: int,
    ) -> tuple[Trajectory, StrategyResult | None]:
        """The best N of `copies` re-noisings of every path; finished ones compete with those found before."""
        run, (start, end), count = loop.run, move, state.x.shape[1]
        index = torch.arange(count, device=state.x.device).repeat(copies).expand(state.x.shape[0], -1)
        tried = state.select(index).renoise(start, run.key.fold("renoise", turn))
        tried = run_chain(loop, tried, until=end, noise=run.key.fold("step", turn))
        if loop.interrupted:
            return tried, best
        if end < run.process.steps:
            x0, score = evaluate(run, tried.x, end, x0_hat())
            return tried.with_step_cache(x0=x0, score=score).select(_best(score, count)), best
        root = tried.root if best is None else best.root.gather(1, tried.root)
        found = StrategyResult(tried.x, run.score(tried.x), root)
        if best is not None:
            found = concat(best, found)
        winners = _best(found.reward, count)
        best = StrategyResult(gather(found.x, winners), found.reward.gather(1, winners), found.root.gather(1, winners))
        return Trajectory.begin(run.process, best.x, k=run.process.steps), best


def paths(copies: int = 5, *, first: float = 0.11, back: float = 0.78, ahead: float = 0.81) -> PathSearch:
    """Search over paths: samples near the data are noised back and brought down again in several ways; the best go on.

        bring N paths down to a level near the data
        while the budget lasts:    noise each path back, in `copies` ways, and bring the copies down again
                                   keep the N best by r(x0_hat), or by the reward once they are at the data

    N is `particles` of `noise_search`, 2 by default. Rounds begin and end ever nearer to the data; from there on they
    begin and end at the data, where finished samples compete with new ones.

    Args:
        copies: re-noisings of each path per round, at least 1.
        first: share of the time grid at which the first round begins, counted from the data, in [0, 1).
        back: share of the grid by which a round goes back, in (0, 1].
        ahead: share of the grid by which it comes forward again, at least `back`.

    Returns:
        A strategy for `noise_search(strategy=)`. It runs on every process, deterministic ones too.

    Raises:
        SteerError: where an argument is out of its range.

    Cost: all of the budget, with shorter and smaller rounds at its end: the smallest move is one prediction per path.
        One reward per copy and round.
    Source: Ma et al. 2025 (2501.09732), search over paths: to sigma = .11, back by .78, forward by .81.
    Differs: in levels of the grid, not in sigma; it does not stop at the data.
    """
    if copies < 1 or not (0.0 <= first < 1.0 and 0.0 < back <= 1.0 and ahead >= back):
        raise SteerError(
            f"paths takes copies >= 1, 0 <= first < 1 and 0 < back <= ahead, got copies={copies}, first={first}, "
            f"back={back}, ahead={ahead}"
        )
    return PathSearch(copies, first, back, ahead)


def _best(score: torch.Tensor, count: int) -> torch.Tensor:
    """Index [B, N] of the `count` highest of the scores [B, n], the first of equals."""
    return torch.sort(score, dim=1, descending=True, stable=True).indices[:, :count]
