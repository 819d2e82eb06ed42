"""The protocols everything else is written against. Axes are always (B problems, N particles, *event)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from .key import Key


class Coeffs(NamedTuple):
    """A Gaussian path x_t = alpha x_0 + sigma eps at one time, and its derivatives in t (Python floats, float64)."""

    alpha: float
    sigma: float
    d_alpha: float
    d_sigma: float


class Level(NamedTuple):
    """One point of a time grid: the time and the path there."""

    t: float
    alpha: float
    sigma: float
    d_alpha: float
    d_sigma: float


class Schedule(Protocol):
    """A Gaussian path on t in [0, 1]: t = 1 is noise, t = 0 is data (alpha = 1, sigma = 0)."""

    @property
    def start(self) -> float:
        """The largest time a chain should start from. Below 1 where the score or the drift diverges at t = 1."""
        ...

    def __call__(self, t: float) -> Coeffs: ...


class Denoiser(Protocol):
    """E[x_0 | x_t] for x of shape [B, N, *event] at a scalar t; conditioning is closed over, aligned with axis 0."""

    def __call__(self, x: Tensor, t: float) -> Tensor: ...


@dataclass(frozen=True)
class RewardSpec:
    """What a reward says of itself, in its attribute `spec`. A plain function has none and is taken as it comes.

    unit: of the scores ("nat", "kB", "cos"); None where they have none that others could be added to.
    bounds: the least and the greatest score.
    gradient: "exact" where backpropagation through the samples gives the derivative of the scores, "surrogate" where
        it gives that of something smoother, "none" where there is none (asking for one is an error), "" unsaid.
    scope: "pointwise" where a score depends on its own sample alone, "groupwise" where it depends on the others in
        the call: such a reward is no function of x, so no distribution can be tilted by it.
    prompts: whether it reads them. version: weights and preprocessing, what a cached score must match.
    """

    unit: str | None = None
    bounds: tuple[float, float] = (-inf, inf)
    gradient: Literal["exact", "surrogate", "none", ""] = ""
    scope: Literal["pointwise", "groupwise"] = "pointwise"
    prompts: bool = False
    version: str = ""


class Reward(Protocol):
    """Scores of samples [M, *event] or images [M, 3, H, W], shape [M]. Higher is better; -inf forbids a sample.

    A reward that wants the prompts of its samples names a keyword `prompts` (a sequence of M strings).
    """

    def __call__(self, samples: Tensor, /) -> Tensor: ...


@runtime_checkable
class Transition(Protocol):
    """The distribution of one step, x' given x, for every particle: shape [B, N, *event].

    Laws on a Gaussian path also have `mean`, `std` (0 for a deterministic step) and `shift(delta)`, for proposals.
    """

    @property
    def stochastic(self) -> bool:
        """Whether the step draws anything: only then does it have a density."""
        ...

    def sample(self, key: Key) -> Tensor: ...

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of x, summed over the event: [B, N], float64. NotStochasticError where nothing is drawn."""
        ...


@runtime_checkable
class GaussianTransition(Transition, Protocol):
    """A step on a Gaussian path, which proposals can move."""

    @property
    def mean(self) -> Tensor: ...

    @property
    def std(self) -> float: ...

    def shift(self, delta: Tensor) -> GaussianTransition:
        """The same distribution moved by delta."""
        ...


@runtime_checkable
class RenoisableTransition(GaussianTransition, Protocol):
    """A step that knows the distribution of scale x' + noise eps for its draws x', where it is not a plain normal."""

    def renoised(self, scale: float, noise: float) -> GaussianTransition: ...


@runtime_checkable
class KnownTails(Protocol):
    """An analytic model that knows how fast its density falls off."""

    def mode_precisions(self) -> Tensor | None:
        """Inverse covariances [K, D, D] of its modes; None where one of them has no density."""
        ...


class Rule(Protocol):
    """How a step is taken between two levels of a Gaussian path, given the prediction x0."""

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> GaussianTransition: ...

    def std(self, here: Level, there: Level) -> float:
        """The noise scale of that step, known without evaluating the network."""
        ...


@runtime_checkable
class RuleWithMemory(Rule, Protocol):
    """A rule whose steps also depend on what earlier ones predicted, and that brings a process of its own for it."""

    def on(self, process: GaussianPath) -> Any:
        """A process under this rule."""
        ...


class ReverseProcess(Protocol):
    """What a pretrained model becomes: levels k = 0 (noise) to k = steps (data) and the verbs between them."""

    @property
    def steps(self) -> int: ...

    @property
    def event(self) -> tuple[int, ...]: ...

    @property
    def problems(self) -> int | None:
        """How many problems the model is conditioned on (axis 0), or None where any number runs."""
        ...

    @property
    def prompts(self) -> Sequence[str] | None: ...

    @property
    def rows(self) -> int:
        """Network rows that one prediction costs (2 under classifier-free guidance)."""
        ...

    @property
    def meter(self) -> Any: ...

    @property
    def device(self) -> torch.device | str:
        """Where states are."""
        return "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Of states."""
        return torch.float32

    @property
    def text(self) -> Callable[[Tensor], list[str]] | None:
        """Reads states [M, *event] as M strings; None where they are not text."""
        return None

    @property
    def visits(self) -> Sequence[int]:
        """Level of the model's own grid that stands at each level k: k itself, except in chains that go back."""
        return range(self.steps + 1)

    @property
    def hooks(self) -> Any:
        """What intervenes in the chain (`steer.guidance.Hooks`); None where nothing does."""
        return None

    @property
    def prior_moments(self) -> tuple[Tensor | None, float] | None:
        """Mean of a Gaussian prior, [B or 1, 1, *event] or None for zero, and its standard deviation.

        None where the prior is not Gaussian.
        """
        return None

    def prior(self, key: Key, batch: int, particles: int) -> Tensor: ...

    def denoise(self, x: Tensor, k: int, key: Key | None = None) -> Tensor:
        """The prediction of the data from states [B, N, *event] at level k.

        key: names whatever is drawn on the way, at the slots of these states; None: a fixed key.
        """
        ...

    def complete(self, x: Tensor, x0: Tensor) -> Tensor:
        """The clean state [B, N, *event] that a prediction stands for, which rewards can score."""
        ...

    def transition(self, x: Tensor, x0: Tensor, k: int) -> Transition: ...

    def stochastic(self, k: int) -> bool: ...

    def noise(self, x: Tensor, k_from: int, k_to: int, key: Key) -> Tensor: ...

    def decode(self, x: Tensor) -> Tensor: ...

    def metered(self, meter: Any) -> ReverseProcess: ...

    def only(self, problem: int) -> ReverseProcess:
        """The process conditioned on one of its problems alone; itself where `problems` is None or 1."""
        ...


class NoiseLevels(ReverseProcess, Protocol):
    """A reverse process whose states at level k are alpha x_0 + sigma eps, however its steps are drawn.

    What scores, look-aheads and gradients in x need; `need_levels` asks for it. A `Composite` is one, and no
    `GaussianPath`: its steps come from no transition rule.
    """

    @property
    def levels(self) -> tuple[Level, ...]:
        """The path at every level k."""
        ...


class GaussianPath(NoiseLevels, Protocol):
    """A reverse process on a Gaussian path x_t = alpha x_0 + sigma eps, whose steps a transition rule draws.

    What guided proposals, hooks, MCMC on the start, minority sampling and GRPO need; `need_gaussian` asks for it.
    """

    @property
    def times(self) -> tuple[float, ...]: ...

    @property
    def schedule(self) -> Schedule: ...

    @property
    def rule(self) -> Rule: ...

    @property
    def prior_moments(self) -> tuple[Tensor | None, float]:
        """Mean of the prior, [B or 1, 1, *event] or None for zero, and its standard deviation."""
        ...

    def transition(self, x: Tensor, x0: Tensor, k: int) -> GaussianTransition: ...

    def metered(self, meter: Any) -> GaussianPath: ...

    def only(self, problem: int) -> GaussianPath: ...

    def with_rule(self, rule: Rule) -> GaussianPath: ...

    def with_times(self, times: Sequence[float]) -> GaussianPath: ...

    def exact(self, reward: Any, temperature: float = 1.0) -> Any:
        """The tilted distribution p(x) exp(r(x) / temperature) in closed form; of analytic models only."""
        ...


class QuadraticForm(NamedTuple):
    """A reward r(x) = -x'Ax/2 + b'x + c on flattened events, A [D, D], b (D,): analytic models tilt by it."""

    matrix: Tensor
    vector: Tensor
    constant: float


class Stop(Exception):
    """Raised by an `on_step` callback to end a run; the sampler returns what it has, marked interrupted."""
