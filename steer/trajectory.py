"""A population of particles partway from noise to data, as an immutable value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ShapeError, SteerError
from .key import Key
from .types import ReverseProcess, Transition
from .weights import log_mean_exp


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
    carried:      per-particle tensors (B, N, ...) that belong to the states: predictions, values, gradients.
    memory:       per-particle tensors (B, N, ...) that belong to the path: statistics of the values seen so far.
    root:         index of each particle's ancestor at the start, (B, N).
    past:         what happened, oldest first: rearrangements always, steps where `keep_states`.
    keep_states:  whether steps remember states and densities (memory: one population per step).
    """

    process: ReverseProcess
    x: Tensor
    k: int
    log_weight: Tensor
    log_evidence: Tensor
    root: Tensor
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    past: tuple[Ancestors | Stepped, ...] = ()
    keep_states: bool = False

    @classmethod
    def begin(cls, process: ReverseProcess, x: Tensor, *, k: int = 0, keep_states: bool = False) -> Trajectory:
        """A population of equal weights at states x (B, N, *event) of level k."""
        if x.ndim < 2 or tuple(x.shape[2:]) != tuple(process.event):
            raise ShapeError(
                f"states must have shape (B, N, *event) with event {tuple(process.event)}, got {tuple(x.shape)}"
            )
        problems, particles = x.shape[:2]
        weight = torch.zeros((problems, particles), dtype=torch.float64, device=x.device)
        root = torch.arange(particles, device=x.device).expand(problems, particles)
        return cls(process, x, k, weight, weight[:, 0], root, keep_states=keep_states)

    def __repr__(self) -> str:
        problems, particles = self.x.shape[:2]
        return f"Trajectory({problems} problems x {particles} particles at level {self.k} of {self.process.steps})"

    @property
    def log_normaliser(self) -> Tensor:
        """Estimate of log Z so far: evidence collected plus the mean of the weights carried, (B,)."""
        return self.log_evidence + log_mean_exp(self.log_weight)

    def carry(self, **tensors: Tensor) -> Trajectory:
        """With per-particle tensors (B, N, ...) attached, which move with their particles until the next step."""
        return replace(self, carried={**self.carried, **tensors})

    def remember(self, **tensors: Tensor) -> Trajectory:
        """With per-particle tensors (B, N, ...) attached for the rest of the path."""
        return replace(self, memory={**self.memory, **tensors})

    def reweight(self, log_increment: Tensor) -> Trajectory:
        """With log-weights (B, N) multiplied in."""
        return replace(self, log_weight=self.log_weight + log_increment)

    def resample(self, ancestors: Tensor, where: Tensor | None = None) -> Trajectory:
        """With particles replaced by copies of their ancestors (B, M), in the problems (B,) `where` is true.

        There the mean weight moves into the evidence and weights start again from 1; elsewhere nothing changes.
        """
        level = log_mean_exp(self.log_weight)
        if where is None:
            where = torch.ones_like(level, dtype=torch.bool)
            weight = torch.zeros_like(ancestors, dtype=torch.float64)
        else:
            stay = torch.arange(ancestors.shape[1], device=ancestors.device)
            ancestors = torch.where(where[:, None], ancestors, stay)
            weight = torch.where(where[:, None], 0.0, self.log_weight)
        moved = self._take(ancestors, where)
        evidence = torch.where(where, self.log_evidence + level, self.log_evidence)
        return replace(moved, log_weight=weight, log_evidence=evidence)

    def branch(self, copies: int) -> Trajectory:
        """With every particle repeated `copies` times side by side; weights are those of the parents."""
        particles = self.x.shape[1]
        index = torch.arange(particles, device=self.x.device).repeat_interleave(copies)
        return self._take(index.expand(self.x.shape[0], -1))

    def select(self, index: Tensor) -> Trajectory:
        """With the particles at index (B, M) only, weights kept: for searches, which do not claim a law."""
        return self._take(index)

    def step(self, transition: Transition, key: Key, *, model: Transition | None = None) -> Trajectory:
        """One level on, drawn from a transition. Carried tensors end here: they belong to the states left behind.

        model: the model's own transition where `transition` is another proposal; the log-weight then gains
        log model(x') - log transition(x').
        """
        x = transition.sample(key.at(self.k))
        stochastic = transition.std > 0.0
        log_prob = log_behaviour = None
        if stochastic and (self.keep_states or model is not None):
            log_behaviour = transition.log_prob(x)
            log_prob = log_behaviour if model is None else model.log_prob(x)
        weight = self.log_weight
        if model is not None and log_prob is not None and log_behaviour is not None:
            weight = weight + (log_prob - log_behaviour)
        past = (*self.past, Stepped(self.k, self.x, log_prob, log_behaviour)) if self.keep_states else self.past
        return replace(self, x=x, k=self.k + 1, log_weight=weight, carried={}, past=past)

    def renoise(self, k: int, key: Key) -> Trajectory:
        """Back at the noisier level k, by the forward process. Lineage stays; states of the past no longer connect."""
        return replace(self, x=self.process.noise(self.x, self.k, k, key), k=k, carried={})

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

    def _take(self, index: Tensor, happened: Tensor | None = None) -> Trajectory:
        # The one place where particles move: every per-particle field goes along, so none can go stale.
        if happened is None:
            happened = torch.ones(index.shape[0], dtype=torch.bool, device=index.device)
        return replace(
            self,
            x=gather(self.x, index),
            log_weight=self.log_weight.gather(1, index),
            root=self.root.gather(1, index),
            carried={name: gather(tensor, index) for name, tensor in self.carried.items()},
            memory={name: gather(tensor, index) for name, tensor in self.memory.items()},
            past=(*self.past, Ancestors(self.k, index, happened)),
        )

    def _need_states(self) -> None:
        if self.x.shape and not any(isinstance(event, Stepped) for event in self.past):
            raise SteerError("this trajectory remembers no states; run the sampler with keep_states=True")


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """Particles index (B, M) of a tensor (B, N, ...): (B, M, ...)."""
    problems, particles = tensor.shape[:2]
    if tensor.ndim == 2:
        return tensor.gather(1, index)
    flat = (
        index
        if problems == 1
        else index + torch.arange(0, problems * particles, particles, device=index.device)[:, None]
    )
    return tensor.flatten(0, 1).index_select(0, flat.reshape(-1)).view(problems, index.shape[1], *tensor.shape[2:])
