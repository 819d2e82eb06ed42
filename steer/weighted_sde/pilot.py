"""Unsteered samples of a composite, by which the temperature of its tilt is chosen."""

from __future__ import annotations

from typing import Any, cast

import torch

from ..core.objective import Objective
from ..core.start import prior
from ..core.temperature import Pilot, Settled, settle
from ..errors import SteerError
from ..key import Key
from ..particles.selection import resample
from ..types import ReverseProcess, Reward
from .composite import Composite
from .engine import FeynmanKac
from .look_ahead import x0_hat
from .loop import weighted_loop
from .transports import Transport, flow_transport, score_transport


def default_transport(target: Composite) -> Transport:
    """The transport whose weights have a finite variance: the score's where exponents sum to 1, else the flow's."""
    return score_transport if target.total(target.steps) == 1.0 and not target.varying else flow_transport


def settle_composite(target: Composite, reward: Reward | None, **options: Any) -> Settled:
    """`core.temperature.settle` for a composite, whose unsteered samples are a weighted population of their own."""
    if reward is None:
        if options["temperature"] == "auto" or options["ess"] is not None or options["kl"] is not None:
            raise SteerError("a temperature divides a reward, and there is none; give a reward, or leave them out")
        return Settled(options["temperature"], options["budget"])
    return settle(target, reward, pilot=_population, **options)


def _population(target: ReverseProcess, objective: Objective, key: Key, problems: int, count: int) -> Pilot:
    """Rewards and log-weights of the composite without a reward."""
    target = cast(Composite, target)
    result, _ = weighted_loop(
        target,
        None,
        batch=problems,
        particles=count,
        budget=None,
        temperature=1.0,
        key=key,
        seed=None,
        start=prior,
        transport=default_transport(target),
        weight=FeynmanKac(probes=1),
        noise=1.0,
        look_ahead=x0_hat(),
        tempering=None,
        selection=resample(),
        active=None,
        sigma_data=1.0,
        keep_states=False,
        on_step=None,
        name="pilot",
    )
    objective.process.meter.paid(result.cost)
    with torch.no_grad():
        scores = objective(result.x, "of the unsteered samples that choose the temperature")
    return Pilot(scores, result.log_weight)
