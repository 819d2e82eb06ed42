"""Feynman-Kac steering: SMC with the model's own steps and potentials at a few levels; no gradients.

    x ~ the prior, k particles of each of B problems
    for every level:
        predict x0_hat; at the chosen levels weight by the potential of r(x0_hat) / T, and resample where the ESS is low
        x' ~ the model's own transition
    weight by what exp(r(x_0) / T) is still owed

Singhal et al. 2025, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..core.event import OnStep
from ..core.resampling import Resampler, systematic
from ..core.start import Start, prior
from ..core.temperature import Temperature
from ..key import Key
from ..particles.potentials import Potential, difference
from ..particles.selection import resample
from ..results.result import Result
from ..types import ReverseProcess, Reward
from .smc import smc


def fk_steering(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: Temperature = 1.0,
    ess: float | None = None,
    kl: float | None = None,
    key: Key | int = 0,
    seed: int | None = None,
    start: Start = prior,
    potential: Callable[[Collection[int]], Potential] = difference,
    levels: Collection[int] | None = None,
    resampler: Resampler = systematic,
    threshold: float = 1.0,
    keep_states: bool = False,
    on_step: OnStep | None = None,
) -> Result:
    """Weighted samples of p(x) exp(r(x) / temperature) by weighting and resampling at a few levels.

    Args:
        particles: k per problem, 4 by default as in the paper; or budget, network rows per problem.
        temperature: 1 / lambda, in units of the reward; the paper's lambda = 10 is 0.1.
        potential: `steer.difference`, `steer.maximum` (the paper's choice for images) or `steer.total` (its "sum").
        levels: timesteps at which rewards are evaluated and particles resampled, numbered from noise; by default every
            fifth part of the way from the first, [0, 20, 40, 60, 80] of 100.
        resampler: log-weights [B, N] to ancestors [B, N].
        threshold: resample at those levels where the ESS is below this share of k. The paper's adaptive mode is 0.5.
        Others: as `steer.smc`, of which this is a setting: smc(weight=potential(levels), selection=resample(...,
            levels)).

    Returns:
        Result as `steer.smc`.

    Raises:
        As `steer.smc`.

    Cost: per problem k K network rows (K = process.steps) and k (levels + 1) rewards.

    Source: Singhal et al. 2025 (2501.06848), Algorithm 1 and Sec. 3.2; transitions `ddim(1.0)`, 100 steps, there.
    Differs: every potential closes on r(x_0), so that max and sum have the same target as difference; weights of levels
    that do not resample are carried on; nothing is clamped, in particular not exp(lambda r); systematic resampling,
    which leaves equal weights alone, in place of multinomial; the last population is weighted and not resampled, so it
    has no copies.
    """
    at = range(0, process.steps, max(1, process.steps // 5)) if levels is None else levels
    return smc(
        process,
        reward,
        batch=batch,
        particles=4 if particles is None and budget is None else particles,
        budget=budget,
        temperature=temperature,
        ess=ess,
        kl=kl,
        key=key,
        seed=seed,
        start=start,
        weight=potential(at),
        selection=resample(resampler, threshold, at),
        keep_states=keep_states,
        on_step=on_step,
    ).by("fk_steering")
