"""The five places at which a method may intervene in a reverse process, and what it costs there.

One step of a chain at level k is: evaluate the network at x, take the step, stand at level k + 1. Hooks act

    start   on the prior's draws,                    (process, x, key) -> x
    score   on the score of p_t at x,                (step) -> score'
    x0      on the prediction E[x_0 | x],            (step) -> x0'
    mean    on the mean of the transition,           (step) -> mean'
    after   on the state that was reached,           (process, x, k, key) -> x

in this order, those of one kind one after another, each seeing what the ones before it left in `step`. A method is a
value of `Hooks`; `a + b` is both. The same value serves in two roles:

    GuidedProcess(process, hooks)                      a process like any other: every sampler runs on it, and what it
                                                       tilts or searches is what the guided chain samples;
    smc(process, reward, proposal=follow(hooks))       a proposal: weights by p / q, the model's transition over the
                                                       guided one, make any hooks exact for p(x) exp(r(x) / T).

The score, x0 and mean hooks all end as a displacement of the transition's mean, whose size in the unit of `Step.unit`
is what `Log` keeps. Displacements are constants of the state: gradients that samplers take through a guided process
pass the network and not the hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..calls import Answer
from ..core.objective import Objective, open_objective
from ..cost import Meter
from ..errors import NotDifferentiableError, ShapeError, StateSpaceError, SteerError
from ..key import Key
from ..processes.parameterization import score as score_of
from ..types import GaussianPath, Level, Reward


class Log:
    """How strongly a chain was guided, by level: a running mean and maximum of everything noted, over particles.

    "displacement" is |delta| / unit of every guided step (see `Step.unit`); hooks note more by `Step.note`. Where the
    step draws noise of that unit, displacement^2 / 2 is the KL divergence of the guided step from the model's, in nats.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int], tuple[int, Tensor, Tensor]] = {}

    def add(self, name: str, k: int, values: Tensor) -> None:
        """Notes one value per particle at level k. Reads nothing from the device."""
        values = values.detach().double()
        self._merge(name, k, values.numel(), values.sum(), values.max())

    def _merge(self, name: str, k: int, count: int, total: Tensor, most: Tensor) -> None:
        if (name, k) in self._entries:
            before, earlier, highest = self._entries[name, k]
            count, total, most = before + count, earlier + total, torch.maximum(highest, most)
        self._entries[name, k] = (count, total, most)

    def noted_so_far(self) -> list[Any]:
        """All entries, for `restore`."""
        return [[name, k, *entry] for (name, k), entry in self._entries.items()]

    def restore(self, noted: list[Any]) -> None:
        """Has the log hold what another one had noted, and nothing else."""
        self._entries = {(name, k): (count, total, most) for name, k, count, total, most in noted}

    def noted(self, k: int) -> dict[str, Tensor]:
        """What was noted at level k as named tensors, for `merge`: numbers, which stay on the CPU, sums and maxima."""
        found = {}
        for (name, at), (count, total, most) in self._entries.items():
            if at == k:
                found |= {f"count.{name}": torch.tensor(count), f"sum.{name}": total, f"max.{name}": most}
        return found

    def merge(self, noted: Mapping[str, Tensor], k: int) -> None:
        """Adds what another log noted at level k."""
        for name in (entry.removeprefix("count.") for entry in noted if entry.startswith("count.")):
            self._merge(name, k, int(noted[f"count.{name}"]), noted[f"sum.{name}"], noted[f"max.{name}"])

    def table(self, name: str = "displacement") -> dict[int, tuple[float, float]]:
        """Level -> (mean, maximum) of what was noted under a name."""
        entries = sorted((k, entry) for (noted, k), entry in self._entries.items() if noted == name)
        return {k: (float(total) / count, float(most)) for k, (count, total, most) in entries}

    @property
    def names(self) -> list[str]:
        """What was noted."""
        return sorted({name for name, _ in self._entries})


@dataclass(frozen=True, eq=False)
class Step:
    """A population about to step from level k, as hooks see it. Shapes [B, N, *event].

    process: the model, unguided and metered: whatever a hook evaluates on it is in the ledger.
    x:       the states; they require a gradient where `Hooks.through` asks for it.
    raw:     the network's prediction at x, with its graph in that case.
    x0:      the prediction as hooks have left it so far, detached.
    shift:   what mean hooks have added to the mean so far.
    key:     names this hook's draws, see `hook_key`; it stands at step k.
    opened:  potentials asked so far in this step.
    """

    process: GaussianPath
    x: Tensor
    k: int
    raw: Tensor
    x0: Tensor
    shift: Tensor
    key: Key
    log: Log
    opened: dict[int, Objective] = field(default_factory=dict)

    @property
    def here(self) -> Level:
        """The path at this level."""
        return self.process.levels[self.k]

    @property
    def there(self) -> Level:
        """The path where the step leads."""
        return self.process.levels[self.k + 1]

    @property
    def std(self) -> float:
        """Noise of the transition; 0 where it is deterministic."""
        return self.process.rule.std(self.here, self.there)

    @property
    def unit(self) -> float:
        """What displacements are measured in: the std of the transition, of the ancestral one where it has none.

        0 in a step to sigma = 0, where nothing is measured.
        """
        return self.std or ancestral_std(self.here, self.there)

    @property
    def coefficient(self) -> float:
        """How far the mean of the step moves when the prediction moves by 1: see `coefficient`."""
        return coefficient(self.here, self.there, self.std)

    @property
    def score(self) -> Tensor:
        """The score of p_t that goes with x0."""
        return score_of(self.x.detach(), self.x0, self.here)

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the transition that goes with x0, and what mean hooks have added to it."""
        return self.process.transition(self.x.detach(), self.x0, self.k).mean + self.shift

    def value(self, reward: Reward | Callable[..., Any], clean: Tensor) -> Tensor:
        """Scores [B, N] of clean states, through the decoder, checked and counted like every reward's."""
        if id(reward) not in self.opened:  # alive while a hook holds it, which is longer than a step
            self.opened[id(reward)] = replace(open_objective(self.process, reward)[1], process=self.process)
        return self.opened[id(reward)](clean)

    def gradient(self, value: Tensor) -> Tensor:
        """Gradient of a sum of values [B, N] with respect to the states, through the network. Counted."""
        check_attached(value)
        if not self.x.requires_grad:
            raise NotDifferentiableError("a hook that differentiates through the network is in Hooks(through=True)")
        meter, rows = self.process.meter, self.x.shape[0] * self.x.shape[1] * self.process.rows
        assert meter is not None
        with meter.gradient(rows):
            return torch.autograd.grad(value.sum(), self.x, retain_graph=True)[0]

    def climb(self, potential: Callable[[Tensor], Tensor], clean: Tensor) -> tuple[Tensor, Tensor]:
        """A function of clean states [B, N, *event] and its gradient there; the network is not involved."""
        with torch.enable_grad():
            clean = clean.detach().clone().requires_grad_()
            value = potential(clean)
            check_attached(value)
            return value.detach(), torch.autograd.grad(value.sum(), clean)[0]

    def note(self, name: str, values: Tensor) -> None:
        """Puts one value per particle into the log."""
        self.log.add(name, self.k, values)


def check_attached(value: Tensor) -> None:
    """Raises NotDifferentiableError where values have no gradient."""
    if not value.requires_grad:
        raise NotDifferentiableError(
            "guidance follows the gradient of its potential, which came without one (it detaches, uses no_grad, or is "
            "not a torch function); give a differentiable one, or steer by a method that needs no gradient"
        )


def ancestral_std(here: Level, there: Level) -> float:
    """The noise of the ancestral step between two levels, whatever the rule."""
    kept = (here.alpha * there.sigma / (there.alpha * here.sigma)) ** 2
    return there.sigma * math.sqrt(max(0.0, 1.0 - kept))


def coefficient(here: Level, there: Level, std: float) -> float:
    """d mean / d x0 = alpha' - alpha sqrt(sigma'^2 - std^2) / sigma, of a rule that keeps marginals."""
    return there.alpha - here.alpha * math.sqrt(max(0.0, there.sigma**2 - std**2)) / here.sigma


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of every particle's event, [B, N], float64."""
    return x.detach().double().flatten(2).norm(dim=2)


Hook = Callable[[Step], Tensor]
"""step -> the score of p_t, the prediction x0 or the mean of the transition as the hook leaves it, [B, N, *event]."""
StartHook = Callable[[GaussianPath, Tensor, Key], Tensor]
"""(process, the prior's draws x [B, N, *event], key) -> the states that chains begin from, [B, N, *event]."""


class AfterHook(Protocol):
    """Works on the state that a step has reached, for instance by Langevin steps (`corrector`)."""

    def acts(self, process: GaussianPath, k: int) -> bool:
        """Whether it does anything, and draws, at level k."""
        ...

    def __call__(self, process: Any, x: Tensor, k: int, key: Key) -> Tensor:
        """The state at level k to go on from. process: guided by everything but the after hooks."""
        ...


@dataclass(frozen=True)
class Hooks:
    """A method, as what it does at the five places. Tuples are applied in order; `a + b` appends b's.

    through: whether some hook differentiates through the network (one backward row per network row and step, more
             only if it asks for more than one gradient).
    extra:   network rows per particle that the hooks add to one whole chain, given the process: budgets count them.
    """

    start: tuple[StartHook, ...] = ()
    score: tuple[Hook, ...] = ()
    x0: tuple[Hook, ...] = ()
    mean: tuple[Hook, ...] = ()
    after: tuple[AfterHook, ...] = ()
    through: bool = False
    extra: tuple[Callable[[GaussianPath], int], ...] = ()

    def __add__(self, other: Hooks) -> Hooks:
        return Hooks(
            self.start + other.start,
            self.score + other.score,
            self.x0 + other.x0,
            self.mean + other.mean,
            self.after + other.after,
            self.through or other.through,
            self.extra + other.extra,
        )


class HookedPrediction(NamedTuple):
    """One evaluation of the network and of the hooks: prediction without and with them, and the mean's own shift."""

    raw: Tensor
    x0: Tensor
    shift: Tensor

    def displacement(self, c: float) -> Tensor:
        """Of the transition's mean, all hooks together."""
        return c * (self.x0 - self.raw) + self.shift


def hook_key(key: Key | None) -> Key:
    """The key of hooks' draws at a prediction, from the one that `denoise` was called with.

    Runs pass their own, shifted to the slots of a chunk. Runs of different keys thus share no hook noise, and runs of
    one key do not depend on the chunk. Two predictions of a run at one level and slot share their draws. In a tree a
    slot is a simulation's; simulations that are packed into one call, and the chains of `search.rbf` and
    `search.depth_first`, which meet in one, are named by their place in it, which depends on the batch (and on the
    chunk). Predictions without a key are named by Key(0): made again, they are the same.
    """
    return (key or Key(0)).fold("guidance")


def look(process: GaussianPath, hooks: Hooks, x: Tensor, k: int, key: Key | None, log: Log) -> HookedPrediction:
    """The prediction at level k and what the score, x0 and mean hooks make of it. One network row per particle."""
    if process.meter is None:
        process = process.metered(Meter())
    own = Log()

    def paid(x: Tensor) -> Answer:
        return _look(process, hooks, x, k, key, own)._asdict() | own.noted(k)

    answer = process.meter.call("guided", k, paid, x)
    log.merge(answer, k)
    return HookedPrediction(answer["raw"], answer["x0"], answer["shift"])


def _look(process: GaussianPath, hooks: Hooks, x: Tensor, k: int, key: Key | None, log: Log) -> HookedPrediction:
    base = hook_key(key).at(k)
    followed = torch.is_grad_enabled() and x.requires_grad
    with torch.set_grad_enabled(followed or hooks.through):
        # Copies, here and of the prediction: hooks may write to what they see.
        state = x.clone() if followed or not hooks.through else x.detach().clone().requires_grad_()
        raw = process.denoise(state, k, key)
        seen = raw.clone()
    if raw.shape != x.shape:
        raise StateSpaceError(
            f"hooks work on predictions of the shape of the states, {tuple(x.shape)}, got {tuple(raw.shape)} from "
            f"{type(process).__name__}; where it is guided by mean hooks already, put all hooks into the "
            "proposal, or into the process (guide)"
        )
    at = Step(process, state, k, seen, raw.detach().clone(), torch.zeros_like(x), base, log)
    with torch.set_grad_enabled(hooks.through):
        for i, hook in enumerate(hooks.score):
            if at.here.alpha > 0.0:  # else no score determines a prediction
                at = replace(at, key=base.fold("score", i))
                change = checked(hook(at), x, "score") - at.score
                at = replace(at, x0=at.x0 + change * (at.here.sigma**2 / at.here.alpha))
        for i, hook in enumerate(hooks.x0):
            at = replace(at, key=base.fold("x0", i))
            at = replace(at, x0=checked(hook(at), x, "x0"))
        for i, hook in enumerate(hooks.mean):
            at = replace(at, key=base.fold("mean", i))
            at = replace(at, shift=at.shift + (checked(hook(at), x, "mean") - at.mean))
    looked = HookedPrediction(raw if followed else raw.detach(), at.x0, at.shift)
    if at.unit > 0.0:
        log.add(
            "displacement",
            k,
            norms(HookedPrediction(raw.detach(), at.x0, at.shift).displacement(at.coefficient)) / at.unit,
        )
    return looked


def checked(found: Tensor, x: Tensor, name: str) -> Tensor:
    """What a hook returned, detached; ShapeError where it has another shape than the states."""
    if found.shape != x.shape:
        raise ShapeError(f"a {name} hook returns (B, N, *event) = {tuple(x.shape)}, got {tuple(found.shape)}")
    return found.detach().to(x.dtype, copy=True)  # a hook may return memory that it, or the step, writes to again


def extra_rows(process: GaussianPath, hooks: Hooks) -> int:
    """Network rows per particle and step that the hooks add, averaged over a chain and rounded up."""
    added = sum(count(process) for count in hooks.extra)
    if added < 0:
        raise SteerError(f"hooks cannot cost less than nothing, got {added} extra rows per chain")
    return -(-added // process.steps)
