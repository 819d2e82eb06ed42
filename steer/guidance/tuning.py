"""The hyper-parameter search of training-free guidance, as a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..cost import Cost
from ..errors import NonFiniteError, SteerError
from ..key import Key, as_key
from ..results.result import Result
from ..samplers.rollout import rollout
from ..types import GaussianPath, Reward
from .guided_process import guide
from .hooks import Hooks

Strengths = tuple[float, ...]


@dataclass(frozen=True)
class Trial:
    """Strengths, how well they scored (-inf where states ran away) and the mean displacement in units per step."""

    strengths: Strengths
    score: float
    displacement: float


@dataclass(frozen=True)
class Tuned:
    """The best strengths, every trial from best to worst, and what they cost together."""

    best: Strengths
    trials: tuple[Trial, ...]
    cost: Cost


def mean_reward(result: Result) -> float:
    """The mean reward of a run: what `tune` maximises unless told otherwise."""
    return float(result.reward.mean())


def tune(
    build: Callable[..., Hooks],
    process: GaussianPath,
    reward: Reward,
    *,
    start: Sequence[float] = (0.25, 0.25, 0.001),
    factors: Sequence[float] = (2.0, 2.0, 10.0),
    most: Sequence[float] = (8.0, 8.0, 1.0),
    beam: int = 2,
    rounds: int = 6,
    particles: int = 64,
    batch: int = 1,
    score: Callable[[Result], float] = mean_reward,
    key: Key | int = 0,
) -> Tuned:
    """Beam search for the strengths of guidance: from the best few, each strength grown by its factor in turn.

    Args:
        build: strengths -> Hooks, for instance `lambda rho, mu, sigma: tfg(reward, rho=rho, mu=mu, sigma=sigma)`.
        process: on a Gaussian path; every trial guides it.
        reward: of the trials' results, samples [M, ...] to [M]; higher is better.
        start: strengths of the first trial, as many as `build` takes.
        factors: what each strength is multiplied by when it grows.
        most: the largest value of each.
        beam, rounds, particles: how many trials are kept and grown, how often at most, and N per problem of a trial:
            2, 6 and 64 in the paper, whose start, factors and ceilings are the defaults.
        batch: problems per trial.
        score: Result -> number to maximise. All trials share their noises, so differences are paired. The mean reward
            rewards leaving the data's distribution, as every search by reward alone does: subtract what that costs (the
            log's displacement, a held-out reward) where it matters.
        key: names the noise, which all trials share.

    Returns:
        The best strengths, all trials from best to worst, and what they cost together.

    Raises:
        SteerError: start, factors and most of different lengths, beam < 1, rounds < 0, or no trial with a finite score.

    Cost: at most (1 + beam rounds len(start)) rollouts.

    Source: Ye et al. 2024 (TFG, 2409.15761), their beam search as released.
    """
    if not len(start) == len(factors) == len(most) or beam < 1 or rounds < 0:
        raise SteerError(
            f"start, factors and most are as many as build takes, beam >= 1 and rounds >= 0; got {len(start)}, "
            f"{len(factors)}, {len(most)}, {beam}, {rounds}"
        )
    trials: dict[Strengths, Trial] = {}
    costs, key = [], as_key(key).fold("tune")

    def attempt(strengths: Strengths) -> Trial:
        if strengths not in trials:
            found, displacement = -math.inf, math.nan
            try:
                guided = guide(process, build(*strengths))
                result = rollout(guided, reward, particles=particles, batch=batch, key=key, keep_states=False)
                costs.append(result.cost)
                moved = [mean for mean, _ in result.process.log.table().values()]  # type: ignore[attr-defined]
                found, displacement = score(result), sum(moved) / max(1, len(moved))
            except NonFiniteError:
                pass
            trials[strengths] = Trial(strengths, found if math.isfinite(found) else -math.inf, displacement)
        return trials[strengths]

    best = [attempt(tuple(start))]
    for _ in range(rounds):
        grown = [
            (*t.strengths[:i], min(t.strengths[i] * factors[i], most[i]), *t.strengths[i + 1 :])
            for t in best
            for i in range(len(start))
        ]
        pool = {t.strengths: t for t in [*best, *map(attempt, grown)]}
        ranked = sorted(pool.values(), key=lambda t: -t.score)[:beam]
        if [t.strengths for t in ranked] == [t.strengths for t in best]:
            break
        best = ranked
    ranked = tuple(sorted(trials.values(), key=lambda t: -t.score))
    if not costs or ranked[0].score == -math.inf:
        raise SteerError("no trial of the search ended with a finite score; start it from smaller strengths")
    return Tuned(ranked[0].strengths, ranked, sum(costs[1:], costs[0]))
