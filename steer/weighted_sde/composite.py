"""Products of powers of models: annealing, products of experts and guidance as one target on one path."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..cost import Meter
from ..errors import ModelError, StateSpaceError, SteerError
from ..key import Key
from ..processes.gaussian import GaussianProcess
from ..processes.transitions import Normal
from ..types import KnownTails, Level
from .step_integrals import span

Exponents = Callable[[Level], Sequence[float]]
"""Exponent of every component at a level of the path."""


@dataclass(frozen=True, eq=False)
class Composite:
    """The path of distributions prod_i q_i(x)^a_i, where q_i is component i's marginal at each level. A ReverseProcess.

    components: processes on one schedule, time grid and event shape. The first decodes and knows the prompts.
    exponents:  a_i by level; their sum A must be positive.
    meter:      counts the cost of the run in progress.

    A power A of a noised distribution is noised by A times less variance: the prior is N(0, sigma^2 / A), and the
    prediction of the data is the average sum_i a_i x0_i / A, for which the path's score is A (alpha x0 - x) / sigma^2.
    """

    components: tuple[GaussianProcess, ...]
    exponents: Exponents
    meter: Meter | None = field(default=None)

    def __post_init__(self) -> None:
        first = self.components[0]
        for other in self.components[1:]:
            if (other.schedule, other.times, other.event) != (first.schedule, first.times, first.event):
                raise ModelError(
                    "components of a composite need one schedule, one time grid and one event shape, got "
                    f"{first} and {other}; steer.convert(process, schedule, times) moves a model to another path"
                )
            if other.problems is not None and first.problems is not None and other.problems != first.problems:
                raise ModelError(
                    f"components are conditioned on {first.problems} and {other.problems} problems; they must agree"
                )
        if not min(self.total(k) for k in range(self.steps + 1)) > 0.0:
            raise SteerError(
                "exponents of a composite must sum to more than 0 at every level, or the product has no finite "
                f"integral; at the data they are {tuple(self.at(self.steps))}"
            )

    def __repr__(self) -> str:
        powers = " x ".join(f"q{i}^{a:.4g}" for i, a in enumerate(self.at(self.steps)))
        return f"Composite({powers}, {self.components[0]})"

    @property
    def levels(self) -> tuple[Level, ...]:
        return self.components[0].levels

    @property
    def steps(self) -> int:
        return self.components[0].steps

    @property
    def event(self) -> tuple[int, ...]:
        return self.components[0].event

    @property
    def dtype(self) -> torch.dtype:
        return self.components[0].dtype

    @property
    def device(self) -> torch.device | str:
        return self.components[0].device

    @property
    def text(self) -> None:
        """None: states are not text."""
        return None

    @property
    def visits(self) -> Sequence[int]:
        """Every level once, in order."""
        return range(self.steps + 1)

    @property
    def hooks(self) -> None:
        """None: nothing intervenes in the chain."""
        return None

    @property
    def problems(self) -> int | None:
        return next((c.problems for c in self.components if c.problems is not None), None)

    @property
    def prompts(self) -> tuple[str, ...] | None:
        return self.components[0].prompts

    @property
    def rows(self) -> int:
        """Network rows of one prediction: the sum over components."""
        return sum(component.rows for component in self.components)

    @cached_property
    def varying(self) -> bool:
        """Whether an exponent changes along the path."""
        return any(tuple(self.at(k)) != tuple(self.at(0)) for k in range(self.steps + 1))

    def at(self, k: int) -> Sequence[float]:
        """Exponents at level k."""
        exponents = self.exponents(self.levels[k])
        if len(exponents) != len(self.components):
            raise SteerError(f"expected {len(self.components)} exponents, one per component, got {len(exponents)}")
        return exponents

    def total(self, k: int) -> float:
        """A, the sum of the exponents at level k."""
        return math.fsum(self.at(k))

    def prior(self, key: Key, batch: int, particles: int) -> Tensor:
        """Starting states N(0, sigma^2 / A), [B, N, *event]."""
        for component in self.components:
            component.check_batch(batch)
        if self.components[0].initial is not None and self.total(0) != 1.0:
            raise ModelError(
                "this process starts from a distribution of its own, and powers of it are not known: only exponents "
                f"that sum to 1 can start there, got {self.total(0):.4g}; dataclasses.replace(process, initial=None) "
                "starts from its path's own N(0, sigma^2) instead"
            )
        return self.components[0].prior(key, batch, particles) / math.sqrt(self.total(0))

    @property
    def prior_moments(self) -> tuple[Tensor | None, float]:
        """Mean of the prior, None for zero, and its standard deviation."""
        mean, std = self.components[0].prior_moments
        return mean, std / math.sqrt(self.total(0))

    @property
    def log_prior_mass(self) -> float:
        """Log of the integral of prod_i N(x; 0, sigma^2)^a_i, the path's normalizing constant at level 0."""
        total, size = self.total(0), math.prod(self.event)
        log_scale = math.log(2.0 * math.pi * self.levels[0].sigma ** 2)
        return 0.5 * size * ((1.0 - total) * log_scale - math.log(total))

    def predict(self, x: Tensor, k: int, key: Key | None = None) -> list[Tensor]:
        """Every component's E[x_0 | x] at level k."""
        return [component.denoise(x, k, key) for component in self.components]

    def average(self, predictions: Sequence[Tensor], k: int) -> Tensor:
        """sum_i a_i x0_i / A of the components' predictions."""
        if len(predictions) == 1:
            return predictions[0]
        total = self.total(k)
        return torch.stack([p * (a / total) for p, a in zip(predictions, self.at(k), strict=True)]).sum(0)

    def denoise(self, x: Tensor, k: int, key: Key | None = None) -> Tensor:
        """The composite's prediction of the data at level k."""
        return self.average(self.predict(x, k, key), k)

    def score(self, x: Tensor, x0: Tensor, k: int) -> Tensor:
        """Score that a prediction x0 implies, of one component or (times A) of the composite's average."""
        here = self.levels[k]
        return torch.sub(here.alpha * x0, x) / here.sigma**2

    def complete(self, x: Tensor, x0: Tensor) -> Tensor:
        """The prediction itself: it is a clean state."""
        return x0

    def transition(self, x: Tensor, x0: Tensor, k: int) -> Normal:
        """A step of the unweighted sampler: what guidance and annealing do without correction.

        As `transitions.DDIM(1)` where A = 1. At the last step, the prediction.
        """
        if not self.stochastic(k):
            return Normal(x0, 0.0)
        step, pull = span(self.levels[k], self.levels[k + 1], 0.0), 2.0 * self.total(k)
        drift = self.score(x, x0, k) * (0.5 * pull * step.drift(pull))
        return Normal((x + drift) / step.ratio, math.sqrt(step.noise(pull, 1.0)) / step.ratio)

    def stochastic(self, k: int) -> bool:
        return self.levels[k + 1].sigma > 0.0

    def noise(self, x: Tensor, k_from: int, k_to: int, key: Key) -> Tensor:
        return self.components[0].noise(x, k_from, k_to, key)

    def decode(self, x: Tensor) -> Tensor:
        return self.components[0].decode(x)

    def metered(self, meter: Meter) -> Composite:
        return replace(self, components=tuple(c.metered(meter) for c in self.components), meter=meter)

    def only(self, problem: int) -> Composite:
        """The composite conditioned on one of its problems alone."""
        return replace(self, components=tuple(component.only(problem) for component in self.components))

    def normalisable(self) -> bool | None:
        """Whether the target has a finite normalizing constant; None where it is not known (learned models).

        Every exponent >= 0 suffices where A >= 1. With a negative one the sum of a_i times the precisions decides, for
        analytic mixtures taken over their modes: in each direction the slowest tails must win.
        """
        exponents = self.at(self.steps)
        if min(exponents) >= 0.0:
            return True
        models = [component.reference for component in self.components]
        tails = [m.mode_precisions() if isinstance(m, KnownTails) else None for m in models]
        known = [tail for tail in tails if tail is not None]
        if len(known) < len(models):
            return None
        precisions = [a * tail for a, tail in zip(exponents, known, strict=True)]
        pull = [p for p, a in zip(precisions, exponents, strict=True) if a > 0.0]
        push = [p for p, a in zip(precisions, exponents, strict=True) if a < 0.0]
        repulsions = [torch.stack(modes).sum(0) for modes in itertools.product(*push)]
        return all(
            any(
                bool((torch.linalg.eigvalsh(torch.stack(modes).sum(0) + repulsion) > 0).all())
                for repulsion in repulsions
            )
            for modes in itertools.product(*pull)
        )


def compose(
    process: GaussianProcess | Sequence[GaussianProcess] | Composite,
    *,
    exponent: float | Sequence[float] | Exponents = 1.0,
    unconditional: GaussianProcess | None = None,
    guidance: float | None = None,
) -> Composite:
    """The composite that annealing, products and guidance ask for: prod_i q_i(x)^a_i along a path.

    Args:
        process: one process, several (their product), or a Composite, returned as it is.
        exponent: of every component: a number for all, one each, or a function of the Level that gives one each.
        unconditional: with guidance w, the target is unconditional^(1 - w) process^w, raised to `exponent`.
        guidance: w, given with `unconditional`.

    Returns:
        A reverse process for `steer.fkc`, and for every other sampler. Grids that start at pure noise (alpha = 0, as
        flow pipelines' do) start at `schedule.start` instead: at alpha = 0 the path has no finite drift.

    Raises:
        StateSpaceError: for parts that are no GaussianProcess, whose noised distributions are not known.
        ModelError: for components on different paths or grids.
        SteerError: for exponents that do not fit, or do not sum to more than 0.

    Cost: the network rows of one prediction are the sum over components.
    """
    if isinstance(process, Composite):
        if exponent != 1.0 or unconditional is not None or guidance is not None:
            raise SteerError("a Composite has its exponents already: leave exponent, unconditional and guidance out")
        return process
    for part in process if isinstance(process, Sequence) else (process,):
        if not isinstance(part, GaussianProcess):
            raise StateSpaceError(
                "powers and products are taken of the noised distributions of a GaussianProcess, which are not known "
                f"of a {type(part).__name__}; steer.smc runs on any process, and proposal=steer.follow(hooks) guides it"
            )
    components = tuple(map(_below_pure_noise, (process,) if isinstance(process, GaussianProcess) else process))
    if (unconditional is None) != (guidance is None):
        raise SteerError("unconditional= and guidance= go together: the target is unconditional^(1 - w) process^w")
    if unconditional is not None and guidance is not None:
        if len(components) != 1 or not isinstance(exponent, int | float):
            raise SteerError("guidance takes one process and one number as exponent; build a steer.Composite for more")
        components = (_below_pure_noise(unconditional), *components)
        exponent = (exponent * (1.0 - guidance), exponent * guidance)
    if callable(exponent):
        return Composite(components, exponent)
    fixed = (float(exponent),) * len(components) if isinstance(exponent, int | float) else tuple(map(float, exponent))
    if len(fixed) != len(components):
        raise SteerError(f"expected {len(components)} exponents, one per process, got {len(fixed)}")
    return Composite(components, _Fixed(fixed))


@dataclass(frozen=True)
class _Fixed:
    """The same exponents at every level. A class, since processes go to other processes by pickle."""

    exponents: tuple[float, ...]

    def __call__(self, level: Level) -> tuple[float, ...]:
        return self.exponents


def _below_pure_noise(process: GaussianProcess) -> GaussianProcess:
    """The process from the largest time at which its path's coefficients are finite."""
    start = process.schedule.start
    if process.levels[0].alpha > 0.0 or process.steps == 1 or not process.times[1] < start < process.times[0]:
        return process
    return process.with_times((start, *process.times[1:]))
