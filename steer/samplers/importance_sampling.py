"""Importance sampling: independent chains, weighted once at the end."""

from __future__ import annotations

from ..core.event import OnStep
from ..core.start import Start, prior
from ..core.temperature import Temperature
from ..key import Key
from ..particles.potentials import final_only
from ..particles.selection import resample
from ..results.result import Result
from ..types import ReverseProcess, Reward
from .smc import smc


def importance_sampling(
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
    keep_states: bool = False,
    on_step: OnStep | None = None,
) -> Result:
    """Unsteered samples weighted by exp(r(x) / temperature): self-normalised importance sampling.

    The control that every sampler should be compared with: exact as N grows, useless where the tilt is a rare event.

    Args:
        Others: as `steer.smc`, of which this is the case without intermediate weights and without resampling.

    Returns:
        Result as `steer.smc`; look at `ess` [B] and `pareto_k` [B] before trusting it.

    Raises:
        As `steer.smc`.

    Cost: per problem N K network rows and N rewards.
    """
    return smc(
        process,
        reward,
        batch=batch,
        particles=particles,
        budget=budget,
        temperature=temperature,
        ess=ess,
        kl=kl,
        key=key,
        seed=seed,
        start=start,
        weight=final_only(),
        selection=resample(threshold=0.0),
        keep_states=keep_states,
        on_step=on_step,
    ).by("importance_sampling")
