"""A population of particles partway from noise to data, as an immutable value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ShapeError, SteerError
from ..key import Key
from ..types import ReverseProcess, Transition
from .log_weights import ess


class Ancestors(NamedTuple):
    """Particles were rearranged at level k: particle m came from parent[:, m]. happened: which problems, (B,)."""

    k: int
    parent: Tensor
    happened: Tensor


class Stepped(NamedTuple):
    """A step from level k: the state before it and the log-densities, (B, N), of the state that was drawn.

    log_prob: under the model's own transition. log_behaviour: under what drew it (guided proposals differ). Both are
    None for a step without noise.
    """

    k: int
    x: Tensor
    log_prob: Tensor | None
    log_behaviour: Tensor | None


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Particles of B problems at level k. Every verb returns a new Trajectory.

    process:      what moves it.
    x:            states, (B, N, *event).
    k:            level, 0 = noise, process.steps = data.
    log_weight:   accumulated since the last resampling, (B, N) float64, not normalised.
    log_evidence: log of the evidence collected at resamplings, (B,) float64.
    carried:      per-particle tensors (B, N, ...) that belong to the states: predictions, gradients.
    memory:       per-particle tensors (B, N, ...) that belong to the path: statistics of the values seen so far.
    past:         what happened, oldest first: rearrangements always, steps where `keep_states`.
    keep_states:  whether steps remember states and densities (memory: one population per step).
    diagnostics:  what the start or the sampler measured of itself, (B,) each: acceptance, step size, split R-hat.
    """

    process: ReverseProcess
    x: Tensor
    k: int
    log_weight: Tensor
    log_evidence: Tensor
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    past: tuple[Ancestors | Stepped, ...] = ()
    keep_states: bool = False
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def begin(cls, process: ReverseProcess, x: Tensor, *, k: int = 0, keep_states: bool = False) -> Trajectory:
        """A population of equal weights at states x (B, N, *event) of level k."""
        if x.ndim < 2 or tuple(x.shape[2:]) != tuple(process.event):
            raise ShapeError(
                f"states must have shape (B, N, *event) with event {tuple(process.event)}, got {tuple(x.shape)}"
            )
        weight = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device)
        return cls(process, x, k, weight, torch.zeros_like(weight[:, 0]), keep_states=keep_states)

    def __repr__(self) -> str:
        problems, particles = self.x.shape[:2]
        return f"Trajectory({problems} problems x {particles} particles at level {self.k} of {self.process.steps})"

    @cached_property
    def log_total(self) -> Tensor:
        """Log of the sum of the weights carried, (B,); -inf where all are zero."""
        return torch.logsumexp(self.log_weight, 1)

    @property
    def log_normaliser(self) -> Tensor:
        """Estimate of log Z so far: evidence collected plus the mean of the weights carried, (B,)."""
        return self.log_evidence + (self.log_total - math.log(self.log_weight.shape[1]))

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the weights carried, (B,); NaN where all are zero."""
        return ess(self.log_weight)

    def anew(self) -> Trajectory:
        """The same states, with what they carry, as a population that begins here: weights of one, nothing past."""
        weight = torch.zeros_like(self.log_weight)
        evidence = torch.zeros_like(self.log_evidence)
        return self._with(log_weight=weight, log_evidence=evidence, memory={}, past=(), diagnostics={})

    def carry(self, **tensors: Tensor) -> Trajectory:
        """With per-particle tensors (B, N, ...) attached, which move with their particles until the next step."""
        return self._with(carried={**self.carried, **tensors})

    def remember(self, **tensors: Tensor) -> Trajectory:
        """With per-particle tensors (B, N, ...) attached for the rest of the path."""
        return self._with(memory={**self.memory, **tensors})

    def reweight(self, log_increment: Tensor, **memory: Tensor) -> Trajectory:
        """With log-weights (B, N) multiplied in, and what the path is to remember of it."""
        return self._with(log_weight=self.log_weight + log_increment, memory={**self.memory, **memory})

    def resample(self, ancestors: Tensor, where: Tensor | None = None) -> Trajectory:
        """With particles replaced by copies of their ancestors (B, M), in the problems (B,) `where` is true.

        There the mean weight moves into the evidence and weights start again from 1; elsewhere nothing changes.
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
            ancestors = torch.where(chosen, ancestors, _range(ancestors.shape[1], 1, ancestors.device))
            weight = self.log_weight.masked_fill(chosen, 0.0)
            evidence = torch.where(where, evidence, self.log_evidence)
        return self._take(ancestors, where, weight)._with(log_evidence=evidence)

    def branch(self, copies: int) -> Trajectory:
        """With every particle repeated `copies` times side by side; weights are those of the parents."""
        index = torch.arange(self.x.shape[1], device=self.x.device).repeat_interleave(copies)
        return self.select(index.expand(self.x.shape[0], -1))

    def select(self, index: Tensor) -> Trajectory:
        """With the particles at index (B, M) only, weights kept: for searches, which do not claim a law."""
        everywhere = torch.ones_like(self.log_evidence, dtype=torch.bool)
        return self._take(index, everywhere, self.log_weight.gather(1, index))

    def step(self, transition: Transition, key: Key, *, model: Transition | None = None) -> Trajectory:
        """One level on, drawn from a transition. Carried tensors end here: they belong to the states left behind.

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
                past = (*past, Stepped(self.k, self.x, log_prob, log_behaviour))
        return self._with(x=x, k=self.k + 1, log_weight=weight, carried={}, past=past)

    def renoise(self, k: int, key: Key) -> Trajectory:
        """Back at the noisier level k, by the forward process. Lineage stays; states of the past no longer connect."""
        return self._with(x=self.process.noise(self.x, self.k, k, key), k=k, carried={})

    def ancestor(self, lag: int | None = None) -> Tensor:
        """Index (B, N) of each particle's ancestor `lag` rearrangements ago; None for the start."""
        index = torch.arange(self.x.shape[1], device=self.x.device).expand(self.x.shape[:2])
        moves = [event.parent for event in self.past if isinstance(event, Ancestors)]
        for parent in reversed(moves if lag is None else moves[len(moves) - lag :]):
            index = parent.gather(1, index)
        return index

    @property
    def root(self) -> Tensor:
        """Index of each particle's ancestor at the start, (B, N)."""
        return self.ancestor()

    def lineages(self) -> Iterator[tuple[Stepped, Tensor]]:
        """Remembered steps, newest first, each with the index (B, N) of today's particles in it."""
        index = torch.arange(self.x.shape[1], device=self.x.device).expand(self.x.shape[:2])
        for event in reversed(self.past):
            if isinstance(event, Ancestors):
                index = event.parent.gather(1, index)
            else:
                yield event, index

    def states(self) -> Tensor:
        """States along today's particles' own lineages, oldest first: (B, N, steps taken + 1, *event)."""
        self._need_states()
        line = [self.x, *(gather(step.x, index) for step, index in self.lineages())]
        return torch.stack(line[::-1], dim=2)

    def transitions(self) -> list[tuple[int, Tensor, Tensor, Tensor | None, Tensor | None]]:
        """Steps along lineages, oldest first: (k, x, x_next, log_prob, log_behaviour), each per particle."""
        self._need_states()
        steps, after = [], self.x
        for step, index in self.lineages():
            before = gather(step.x, index)
            densities = (None if d is None else d.gather(1, index) for d in (step.log_prob, step.log_behaviour))
            steps.append((step.k, before, after, *densities))
            after = before
        return steps[::-1]

    def unique_roots(self) -> list[tuple[int, Tensor]]:
        """After each rearrangement, (k, number of distinct starting particles that still have descendants (B,))."""
        roots, counts = None, []
        for event in self.past:
            if isinstance(event, Ancestors):
                roots = event.parent if roots is None else roots.gather(1, event.parent)
                ordered = roots.sort(1).values
                counts.append((event.k, 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)))
        return counts

    def resamplings(self) -> Tensor:
        """How often each problem was rearranged, (B,)."""
        count = torch.zeros(self.x.shape[0], dtype=torch.int64, device=self.x.device)
        return sum((event.happened.long() for event in self.past if isinstance(event, Ancestors)), count)

    def _take(self, index: Tensor, happened: Tensor, log_weight: Tensor) -> Trajectory:
        # The one place where particles move: every per-particle field goes along, so none can go stale.
        rows = _flat(index, self.x.shape[1])
        return self._with(
            x=_rows(self.x, rows, index),
            log_weight=log_weight,
            carried={name: _rows(tensor, rows, index) for name, tensor in self.carried.items()},
            memory={name: _rows(tensor, rows, index) for name, tensor in self.memory.items()},
            past=(*self.past, Ancestors(self.k, index, happened)),
        )

    def _with(self, **changes: Any) -> Trajectory:
        # dataclasses.replace, which rebuilds a frozen value field by field, took a fifth of a cheap step.
        new = object.__new__(Trajectory)
        kept = {**self.__dict__, **changes}
        kept.pop("log_total", None)
        object.__setattr__(new, "__dict__", kept)
        return new

    def _need_states(self) -> None:
        if not any(isinstance(event, Stepped) for event in self.past):
            raise SteerError("this trajectory remembers no states; run the sampler with keep_states=True")


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """Particles index (B, M) of a tensor (B, N, ...): (B, M, ...)."""
    return _rows(tensor, _flat(index, tensor.shape[1]), index)


def _flat(index: Tensor, particles: int) -> Tensor:
    """Positions of particles index (B, M) on the merged axis (B * N), flat."""
    if index.shape[0] > 1:
        index = index + _range(index.shape[0], particles, index.device)[:, None]
    return index.reshape(-1)


@lru_cache(maxsize=64)
def _range(count: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * step, step, device=device)


def _rows(tensor: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    return tensor.flatten(0, 1).index_select(0, rows).view(*index.shape, *tensor.shape[2:])


class Seen(NamedTuple):
    """What a sampler saw at level k: the ESS of accumulated weights (B,) and the scores (B, N) it weighted by."""

    k: int
    ess: Tensor
    score: Tensor
