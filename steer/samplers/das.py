"""DAS: tempered SMC whose guidance looks one tempering step ahead.

    x ~ the prior, K particles of each of B problems
    for every level i:
        predict x0_hat and the gradient G of r(x0_hat) / T
        weight by exp(lambda_i r(x0_hat) / T) over what was multiplied in before, and resample where the ESS is low
        x' ~ the model's step moved by scale std^2 lambda_{i+1} G; weight by model(x') / proposal(x')
    weight by exp(r(x_0) / T) over what was multiplied in before

Kim et al. 2025, Algorithm 1.
"""

from __future__ import annotations

import math

from ..core.event import OnStep
from ..core.resampling import ssp
from ..core.start import Start, prior
from ..core.temperature import Temperature
from ..key import Key
from ..particles.potentials import difference
from ..particles.proposals import TemperedGuided
from ..particles.selection import Resample, resample
from ..particles.tempering import geometric_tempering
from ..results.result import Result
from ..types import ReverseProcess, Reward
from .smc import smc


def das(
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
    gamma: float | None = None,
    lowest: float = 0.0,
    scale: float = 1.0,
    selection: Resample | None = None,
    keep_states: bool = False,
    on_step: OnStep | None = None,
) -> Result:
    """Weighted samples of p(x) exp(r(x) / temperature) by guided steps, with the reward turned on gradually.

    At level i the value counts lambda_i r(x0_hat) / temperature, lambda_i = min((1 + gamma)^i - 1, 1), and the step
    from there follows lambda_{i+1} times its gradient.

    Args:
        particles: K per problem, 4 by default as in the paper; or budget, network rows per problem.
        temperature: alpha in the paper, .005 (aesthetic), .01 (CLIP) and 1e-4 (PickScore) there.
        gamma: growth of lambda + 1 per level; by default such that lambda = 1 at 87 % of the way, which gives the
            paper's .008 at 100 steps and its .1 at 8.
        lowest: lambda_0, 0 in the paper; after an MCMC start at T_m, temperature / T_m (see `geometric_tempering`).
        scale: strength of the guidance; weights correct for any.
        selection: by default SSP resampling where the ESS falls below half of K.
        Others: as `steer.smc`, of which this is a setting: smc(weight=difference(tempering=...), proposal=...). For
            exponents chosen by ESS use that with `adaptive_tempering`.

    Returns:
        Result as `steer.smc`.

    Raises:
        SteerError: where gamma is not positive, or lowest is outside [0, 1].
        NotDifferentiableError: where reward or network have no gradient.
        Others: as `steer.smc`.

    Cost: per problem K network rows per step, and as many rewards and backward passes (none in the last step).

    Source: Kim et al. 2025 (DAS, 2501.05803), Algorithm 1.
    Differs: gradient and twist move with their particles when resampled, which the release forgets (and so samples
    another distribution); the weighted population is returned.
    """
    if gamma is None:
        gamma = math.expm1(math.log(2.0) / (0.87 * process.steps))
    tempering = geometric_tempering(gamma, lowest=lowest)
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
        proposal=TemperedGuided(tempering, scale),
        weight=difference(tempering=tempering),
        selection=selection or resample(ssp, threshold=0.5),
        keep_states=keep_states,
        on_step=on_step,
    ).by("das")
