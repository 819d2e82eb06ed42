"""A population of particles partway from noise to data, as an immutable value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import ShapeError, SteerError
from ..key import Key
from ..processes.second_order import noisy, state_shape
from ..types import ReverseProcess, Transition
from . import population

Fields = TypeVar("Fields", bound="ParticleFields")


class ResamplingRecord(NamedTuple):
    """Particles were rearranged at level k: particle m came from parent[:, m].

    happened: in which problems, [B]. independent: whether the ancestors were independent draws by weight.
    """

    k: int
    parent: Tensor
    happened: Tensor
    independent: bool = False


class StepRecord(NamedTuple):
    """A step from level k: the state before it and the log-densities, [B, N], of the state that was drawn.

    log_prob: under the model's own transition. log_behaviour: under what drew it (guided proposals differ). Both are
    None for a step without noise.
    """

    k: int
    x: Tensor
    log_prob: Tensor | None
    log_behaviour: Tensor | None


class LevelRecord(NamedTuple):
    """What a sampler saw at level k: the ESS of accumulated weights [B] and the scores [B, N] it weighted by."""

    k: int
    ess: Tensor
    score: Tensor


class ParticleFields:
    """Tensors [B, N, ...] by field, each None where it is not there; `extra` holds what third parties name."""

    def map(self: Fields, f: Callable[..., Tensor], *others: Fields) -> Fields:
        """The same fields, every tensor replaced by f of it (and of those in its place in others)."""
        kept: dict[str, Any] = {}
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor):
                kept[name] = f(value, *(other.__dict__[name] for other in others))
            elif isinstance(value, Mapping) and value:
                kept[name] = {key: f(each, *(o.__dict__[name][key] for o in others)) for key, each in value.items()}
            else:
                kept[name] = value
        new = object.__new__(type(self))
        object.__setattr__(new, "__dict__", kept)
        return new

    def tensors(self) -> dict[str, Tensor]:
        """What is there, by name; names in `extra` beside the fields."""
        own = {name: value for name, value in self.__dict__.items() if isinstance(value, Tensor)}
        return {**own, **self.__dict__["extra"]}

    def replace(self: Fields, **changes: Any) -> Fields:
        """With other values of some fields. A name that is no field goes to `extra`."""
        # dataclasses.replace, which rebuilds a frozen value field by field, took a fifth of a cheap step.
        new = object.__new__(type(self))
        kept = {**self.__dict__}
        for name, value in changes.items():
            if name in kept:
                kept[name] = value
            else:
                kept["extra"] = {**kept["extra"], name: value}
        object.__setattr__(new, "__dict__", kept)
        return new


@dataclass(frozen=True, eq=False)
class StepCache(ParticleFields):
    """What was computed at the present states and serves the next step; it ends when the particles move.

    x0:           the prediction, [B, N, ...].
    score:        reward of the prediction, or of the state itself at the last level, [B, N].
    gradient:     of r(x0_hat) / temperature, [B, N, *event], for proposals.
    displacement: of the transition's mean, [B, N, *event], by hooks that propose.
    components:   scores of a composite's models, [B, N, I, D].
    push, direction: of a weighted SDE's next step, [B, N, D].
    noise:        that the states were made with, [B, N, *event], in a search over noise.
    extra:        what a proposal of yours wants to find at its state, by names of its own.
    """

    x0: Tensor | None = None
    score: Tensor | None = None
    gradient: Tensor | None = None
    displacement: Tensor | None = None
    components: Tensor | None = None
    push: Tensor | None = None
    direction: Tensor | None = None
    noise: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PathState(ParticleFields):
    """What a particle's path remembers; it travels with the particle, and copies inherit it.

    log_potential: what potentials (and steps of a weighted SDE) have multiplied into the weight so far, [B, N]; None
                   before the first.
    final_applied: whether r(x_0) / temperature is in it: to resume from there would count the reward twice.
    exponent:      of the tempered value, [B, N]; None without tempering.
    highest, summed: maximum and sum of the values so far, [B, N].
    value:         of the last choice of a search, [B, N].
    log_q:         log-densities of a composite's models along the path, [B, N, I].
    clock, deadline: of birth-death processes, [B, N].
    driving_noise: by name, the noise of the start and of every step so far, [B, N, *event], from which MCMC moves
                   replay a path.
    extra:         what a potential of yours remembers, by names of its own.
    """

    log_potential: Tensor | None = None
    final_applied: bool = False
    exponent: Tensor | None = None
    highest: Tensor | None = None
    summed: Tensor | None = None
    value: Tensor | None = None
    log_q: Tensor | None = None
    clock: Tensor | None = None
    deadline: Tensor | None = None
    driving_noise: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def log_potential_or_zero(self, like: Tensor) -> Tensor:
        """What potentials have multiplied in so far, 0 before the first: [B, N], as `like`."""
        return torch.zeros_like(like) if self.log_potential is None else self.log_potential


def required(tensor: Tensor | None) -> Tensor:
    """A cached tensor that the step before has put there."""
    assert tensor is not None
    return tensor


EMPTY_CACHE, NEW_PATH = StepCache(), PathState()


def check_state_shape(process: ReverseProcess, x: Tensor, k: int) -> None:
    """Raises ShapeError where states x are not [B, N, ...] as those of the process at level k are."""
    shape = state_shape(process, k)
    if x.ndim < 2 or tuple(x.shape[2:]) != shape:
        beside = "" if shape == tuple(process.event) else f", and what they remember beside them: {('B', 'N', *shape)}"
        raise ShapeError(
            f"states must have shape (B, N, *event) with event {tuple(process.event)}{beside}, got {tuple(x.shape)}"
        )


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Particles of B problems at level k. Every verb returns a new Trajectory.

    process:      what moves it.
    x:            states, [B, N, *event]; [B, N, 2, *event] on the way where steps remember (`steer.second_order`).
    k:            level, 0 = noise, process.steps = data.
    log_weight:   accumulated since the last resampling, [B, N] float64, not normalised.
    log_evidence: log of the evidence collected at resamplings, [B] float64.
    cache:        what was computed at these states: predictions, gradients. Ends with the next step.
    path:         what each particle's path remembers: statistics of the values seen so far.
    past:         what happened, oldest first: rearrangements always, steps where `keep_states`.
    keep_states:  whether steps remember states and densities (memory: one population per step).
    diagnostics:  what the start or the sampler measured of itself, [B] each: acceptance, step size, split R-hat.
    moved:        whether MCMC has replaced whole paths, after which ancestors do not say where particles come from.
    biased_start: whether it began where no weight corrects for: in the best of many draws, or at chosen latents.
    """

    process: ReverseProcess
    x: Tensor
    k: int
    log_weight: Tensor
    log_evidence: Tensor
    cache: StepCache = EMPTY_CACHE
    path: PathState = NEW_PATH
    past: tuple[ResamplingRecord | StepRecord, ...] = ()
    keep_states: bool = False
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)
    moved: bool = False
    biased_start: bool = False

    @classmethod
    def begin(cls, process: ReverseProcess, x: Tensor, *, k: int = 0, keep_states: bool = False) -> Trajectory:
        """A population of equal weights at states x [B, N, *event] of level k."""
        check_state_shape(process, x, k)
        weight = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device)
        return cls(process, x, k, weight, torch.zeros_like(weight[:, 0]), keep_states=keep_states)

    def __repr__(self) -> str:
        problems, particles = self.x.shape[:2]
        return f"Trajectory({problems} problems x {particles} particles at level {self.k} of {self.process.steps})"

    @cached_property
    def log_total(self) -> Tensor:
        """Log of the sum of the weights carried, [B]; -inf where all are zero."""
        return population.log_sum_exp(self.log_weight)

    @property
    def log_normaliser(self) -> Tensor:
        """Estimate of log Z so far: evidence collected plus the mean of the weights carried, [B]."""
        return self.log_evidence + (self.log_total - math.log(self.log_weight.shape[1]))

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the weights carried, [B]; NaN where all are zero."""
        return population.ess(self.log_weight)

    def copied(self) -> Trajectory:
        """The same population in memory of its own. What `past` remembers is shared: read it, never write to it."""
        return self._with(
            x=self.x.clone(),
            log_weight=self.log_weight.clone(),
            log_evidence=self.log_evidence.clone(),
            cache=self.cache.map(torch.clone),
            path=self.path.map(torch.clone),
            diagnostics={name: value.clone() for name, value in self.diagnostics.items()},
        )

    def reset_weights(self) -> Trajectory:
        """The same states, with what is cached at them, as a population that begins here: weights of one, no past."""
        weight = torch.zeros_like(self.log_weight)
        evidence = torch.zeros_like(self.log_evidence)
        return self._with(log_weight=weight, log_evidence=evidence, path=NEW_PATH, past=(), diagnostics={}, moved=False)

    def with_step_cache(self, **tensors: Tensor | None) -> Trajectory:
        """With fields of `StepCache` set, [B, N, ...]; they move with their particles until the next step."""
        return self._with(cache=self.cache.replace(**tensors))

    def without_cache(self) -> Trajectory:
        """With nothing kept of what was computed at its states."""
        return self._with(cache=EMPTY_CACHE)

    def with_path_state(self, **changes: Any) -> Trajectory:
        """With fields of `PathState` set; tensors are [B, N, ...] and stay for the rest of the path."""
        return self._with(path=self.path.replace(**changes))

    def reweight(self, log_increment: Tensor, **path: Any) -> Trajectory:
        """With log-weights [B, N] multiplied in, and what the path is to remember of it (fields of `PathState`)."""
        state = self.path.replace(**path) if path else self.path
        return self._with(log_weight=self.log_weight + log_increment, path=state)

    def resample(self, ancestors: Tensor, where: Tensor | None = None, *, independent: bool = False) -> Trajectory:
        """With particles replaced by copies of their ancestors [B, M], in the problems [B] `where` is true.

        There the mean weight moves into the evidence and weights start again from 1; elsewhere nothing changes.
        independent: whether the ancestors are independent draws by weight, as those of `multinomial` are.
        """
        if where is not None and ancestors.shape != self.log_weight.shape:
            raise ShapeError(
                f"resampling only some problems keeps N: ancestors must have shape {tuple(self.log_weight.shape)}, got "
                f"{tuple(ancestors.shape)}"
            )
        evidence = self.log_normaliser
        if where is None:
            where = torch.ones_like(evidence, dtype=torch.bool)
            weight = torch.zeros_like(ancestors, dtype=torch.float64)
        else:
            chosen = where[:, None]
            ancestors = torch.where(chosen, ancestors, population.positions(ancestors.shape[1], 1, ancestors.device))
            weight = self.log_weight.masked_fill(chosen, 0.0)
            evidence = torch.where(where, evidence, self.log_evidence)
        return self._take(ancestors, where, weight, independent)._with(log_evidence=evidence)

    def branch(self, copies: int) -> Trajectory:
        """With every particle repeated `copies` times side by side; weights are those of the parents."""
        index = torch.arange(self.x.shape[1], device=self.x.device).repeat_interleave(copies)
        return self.select(index.expand(self.x.shape[0], -1))

    def select(self, index: Tensor) -> Trajectory:
        """With the particles at index [B, M] only, weights kept: for searches, which claim no distribution."""
        everywhere = torch.ones_like(self.log_evidence, dtype=torch.bool)
        return self._take(index, everywhere, self.log_weight.gather(1, index))

    def step(self, transition: Transition, key: Key, *, model: Transition | None = None) -> Trajectory:
        """One level on, drawn from a transition. What was cached ends here: it belongs to the states left behind.

        model: the model's own transition where `transition` is another proposal; the log-weight then gains
        log model(x') - log transition(x').
        """
        x = transition.sample(key.at(self.k))
        weight, past = self.log_weight, self.past
        if self.keep_states or model is not None:
            log_prob = log_behaviour = None
            if transition.stochastic:
                log_behaviour = transition.log_prob(x)
                log_prob = log_behaviour if model is None else model.log_prob(x)
                weight = weight if model is None else weight + (log_prob - log_behaviour)
            if self.keep_states:
                past = (*past, StepRecord(self.k, self.x, log_prob, log_behaviour))
        return self._with(x=x, k=self.k + 1, log_weight=weight, cache=EMPTY_CACHE, past=past)

    def moved_to(self, x: Tensor) -> Trajectory:
        """One level on at given states [B, N, *event]; neither they nor their densities are remembered."""
        return self._with(x=x, k=self.k + 1, cache=EMPTY_CACHE)

    def renoise(self, k: int, key: Key) -> Trajectory:
        """Back at the noisier level k, by the forward process. Lineage stays; states of the past no longer connect."""
        return self._with(x=self.process.noise(self.x, self.k, k, key), k=k, cache=EMPTY_CACHE)

    def ancestor(self, lag: int | None = None) -> Tensor:
        """Index [B, N] of each particle's ancestor `lag` rearrangements ago; None for the start."""
        parents = [event.parent for event in self.past if isinstance(event, ResamplingRecord)]
        return population.ancestors(parents if lag is None else parents[len(parents) - lag :], self.log_weight)

    @property
    def root(self) -> Tensor:
        """Index of each particle's ancestor at the start, [B, N]."""
        return self.ancestor()

    def lineages(self) -> Iterator[tuple[StepRecord, Tensor]]:
        """Remembered steps, newest first, each with the index [B, N] of today's particles in it."""
        index = population.ancestors([], self.log_weight)
        for event in reversed(self.past):
            if isinstance(event, ResamplingRecord):
                index = event.parent.gather(1, index)
            else:
                yield event, index

    def states(self) -> Tensor:
        """States along today's particles' own lineages, oldest first: (B, N, steps taken + 1, *event).

        The noisy states alone, where steps remember.
        """
        self._need_states()
        line = [self.x, *(population.gather(step.x, index) for step, index in self.lineages())]
        return torch.stack([noisy(self.process, x) for x in line[::-1]], dim=2)

    def transitions(self) -> list[tuple[int, Tensor, Tensor, Tensor | None, Tensor | None]]:
        """Steps along lineages, oldest first: (k, x, x_next, log_prob, log_behaviour), each per particle."""
        self._need_states()
        steps, after = [], self.x
        for step, index in self.lineages():
            before = population.gather(step.x, index)
            densities = (None if d is None else d.gather(1, index) for d in (step.log_prob, step.log_behaviour))
            steps.append((step.k, before, after, *densities))
            after = before
        return steps[::-1]

    def unique_roots(self) -> list[tuple[int, Tensor]]:
        """After each rearrangement, (k, number of distinct starting particles that still have descendants [B])."""
        roots, counts = None, []
        for event in self.past:
            if isinstance(event, ResamplingRecord):
                roots = event.parent if roots is None else roots.gather(1, event.parent)
                counts.append((event.k, population.count_distinct(roots)))
        return counts

    def resamplings(self) -> Tensor:
        """How often each problem was rearranged, [B]."""
        count = torch.zeros(self.x.shape[0], dtype=torch.int64, device=self.x.device)
        return sum((event.happened.long() for event in self.past if isinstance(event, ResamplingRecord)), count)

    def independent_lineages(self) -> Tensor:
        """Whether each problem's particles came about by independent draws of ancestors, or were never rearranged, [B].

        What the variance of log_evidence can be read off the ancestors for (`diagnostics.evidence_variance`).
        """
        independent = torch.full_like(self.log_evidence, not self.moved, dtype=torch.bool)
        for event in self.past:
            if isinstance(event, ResamplingRecord) and not event.independent:
                independent = independent & ~event.happened
        return independent

    def _take(self, index: Tensor, happened: Tensor, log_weight: Tensor, independent: bool = False) -> Trajectory:
        # The one place where particles move: every per-particle field goes along, so none can go stale.
        moved = population.Gather(index, self.x.shape[1])
        return self._with(
            x=moved(self.x),
            log_weight=log_weight,
            cache=self.cache.map(moved),
            path=self.path.map(moved),
            past=(*self.past, ResamplingRecord(self.k, index, happened, independent)),
        )

    def _with(self, **changes: Any) -> Trajectory:
        # dataclasses.replace, which rebuilds a frozen value field by field, took a fifth of a cheap step.
        new = object.__new__(Trajectory)
        kept = {**self.__dict__, **changes}
        kept.pop("log_total", None)
        object.__setattr__(new, "__dict__", kept)
        return new

    def _need_states(self) -> None:
        if not any(isinstance(event, StepRecord) for event in self.past):
            raise SteerError("this trajectory remembers no states; run the sampler with keep_states=True")
