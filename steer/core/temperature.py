"""The temperature of a sampler that was asked for an ESS or a KL: chosen before the run, from unsteered samples.

A pilot of plain chains, on noise of its own, is scored; bisection on its rewards gives the temperature; then the run is
the same as one that was given this number. The pilot's network rows come out of the budget and are in the run's cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..cost import Cost, check_counts, rows_between
from ..errors import BudgetError, SteerError
from ..key import Key, as_key
from ..types import ReverseProcess, Reward
from .event import OnStep, after
from .objective import Objective, check_temperature, num_problems, open_objective
from .tilt import Tilt

Temperature = float | Literal["auto"]
"""What rewards are divided by; "auto" is the temperature at which the ESS of unsteered samples is half of them."""

_AUTO = 0.5  # ESS share of "auto": the smallest that a few dozen samples determine well
_ENOUGH = 24  # times 1 / ess^2 samples, for an ESS within a factor 1.5: large weights count more, and are rarer
_SAMPLES = (4, 128)  # of a pilot, at least and at most
_SHARE = 4  # a pilot gets at most the budget over this
_CHUNK = 64  # chains of a pilot that run at once

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class TemperatureChoice:
    """How a run's temperature was chosen, and what was expected of it.

    temperature: three digits; the run is the same as one that is given this number.
    asked:       "ess=0.5", or "kl=2".
    samples:     unsteered samples of each problem that were scored first, for rows network rows a problem.
    ess:         expected ESS of unsteered samples weighted by exp(r / temperature), as a share of them.
    ess_factor:  factor within which that is known, one standard error. Large where few samples carry the weight: what
                 fewer than one of `samples` samples shows is not seen at all.
    kl:          expected KL of the target to the model, in nats.
    reward:      expected mean reward.
    unsteered, unsteered_error: the unsteered samples' mean reward, and its standard error.
    """

    temperature: float
    asked: str
    samples: int
    rows: int
    ess: float
    ess_factor: float
    kl: float
    reward: float
    unsteered: float
    unsteered_error: float

    def __str__(self) -> str:
        return (
            f"temperature {self.temperature:.3g}, chosen for {self.asked} from {self.samples} unsteered samples "
            f"({self.rows:,} network rows): expected ESS {self.ess:.2g} of the samples (to a factor "
            f"{self.ess_factor:.2g}), KL {self.kl:.2g} nats, mean reward {self.unsteered:.4g} -> {self.reward:.4g}"
        )


class Pilot(NamedTuple):
    """Unsteered samples: their rewards [B, n], and the log-weights that make them the model's, None for equal ones."""

    reward: Tensor
    log_weight: Tensor | None = None


@dataclass(frozen=True)
class Settled:
    """What a run is given once its temperature is a number.

    temperature: the number.
    budget:      network rows per problem that are left for the run; None where none was given.
    choice:      how it was chosen; None where it was given.
    spent:       by the pilot.
    """

    temperature: float
    budget: int | None
    choice: TemperatureChoice | None = None
    spent: Cost = field(default_factory=Cost)

    def on_step(self, on_step: OnStep | None) -> OnStep | None:
        """The same, its events counting what the pilot spent."""
        return on_step if self.choice is None else after(on_step, self.spent)

    def told(self, result: ResultT) -> ResultT:
        """The run's Result, saying how the temperature was chosen and what that cost."""
        if self.choice is None:
            return result
        paid: Any = result
        return replace(paid, temperature_choice=self.choice, cost=self.spent + paid.cost)


def settle(
    process: ReverseProcess,
    reward: Reward,
    *,
    temperature: Temperature,
    ess: float | None,
    kl: float | None,
    batch: int,
    budget: int | None,
    key: Key | int,
    seed: int | None = None,
    pilot: Callable[[ReverseProcess, Objective, Key, int, int], Pilot] | None = None,
    check: Callable[[int | None], object] | None = None,
) -> Settled:
    """A number for the temperature: the one given, or the one that meets what is asked for.

    Args:
        process: the model.
        reward: of the run.
        temperature: a number; or "auto", which is ess=0.5 unless `ess` or `kl` is given.
        ess: share of unsteered samples, in (0, 1), that their ESS is to be when weighted by exp(r / temperature).
        kl: of the target to the model, > 0, in nats.
        batch: B, as the method takes it.
        budget: network rows per problem of pilot and run.
        key, seed: of the run, as the method takes them.
        pilot: (process, objective, key, B, n) to unsteered samples, where plain chains are none.
        check: called with the budget that the run will have, before the pilot is paid: raises what the run would raise
            of its arguments.

    Raises:
        SteerError: more than one of the three is given, or no temperature meets what is asked for.
        BudgetError: a quarter of the budget pays for fewer than four samples.

    Cost: nothing where the temperature is a number; else 24 / ess^2 (or 24 exp(2 kl)) samples, 128 at most, and no more
    than a quarter of the budget pays for: K network rows and a reward each. Repetitions of one problem share them.
    """
    ess, kl = _asked(temperature, ess, kl)
    if ess is None and kl is None:
        return Settled(check_temperature(temperature), budget)
    check_counts(budget=budget)
    process, objective, meter = open_objective(process, reward)
    problems, key = num_problems(process, batch), as_key(key, seed).fold("pilot")
    pooled = process.problems is None
    rows = rows_between(process, 0, process.steps)
    count = _count(ess, kl, problems if pooled else 1, rows, budget)
    left = None if budget is None else budget - count * rows
    if check is not None:
        check(left)
    found = (pilot or _chains)(process, objective, key, problems, count)
    meter.finite.settle()
    tilt = Tilt.of(*found, pooled=pooled)
    chosen = tilt.temperature(ess=ess, kl=kl)
    choice = TemperatureChoice(
        temperature=chosen,
        asked=f"ess={ess:g}" if kl is None else f"kl={kl:g}",
        samples=tilt.samples,
        rows=count * rows,
        ess=tilt.ess_of_model(chosen),
        ess_factor=tilt.ess_factor(chosen),
        kl=tilt.kl(chosen),
        reward=tilt.mean(chosen),
        unsteered=tilt.mean(),
        unsteered_error=tilt.error(),
    )
    return Settled(chosen, left, choice, meter.cost())


def _asked(temperature: Temperature, ess: float | None, kl: float | None) -> tuple[float | None, float | None]:
    """What is asked for of the temperature, checked: an ESS share, a KL, or neither."""
    if ess is None and kl is None:
        return (_AUTO if temperature == "auto" else None), None
    if (ess is not None and kl is not None) or temperature not in ("auto", 1.0):
        raise SteerError(
            f"the temperature is one number, and ess= and kl= each choose it: give one of the three, got "
            f"temperature={temperature}, ess={ess}, kl={kl}"
        )
    if ess is not None and not 0.0 < ess < 1.0:
        raise SteerError(f"ess is a share of the samples, in (0, 1), got {ess}; ess=0.5 is half of them")
    if kl is not None and not 0.0 < kl < math.inf:
        raise SteerError(f"kl is in nats and positive, got {kl}")
    return ess, kl


def _count(ess: float | None, kl: float | None, shared: int, rows: int, budget: int | None) -> int:
    """How many samples of each problem the pilot draws, where `shared` problems share them."""
    least, most = _SAMPLES
    ess = math.exp(-min(kl or 0.0, 50.0)) if ess is None else ess
    count, least = (math.ceil(samples / shared) for samples in (max(least, min(most, _ENOUGH / ess**2)), least))
    if budget is None:
        return count
    if budget // _SHARE < least * rows:
        raise BudgetError(
            f"a quarter of a budget of {budget} network rows per problem goes to choosing the temperature, and pays "
            f"for {budget // _SHARE // rows} samples at {rows} rows each where {least} are needed; raise the budget to "
            f"{_SHARE * least * rows}, or give the temperature as a number"
        )
    return min(count, budget // _SHARE // rows)


@torch.no_grad()
def _chains(process: ReverseProcess, objective: Objective, key: Key, problems: int, count: int) -> Pilot:
    """Rewards of plain chains."""
    rewards = []
    for first in range(0, count, _CHUNK):
        own = key.shifted(slot=first)
        x = process.prior(own.fold("prior"), problems, min(_CHUNK, count - first))
        for k in range(process.steps):
            x0 = process.denoise(x, k, own)
            x = process.transition(x, x0, k).sample(own.fold("step").at(k))
        rewards.append(objective(x, "of the unsteered samples that choose the temperature"))
    return Pilot(torch.cat(rewards, 1))
