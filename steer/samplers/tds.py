"""The twisted diffusion sampler: the reward's gradient enters through the predicted x_0.

    x ~ the prior, K particles of each of B problems
    for every level:
        predict x0_hat and the gradient G of r(x0_hat) / T
        weight by the twist exp(r(x0_hat) / T) over the twist before it, and resample where weights differ
        x' ~ the model's step for the prediction x0_hat + scale (sigma^2 / alpha) G; weight by model(x') / proposal(x')
    weight by exp(r(x_0) / T) over the last twist

Wu et al. 2023, Algorithm 1.
"""

from __future__ import annotations

from ..core.event import OnStep
from ..core.resampling import systematic
from ..core.start import Start, prior
from ..core.temperature import Temperature
from ..key import Key
from ..particles.proposals import twisted
from ..particles.selection import Resample, resample
from ..results.result import Result
from ..types import ReverseProcess, Reward
from .smc import smc


def tds(
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
    scale: float = 1.0,
    selection: Resample | None = None,
    keep_states: bool = False,
    on_step: OnStep | None = None,
) -> Result:
    """Weighted samples of p(x) exp(r(x) / temperature) by twisted steps, weighted for the twist and resampled.

    The twist is the likelihood exp(r / temperature) at the prediction x0_hat: give a log-likelihood as the reward and
    temperature 1 for a posterior.

    Args:
        particles: K per problem, 4 by default as in the released code; or budget, network rows per problem.
        scale: strength of the twist in the proposal; weights correct for any.
        selection: by default systematic whenever weights differ, as released; `resample(threshold=0.5)` does so less
            often.
        Others: as `steer.smc`, of which this is a setting: smc(proposal=twisted()).

    Returns:
        Result as `steer.smc`.

    Raises:
        NotDifferentiableError: where reward or network have no gradient.
        StateSpaceError: where the process is not on a Gaussian path.
        Others: as `steer.smc`.

    Cost: per problem K network rows per step, and as many rewards and backward passes (none in the last step).

    Source: Wu et al. 2023 (2306.17775), Algorithm 1, with the released defaults.
    Differs: written for any (alpha, sigma) and stochastic rule; the twisted prediction is not clamped; the last
    population is weighted.
    """
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
        proposal=twisted(scale),
        selection=selection or resample(systematic, threshold=1.0),
        keep_states=keep_states,
        on_step=on_step,
    ).by("tds")
