"""A reverse process with hooks in it: every sampler runs on it as on any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..cost import Meter
from ..errors import NotStochasticError, StateSpaceError
from ..key import Key, as_key
from ..processes.delegation import of_base
from ..processes.gaussian import need_gaussian
from ..processes.parameterization import only as only_of
from ..processes.second_order import SecondOrderProcess
from ..types import GaussianPath, GaussianTransition, Rule, RuleWithMemory
from .hooks import Hooks, Log, extra_rows, look

WHAT = "guidance by hooks"
CURE = "guide the models of a composition, or the process without own_solver; a masked process is steered by its reward"


@dataclass(frozen=True, eq=False)
class GuidedProcess:
    """A process with hooks in its steps. What samplers target on it is the distribution of the guided chain.

    base:  the model, or a chain of it that goes back and forth (`restart`, `recur`).
    hooks: see `steer.guidance.hooks`.
    key:   names what hooks draw; None, the default: the key of the run, see `steer.guidance.hooks.hook_key`.
    log:   strength by level; every run begins its own, in `result.process.log`.

    Where mean hooks are, a prediction is [B, N, 2, *event]: what rewards see, and the displacement of the mean, which
    belongs to the same state and moves with it. `exact` and `reference` are the unguided model's.
    """

    base: GaussianPath
    hooks: Hooks
    key: Key | None = None
    log: Log = field(default_factory=Log)

    steps = of_base("steps")
    event = of_base("event")
    problems = of_base("problems")
    prompts = of_base("prompts")
    meter = of_base("meter")
    levels = of_base("levels")
    times = of_base("times")
    schedule = of_base("schedule")
    rule = of_base("rule")
    reference = of_base("reference")
    device = of_base("device")
    dtype = of_base("dtype")
    decoder = of_base("decoder")
    visits = of_base("visits")
    text = of_base("text")

    def __post_init__(self) -> None:
        need_gaussian(self.base, WHAT, cure=CURE)

    def __repr__(self) -> str:
        used = [name for name in ("start", "score", "x0", "mean", "after") if getattr(self.hooks, name)]
        return f"GuidedProcess({', '.join(used) or 'no hooks'} on {self.base})"

    @property
    def rows(self) -> int:
        """Network rows per prediction, those of hooks averaged over a chain and rounded up."""
        return self.base.rows + extra_rows(self.base, self.hooks)

    @property
    def prior_moments(self) -> tuple[Tensor | None, float]:
        if self.hooks.start:
            raise StateSpaceError(
                "a start hook changes the prior, whose moments MCMC starts would need; use one or the other"
            )
        return self.base.prior_moments

    def prior(self, key: Key, batch: int, particles: int) -> Tensor:
        x = self.base.prior(key, batch, particles)
        for i, hook in enumerate(self.hooks.start):
            x = hook(self.base, x, key.fold("start", i))
        return x

    def denoise(self, x: Tensor, k: int, key: Key | None = None) -> Tensor:
        """The guided prediction. Differentiable in x through the network; what hooks add is taken as constant."""
        looked = look(self.base, self.hooks, x, k, self.key or key, self.log)
        x0 = looked.raw + (looked.x0 - looked.raw).detach()
        return torch.stack([x0, looked.shift], 2) if self.hooks.mean else x0

    def complete(self, x: Tensor, x0: Tensor) -> Tensor:
        return x0[:, :, 0] if x0.ndim > x.ndim else x0

    def transition(self, x: Tensor, x0: Tensor, k: int) -> GaussianTransition:
        """The guided step; the unshifted one for a bare prediction of the shape of x."""
        if x0.ndim > x.ndim:
            step = self.base.transition(x, x0[:, :, 0], k).shift(x0[:, :, 1])
        else:
            step = self.base.transition(x, x0, k)
        working = [hook for hook in self.hooks.after if hook.acts(self.base, k + 1)]
        if not working:
            return step

        def apply(x: Tensor, key: Key) -> Tensor:
            inner = replace(self, hooks=replace(self.hooks, after=(), start=()), key=key.fold("after"))
            with torch.no_grad():
                for i, hook in enumerate(working):
                    x = hook(inner, x, k + 1, key.fold("after", i))
            return x

        return After(step, apply)

    def stochastic(self, k: int) -> bool:
        return self.base.stochastic(k) or any(hook.acts(self.base, k + 1) for hook in self.hooks.after)

    def noise(self, x: Tensor, k_from: int, k_to: int, key: Key) -> Tensor:
        return self.base.noise(x, k_from, k_to, key)

    def decode(self, x: Tensor) -> Tensor:
        return self.base.decode(x)

    def metered(self, meter: Meter) -> GuidedProcess:
        return replace(self, base=self.base.metered(meter), log=Log())

    def only(self, problem: int) -> GuidedProcess:
        """Conditioned on one problem alone; hooks that hold conditionings say by `only(problem)` what they are then."""
        if self.problems in (None, 1):
            return self
        kept = {
            name: tuple(only_of(h, problem) if hasattr(h, "only") else h for h in getattr(self.hooks, name))
            for name in ("start", "score", "x0", "mean", "after")
        }
        return replace(self, base=self.base.only(problem), hooks=replace(self.hooks, **kept))

    def with_rule(self, rule: Rule) -> GuidedProcess:
        """The same hooks under another transition rule."""
        return rule.on(self) if isinstance(rule, RuleWithMemory) else replace(self, base=self.base.with_rule(rule))

    def with_times(self, times: Sequence[float]) -> GuidedProcess:
        """The same hooks on another time grid."""
        return replace(self, base=self.base.with_times(times))

    def exact(self, reward: Any, temperature: float = 1.0) -> Any:
        """The tilted distribution of the unguided model."""
        return self.base.exact(reward, temperature)


def guide(process: GaussianPath, hooks: Hooks, *, key: Key | int | None = None) -> GuidedProcess:
    """The process with hooks in it, after those that it has already.

    What a sampler targets or searches on it is the distribution of the guided chain.

    Args:
        process: on a Gaussian path, also one that restarts or is guided already.
        hooks: of any method, or several added up: `a + b`.
        key: names what hooks draw in every run; None: the run's key does (or the one that the process has).

    Raises:
        StateSpaceError: where the process is on no Gaussian path with a transition rule.
    """
    if isinstance(process, SecondOrderProcess):  # hooks see noisy states; what is remembered is their prediction
        return cast(Any, process.around(lambda base: guide(base, hooks, key=key)))
    own = None if key is None else as_key(key)
    if isinstance(process, GuidedProcess):
        process, hooks, own = process.base, process.hooks + hooks, own or process.key
    return GuidedProcess(need_gaussian(process, WHAT, cure=CURE), hooks, own)


@dataclass(frozen=True, eq=False)
class After:
    """A step whose draw an after hook works on. It draws, but no density of what it draws is known."""

    step: GaussianTransition
    apply: Callable[[Tensor, Key], Tensor]

    @property
    def stochastic(self) -> bool:
        """Whether the step has a density: no."""
        return False

    @property
    def mean(self) -> Tensor:
        """Of the step, before the hook."""
        return self.step.mean

    @property
    def std(self) -> float:
        """Of the step, before the hook."""
        return self.step.std

    def sample(self, key: Key) -> Tensor:
        return self.apply(self.step.sample(key), key)

    def log_prob(self, x: Tensor) -> Tensor:
        raise NotStochasticError(
            "a step followed by an after hook (a corrector) has no density in closed form; sample "
            "with proposals that need none (steer.bootstrap), or leave the hook out"
        )

    def shift(self, delta: Tensor) -> GaussianTransition:
        del delta
        raise NotStochasticError(
            "a proposal that shifts steps is weighted by their densities, and a step followed by an after hook "
            "(a corrector) has none; use proposal=steer.bootstrap on this process"
        )
