"""Restarts and recurrence: a process whose chain also goes back to noisier levels.

A reverse step to N(m, s^2), followed by the forward process from the level k it reached back up to level j, is one
Gaussian step: x = a m + noise of variance (a s)^2 + sigma_j^2 - (a sigma_k)^2, a = alpha_j / alpha_k. So a chain that
goes back has exact densities all along, costs no prediction more than its visits, and everything composes with it:
weights, guided proposals, searches. Also where the model's own steps are deterministic, going back draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

from torch import Tensor

from ..cost import Meter
from ..errors import SteerError
from ..key import Key
from ..processes.delegation import of_base
from ..processes.gaussian import GaussianProcess, need_gaussian_process
from ..processes.second_order import SecondOrderProcess
from ..processes.transitions import Normal
from ..types import GaussianTransition, Level, RenoisableTransition, Rule, RuleWithMemory

_CURE = (
    "restart or recur the model itself and guide that, the other way round: guide(restart(process, spans), hooks); a "
    "composition and a masked process have no Gaussian step to repeat"
)


class RestartInterval(NamedTuple):
    """From the level with noise-to-signal ratio nearest `low` back to that nearest `high`, `times` times."""

    low: float
    high: float
    times: int = 1


@dataclass(frozen=True, eq=False)
class RestartRule:
    """A rule that, asked to a level no less noisy, takes the step to the next level and the noise from there."""

    rule: Rule
    levels: tuple[Level, ...]

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> GaussianTransition:
        if there.t < here.t:
            return self.rule(x, x0, here, there)
        return renoised(self.rule(x, x0, here, self._next[here]), *self._up(here, there))

    def std(self, here: Level, there: Level) -> float:
        if there.t < here.t:
            return self.rule.std(here, there)
        scale, noise = self._up(here, there)
        return math.hypot(scale * self.rule.std(here, self._next[here]), noise)

    def _up(self, here: Level, there: Level) -> tuple[float, float]:
        reached = self._next[here]
        scale = there.alpha / reached.alpha
        return scale, math.sqrt(max(0.0, there.sigma**2 - (scale * reached.sigma) ** 2))

    @cached_property
    def _next(self) -> dict[Level, Level]:
        return dict(itertools.pairwise(self.levels))


def renoised(step: GaussianTransition, scale: float, noise: float) -> GaussianTransition:
    """The distribution of scale * x + noise * z for x drawn from a step."""
    if isinstance(step, RenoisableTransition):
        return step.renoised(scale, noise)
    return Normal(scale * step.mean, math.hypot(scale * step.std, noise))


@dataclass(frozen=True, eq=False)
class RestartProcess:
    """A process that visits the levels of another in an order of its own. Built by `restart` and `recur`.

    base:   the model.
    visits: levels of `base`, from 0 to its last, each followed by the next one or by one that is no less noisy.
    """

    base: GaussianProcess
    visits: tuple[int, ...]

    event = of_base("event")
    problems = of_base("problems")
    prompts = of_base("prompts")
    rows = of_base("rows")
    meter = of_base("meter")
    schedule = of_base("schedule")
    reference = of_base("reference")
    device = of_base("device")
    dtype = of_base("dtype")
    decoder = of_base("decoder")
    prior_moments = of_base("prior_moments")
    text = of_base("text")
    hooks = of_base("hooks")

    def __post_init__(self) -> None:
        need_gaussian_process(self.base, "going back and forth", cure=_CURE)

    def __repr__(self) -> str:
        return f"RestartProcess({self.steps} steps on {self.base})"

    @property
    def steps(self) -> int:
        return len(self.visits) - 1

    @property
    def levels(self) -> tuple[Level, ...]:
        return self._levels

    @cached_property
    def _levels(self) -> tuple[Level, ...]:
        return tuple(self.base.levels[k] for k in self.visits)

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(self.base.times[k] for k in self.visits)

    @property
    def rule(self) -> Rule:
        return self._rule

    @cached_property
    def _rule(self) -> Rule:
        return RestartRule(self.base.rule, self.base.levels)

    def prior(self, key: Key, batch: int, particles: int) -> Tensor:
        return self.base.prior(key, batch, particles)

    def denoise(self, x: Tensor, k: int, key: Key | None = None) -> Tensor:
        return self.base.denoise(x, self.visits[k], key)

    def complete(self, x: Tensor, x0: Tensor) -> Tensor:
        return self.base.complete(x, x0)

    def transition(self, x: Tensor, x0: Tensor, k: int) -> GaussianTransition:
        return self.rule(x, x0, self.levels[k], self.levels[k + 1])

    def stochastic(self, k: int) -> bool:
        return self.rule.std(self.levels[k], self.levels[k + 1]) > 0.0

    def noise(self, x: Tensor, k_from: int, k_to: int, key: Key) -> Tensor:
        if self.visits[k_to] > self.visits[k_from]:
            raise SteerError(
                f"noise goes to a noisier level, and step {k_to} of this chain is less noisy than step {k_from}, to "
                "which it has gone back"
            )
        return self.base.noise(x, self.visits[k_from], self.visits[k_to], key.fold("visit", k_to))

    def decode(self, x: Tensor) -> Tensor:
        return self.base.decode(x)

    def metered(self, meter: Meter) -> RestartProcess:
        return replace(self, base=self.base.metered(meter))

    def only(self, problem: int) -> RestartProcess:
        """Conditioned on one problem alone."""
        return self if self.problems in (None, 1) else replace(self, base=self.base.only(problem))

    def with_rule(self, rule: Rule) -> RestartProcess:
        """The same visits under another transition rule."""
        return rule.on(self) if isinstance(rule, RuleWithMemory) else replace(self, base=self.base.with_rule(rule))

    def with_times(self, times: Sequence[float]) -> RestartProcess:
        """SteerError: visits belong to a grid."""
        raise SteerError("levels are visited on one grid: give the process its times first, then restart or recur")

    def exact(self, reward: Any, temperature: float = 1.0) -> Any:
        """The tilted distribution of the model."""
        return self.base.exact(reward, temperature)

    @property
    def returns(self) -> list[int]:
        """Steps that end by going back: resample there (`steer.resample(at=...)`), and fresh noise follows."""
        return [k for k, (here, there) in enumerate(itertools.pairwise(self.visits)) if there <= here]


def restart(process: GaussianProcess, spans: Sequence[RestartInterval | tuple[float, float, int]]) -> RestartProcess:
    """Restart sampling: at the lower end of a span go back by the forward process to its upper end, and come down.

    Errors that the chain has made contract in every pass, and with deterministic steps the noise is all added at once.
    With exact steps the distribution at every level stays what it was. The copies that a resampling leaves are
    separated by the noise that follows, also where steps are deterministic:

        process = steer.restart(process.with_rule(steer.ode()), [(0.5, 2.0, 1)])
        steer.smc(process, reward, selection=steer.resample(at=process.returns), weight=steer.difference(at=...))

    Args:
        process: a model's own GaussianProcess; guide what comes of it, not what goes in.
        spans: (low, high, times) in noise-to-signal ratio sigma / alpha, EDM's sigma; the nearest levels are taken.

    Returns:
        A process of more steps. Its `returns` are the steps that end by going back.

    Raises:
        SteerError: where a span falls on one level of the grid, or overlaps another's start.
        StateSpaceError: for another kind of process.

    Cost: as many network rows as the span has steps, each time.

    Source: Xu et al. 2023 (Restart, 2306.14878) with the process's own rule for the ODE solver.
    Differs: a span is run on the grid's own levels, not N_r new ones; the noise has the forward kernel's std, not 1.003
    times it.
    """
    if isinstance(process, SecondOrderProcess):
        return cast(Any, process.around(lambda base: restart(base, spans)))
    process, found = need_gaussian_process(process, "going back and forth", cure=_CURE), {}
    ratios = [level.sigma / level.alpha if level.alpha else math.inf for level in process.levels]
    for span in (RestartInterval(*span) for span in spans):
        if not 0.0 <= span.low < span.high or span.times < 1:
            raise SteerError(f"a restart span needs 0 <= low < high and times >= 1, got {span}")
        low, high = (min(range(len(ratios)), key=lambda k: abs(ratios[k] - r)) for r in (span.low, span.high))
        if low <= high or low in found:
            raise SteerError(
                f"{span} falls on levels {high} to {low} of the process's {process.steps} steps"
                f"{', where another begins' if low in found else ''}; expected distinct levels: take more steps, or "
                "move the span"
            )
        found[low] = (high, span.times)
    visits: list[int] = []
    for k in range(process.steps + 1):
        high, times = found.get(k, (k, 0))
        visits += [*range(high, k)] * times + [k]
    return RestartProcess(process, tuple(visits))


def recur(process: GaussianProcess, times: int) -> RestartProcess:
    """Every step taken `times` times, with the forward process's noise back up in between.

    Args:
        process: a model's own GaussianProcess.
        times: how often each step is taken; 1 changes nothing.

    Raises:
        SteerError: where `times` is below 1.
        StateSpaceError: for another kind of process.

    Cost: `times` as many network rows.
    Source: the time travel of FreeDoM (Yu et al. 2023), the recurrence of UGD and TFG.
    """
    if isinstance(process, SecondOrderProcess):
        return cast(Any, process.around(lambda base: recur(base, times)))
    process = need_gaussian_process(process, "going back and forth", cure=_CURE)
    if times < 1:
        raise SteerError(f"recurrence counts how often a step is taken and must be at least 1, got {times}")
    inner = [k for k in range(process.steps) for _ in range(times)]
    return RestartProcess(process, (*inner, process.steps))
