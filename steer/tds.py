"""The twisted diffusion sampler: the reward's gradient enters through the predicted x_0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from .core.resampling import systematic
from .core.start import Start, prior
from .core.trajectory import Trajectory
from .key import Key
from .processes.gaussian import GaussianProcess
from .result import Result
from .selection import Resample, resample
from .smc import pull, smc
from .types import GaussianTransition, OnStep, ReverseProcess, Reward


@dataclass(frozen=True)
class Twisted:
    """Proposes the model's step as if it had predicted x0 + scale (sigma^2 / alpha) G, G = gradient of r(x0_hat) / T.

    That is Tweedie's formula with the score of the tilted law. The step's mean is affine in x0, with coefficient
    c = alpha' - alpha sqrt(sigma'^2 - std^2) / sigma in a rule that keeps marginals, so the mean moves by
    scale c (sigma^2 / alpha) G. `guided` moves it by scale std^2 G instead. For ancestral sampling the ratio of the
    two is (alpha' sigma^2) / (alpha sigma'^2) > 1: the same in the limit of small steps, but stronger in a long
    one and unbounded in the last (which adds no noise, and so is never shifted). At alpha = 0, where the formula
    divides by zero, the step is the model's own.
    """

    scale: float = 1.0

    def __call__(self, state: Trajectory, model: GaussianTransition) -> GaussianTransition:
        here, there = cast(GaussianProcess, state.process).levels[state.k : state.k + 2]
        if here.alpha <= 0.0:
            return model
        carried = math.sqrt(max(0.0, there.sigma**2 - model.std**2)) / here.sigma
        coefficient = there.alpha - carried * here.alpha
        return model.shift(pull(state) * (self.scale * coefficient * here.sigma**2 / here.alpha))


def twisted(scale: float = 1.0) -> Twisted:
    """A proposal that follows the gradient of the reward through x_0, as TDS does; see `Twisted` for the formula."""
    return Twisted(scale)


def tds(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    start: Start = prior,
    scale: float = 1.0,
    selection: Resample | None = None,
    keep_states: bool = False,
    on_step: OnStep | None = None,
) -> Result:
    """Weighted samples of p(x) exp(r(x) / temperature) by twisted steps, weighted for the twist and resampled.

    The twist is the likelihood exp(r / temperature) at the prediction x0_hat: give a log-likelihood as the reward and
    temperature 1 for a posterior.

    particles: K per problem, 4 by default as in the released code; or budget, network rows per problem.
    scale:     strength of the twist in the proposal; weights correct for any.
    selection: by default systematic whenever weights differ, as released; `resample(threshold=0.5)` does so less often.
    Others as `steer.smc`, of which this is a setting: smc(proposal=twisted()).

    Cost per problem: K network rows per step, and as many rewards and backward passes (none in the last step).
    Source: Wu et al. 2023 (2306.17775), Algorithm 1, with the released defaults. Differs: written for any
    (alpha, sigma) and stochastic rule; the twisted prediction is not clamped; the last population is weighted.
    """
    return smc(
        process, reward, batch=batch, particles=4 if particles is None and budget is None else particles,
        budget=budget, temperature=temperature, key=key, start=start, proposal=twisted(scale),
        selection=selection or resample(systematic, threshold=1.0), keep_states=keep_states, on_step=on_step,
    )  # fmt: skip
