"""Which transition rule stands in for a pipeline's scheduler where the user chose none, and the line that says so."""

from __future__ import annotations

import bisect
import logging
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import ModelError
from ..processes.transitions import CPS, DDIM, Normal, keep_marginal
from ..types import Level, Rule
from .families import ANCESTRAL_SCHEDULERS, ETA_SCHEDULERS, RENOISING_SCHEDULERS, TCD_SCHEDULERS, name_is_in

log = logging.getLogger("steer")


@dataclass(frozen=True)
class StrategicStochastic:
    """TCD's step: along the prediction to a fraction 1 - gamma of the next timestep, and noised up to that.

    Source: Zheng et al. 2024 (Trajectory Consistency Distillation), Algorithm 3, as diffusers' TCDScheduler steps.

    Args:
        gamma: Share of the next timestep that is noised anew: 0 draws nothing, 1 redraws all the noise.
        table: alpha^2 at every timestep, falling.
    """

    gamma: float
    table: tuple[float, ...] = field(repr=False)

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> Normal:
        return keep_marginal(x, x0, here, there, self.std(here, there))

    def std(self, here: Level, there: Level) -> float:
        timestep = self._timestep(there.alpha**2)
        inner = self.table[math.floor((1.0 - self.gamma) * timestep)]
        # None at the first timestep, where the network is not evaluated any more.
        return math.sqrt(max(0.0, 1.0 - there.alpha**2 / inner)) if timestep else 0.0

    def _timestep(self, squared: float) -> int:
        """The timestep whose alpha^2 is nearest."""
        after = min(bisect.bisect_left(self.table, -squared, key=lambda entry: -entry), len(self.table) - 1)
        return min((after, max(0, after - 1)), key=lambda step: abs(self.table[step] - squared))


def chosen_rule(scheduler: Any, transition: Rule | None, eta: float | None = None) -> Rule:
    """The rule to step by: the user's, or the scheduler's own noise where steer has it, or ancestral sampling.

    Where nothing was chosen and the scheduler steps otherwise, one line to the log "steer" says what replaces it.

    Args:
        scheduler: The pipeline's scheduler, after `set_timesteps`.
        transition: The user's rule, or None.
        eta: The pipeline's own argument, or None.

    Raises:
        ModelError: For `eta` beside a transition, and for schedulers whose steps have none.
    """
    kind = type(scheduler).__name__
    if eta is not None and (transition is not None or not name_is_in(scheduler, ETA_SCHEDULERS)):
        reason = "transition= sets the noise of a step" if transition is not None else f"{kind} would ignore it"
        raise ModelError(f"eta={eta} would have no effect, as {reason}; leave eta out, or give transition= alone")
    if transition is not None:
        return transition
    if name_is_in(scheduler, TCD_SCHEDULERS):
        rule = StrategicStochastic(0.3 if eta is None else eta, tuple(scheduler.alphas_cumprod.double().tolist()))
        log.warning("%s -> %s, the re-noising steps that its networks are distilled for", kind, rule)
        return rule
    if name_is_in(scheduler, RENOISING_SCHEDULERS) or scheduler.config.get("stochastic_sampling", False):
        log.warning("%s -> cps(eta=1.0), the re-noising steps that its networks are distilled for", kind)
        return CPS(1.0)
    if eta is not None:
        return DDIM(eta)
    if not name_is_in(scheduler, ANCESTRAL_SCHEDULERS):
        log.warning(
            "%s -> ancestral ddim(eta=1.0); without noise: transition=steer.ddim(eta=0.0); its own solver, if it draws "
            "none: steer.own_solver(process)",
            kind,
        )
    return DDIM()
