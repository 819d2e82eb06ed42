"""The Gaussian reverse process: what a pretrained diffusion or flow model becomes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import getattr_static
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..calls import Answer
from ..cost import Meter
from ..errors import ModelError, ShapeError, StateSpaceError, SteerError
from ..key import Key
from ..types import (
    Denoiser,
    GaussianPath,
    GaussianTransition,
    Level,
    NoiseLevels,
    ReverseProcess,
    Rule,
    RuleWithMemory,
    Schedule,
)
from . import parameterization, schedules
from .clipping import Clip
from .parameterization import checked_output
from .transitions import DDIM


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """A denoiser on a Gaussian path with a time grid: levels k = 0 (noise) to k = steps (data).

    denoiser:  E[x_0 | x_t] for x of shape [B, N, *event].
    schedule:  the path (alpha, sigma).
    times:     steps + 1 times falling to 0. The prior sits at times[0], which `repr` shows.
    event:     shape of one state.
    rule:      how steps are drawn; ancestral sampling by default.
    decoder:   states [M, *event] to what rewards see, for instance images [M, 3, H, W] in [0, 1]; None: the state.
    problems:  number of conditionings the denoiser is closed over (axis 0), None where any batch runs.
    prompts:   their texts, handed to rewards that ask for them.
    rows:      most network rows per prediction (2 under classifier-free guidance); at a level, `rows_at`.
    initial:   mean (broadcast to [B, N, *event]) and standard deviation of the prior, where a pipeline starts from
               another distribution than N(0, sigma^2): image-to-image, or a scheduler with a scale of its own.
    reference: what knows exact answers about this model (analytic models), else None.
    meter:     the ledger of the run in progress; samplers set it.
    clip:      bounds on predictions of x_0 (`steer.dynamic_clip`, or [low, high]); the chain steps by what is within.
    """

    denoiser: Denoiser
    schedule: Schedule
    times: tuple[float, ...]
    event: tuple[int, ...]
    rule: Rule = field(default_factory=DDIM)
    decoder: Callable[[Tensor], Tensor] | None = None
    problems: int | None = None
    prompts: tuple[str, ...] | None = None
    rows: int = 1
    initial: tuple[Tensor, float] | None = None
    reference: Any = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    meter: Meter | None = None
    clip: Clip | None = None

    def __post_init__(self) -> None:
        schedules.check_times(self.times)
        if not hasattr(self.rule, "std"):
            raise StateSpaceError(f"{self.rule} is no rule for a Gaussian path; use steer.ddim(eta=1.0) or another")
        if isinstance(self.rule, RuleWithMemory):
            raise StateSpaceError(
                f"{self.rule} remembers predictions, for which a GaussianProcess has no place; use "
                "process.with_rule(rule)"
            )

    def __repr__(self) -> str:
        first = self.levels[0]
        return (
            f"GaussianProcess(event={self.event}, steps={self.steps}, {self.schedule}, {self.rule}, "
            f"prior N(0, {first.sigma:.4g}^2) at t={first.t:.4g} where alpha={first.alpha:.3g})"
        )

    @property
    def levels(self) -> tuple[Level, ...]:
        """The path at every time of the grid."""
        return self._levels  # a cached_property itself is no attribute of a protocol's type to a type checker

    @cached_property
    def _levels(self) -> tuple[Level, ...]:
        return tuple(schedules.level(self.schedule, t) for t in self.times)

    @property
    def steps(self) -> int:
        """Number of transitions, and of predictions, from noise to data."""
        return len(self.times) - 1

    def prior(self, key: Key, batch: int, particles: int) -> Tensor:
        """Starting states at level 0, shape [B, N, *event]: N(0, sigma^2) unless `initial` says otherwise."""
        self.check_batch(batch)
        noise = key.normal((batch, particles, *self.event), dtype=self.dtype, device=self.device)
        mean, std = self.prior_moments
        return noise * std if mean is None else torch.add(mean.to(noise), noise, alpha=std)

    @property
    def prior_moments(self) -> tuple[Tensor | None, float]:
        """Mean of the prior, [B or 1, 1, *event] or None for zero, and its standard deviation."""
        return (None, self.levels[0].sigma) if self.initial is None else self.initial

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

    def denoise(self, x: Tensor, k: int, key: Key | None = None) -> Tensor:
        """The prediction E[x_0 | x] at level k, same shape and dtype as x. Counted by the meter.

        Args:
            key: names draws of hooks (`GuidedProcess`); a network alone draws nothing.
        """
        del key
        meter = self.meter
        if meter is None:
            return self._predict(x, k)

        def paid(x: Tensor) -> Answer:
            with meter.network(x.shape[0] * x.shape[1] * self.rows_at(k)):
                return {"x0": self._predict(x, k)}

        x0 = meter.call("denoise", k, paid, x)["x0"]
        meter.finite.prediction(x, x0, k, self.steps)
        return x0

    def rows_at(self, k: int) -> int:
        """Network rows of a prediction at level k, which a denoiser may say by its own `rows_at(t)`."""
        at = getattr(self.denoiser, "rows_at", None)
        return self.rows if at is None else at(self.times[k])

    def _predict(self, x: Tensor, k: int) -> Tensor:
        x0 = checked_output(
            self.denoiser(x.clone(), self.times[k]),  # a copy: networks may work in place
            x,
            x.shape,
            "the denoiser must return E[x_0 | x] in the shape of x, {shape} = (B, N, *event)",
        )
        # A network may write its next answer into the same memory.
        x0 = x0.clone() if x0.dtype == x.dtype else x0.to(x.dtype)
        return x0 if self.clip is None else self.clip(x0)

    def complete(self, x: Tensor, x0: Tensor) -> Tensor:
        """The prediction itself: it is a clean state."""
        return x0

    def transition(self, x: Tensor, x0: Tensor, k: int) -> GaussianTransition:
        """The distribution of the step from level k to k + 1."""
        return self.rule(x, x0, self.levels[k], self.levels[k + 1])

    def stochastic(self, k: int) -> bool:
        """Whether the step from level k adds noise."""
        return self.rule.std(self.levels[k], self.levels[k + 1]) > 0.0

    def noise(self, x: Tensor, k_from: int, k_to: int, key: Key) -> Tensor:
        """A draw of the forward process from level k_from to the noisier level k_to <= k_from."""
        if not 0 <= k_to <= k_from <= self.steps:
            raise SteerError(f"noise goes from a level to a noisier one, k_to <= k_from, got {k_from} to {k_to}")
        if k_to == k_from:
            return x
        here, there = self.levels[k_from], self.levels[k_to]
        scale = there.alpha / here.alpha
        std = math.sqrt(max(0.0, there.sigma**2 - (scale * here.sigma) ** 2))
        return torch.add(x * scale, key.at(k_to).normal(x.shape, dtype=x.dtype, device=x.device), alpha=std)

    def decode(self, x: Tensor) -> Tensor:
        """Clean states [B, N, *event] as rewards see them, (B * N, ...). Counted by the meter where it costs."""
        flat = x.flatten(0, 1)
        if self.decoder is None:
            return flat
        flat = flat.clone()  # decoders may work in place
        if self.meter is None:
            return self.decoder(flat)
        with self.meter.decoding(flat.shape[0]):
            return self.decoder(flat)

    def metered(self, meter: Meter) -> GaussianProcess:
        """This process, counting into a meter."""
        return replace(self, meter=meter)

    def only(self, problem: int) -> GaussianProcess:
        """This process conditioned on one of its problems alone; itself where it is conditioned on no more than one.

        Denoisers, and decoders that are conditioned too, say by a method `only(problem)` what they are for one problem;
        ShapeError where the denoiser has none.
        """
        if self.problems in (None, 1):
            return self
        mean, std = self.initial or (None, 1.0)
        return replace(
            self,
            denoiser=parameterization.only(self.denoiser, problem),
            decoder=parameterization.only(self.decoder, problem) if hasattr(self.decoder, "only") else self.decoder,
            problems=1,
            prompts=None if self.prompts is None else (self.prompts[problem],),
            initial=None if mean is None else (mean if len(mean) == 1 else mean[problem : problem + 1], std),
        )

    def with_rule(self, rule: Rule) -> GaussianProcess:
        """This process with another transition rule; one that remembers (`steer.second_order`) stands around it."""
        return rule.on(self) if isinstance(rule, RuleWithMemory) else replace(self, rule=rule)

    def with_times(self, times: Sequence[float]) -> GaussianProcess:
        """This process on another time grid."""
        return replace(self, times=schedules.check_times(times))

    def exact(self, reward: Any, temperature: float = 1.0) -> Any:
        """The tilted distribution p(x) exp(r(x) / temperature) in closed form; only for analytic models and rewards."""
        if self.reference is None:
            raise ModelError(
                "exact answers exist for steer.models' analytic processes only; this one has a learned denoiser"
            )
        return self.reference.exact(reward, temperature=temperature)

    def check_batch(self, batch: int) -> None:
        """Raises ShapeError where the model's conditioning does not have that many problems."""
        check_batch(self.problems, batch)


def has_levels(process: ReverseProcess) -> TypeGuard[NoiseLevels]:
    """Whether the states of a process are alpha x_0 + sigma eps at known levels."""
    return getattr_static(process, "levels", None) is not None


def is_gaussian(process: ReverseProcess) -> TypeGuard[GaussianPath]:
    """Whether a process is on a Gaussian path with a transition rule."""
    # Statically: properties are not evaluated, some of which raise where hooks have changed what they are about.
    members = ("levels", "times", "schedule", "rule", "with_rule", "prior_moments")
    return all(getattr_static(process, name, None) is not None for name in members)


def need_levels(process: ReverseProcess, what: str, *, cure: str = "use a GaussianProcess") -> NoiseLevels:
    """The process, as one whose states are alpha x_0 + sigma eps; StateSpaceError where they are not.

    Args:
        process: any reverse process.
        what: what needs it, as the subject of the message: "a look-ahead by the ODE".
        cure: what to do instead.
    """
    if has_levels(process):
        return process
    raise StateSpaceError(
        f"{what} needs states on a Gaussian path, alpha x_0 + sigma eps, got {type(process).__name__}; {cure}"
    )


def need_gaussian_process(process: ReverseProcess, what: str, *, cure: str) -> GaussianProcess:
    """The process, as a model's own GaussianProcess with nothing around it; StateSpaceError where it is another kind.

    Args:
        process: any reverse process.
        what: what needs it, as the subject of the message: "restarting".
        cure: what to do instead.
    """
    if isinstance(process, GaussianProcess):
        return process
    raise StateSpaceError(f"{what} needs a GaussianProcess, got {type(process).__name__}; {cure}")


def need_gaussian(process: ReverseProcess, what: str, *, cure: str = "use a GaussianProcess") -> GaussianPath:
    """The process, as one on a Gaussian path; StateSpaceError where it is none.

    Args:
        process: any reverse process.
        what: what needs it, as the subject of the message: "a guided proposal".
        cure: what to do instead.
    """
    if is_gaussian(process):
        return process
    raise StateSpaceError(
        f"{what} needs a process on a Gaussian path with a transition rule, got {type(process).__name__}; {cure}"
    )


def ddim_jump(x: Tensor, x0: Tensor, here: Level, there: Level) -> Tensor:
    """Where states x of level `here` are at level `there` by one deterministic (DDIM) step along the prediction x0."""
    return there.alpha * x0 + (x - here.alpha * x0) * (there.sigma / here.sigma)


def check_batch(problems: int | None, batch: int) -> None:
    """Raises ShapeError where a process conditioned on that many problems is run on another number."""
    if problems is not None and batch != problems:
        raise ShapeError(
            f"this process is conditioned on {problems} problem(s), got batch={batch}; "
            f"pass batch={problems}, or condition it on {batch} prompts or labels"
        )


def sampling_uses_network(process: ReverseProcess) -> bool:
    """Whether drawing a state may itself evaluate the network, as hooks on the prior and after steps do."""
    hooks = process.hooks
    return hooks is not None and bool(hooks.start or hooks.after)


def decode_problem(process: ReverseProcess, x: Tensor, problem: int) -> Tensor:
    """Clean states (1, n, *event) of one of a process's problems as rewards see them, (n, ...)."""
    if process.problems in (None, 1):
        return process.decode(x)
    with contextlib.suppress(ShapeError):  # where its network cannot be asked about one, its decoder knows of none
        process = process.only(problem)
    return process.decode(x)


_CONVERT_FIRST = (
    "convert the model itself before it is guided, restarted or composed; a masked process takes another masking "
    "schedule by with_times"
)
