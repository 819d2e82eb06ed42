"""Moves of whole paths: what makes copies of a particle differ after a resampling, without changing the distribution.

A chain is a function of the noise that drives it: its start and what every step adds, independent normals all of them.
Weighted up to level k, a population stands for the distribution

    N(noise; 0, I) exp(S),        S = what the potentials have multiplied in, a function of the state at level k

so a preconditioned Crank-Nicolson step, noise' = sqrt(1 - beta^2) noise + beta xi, which leaves the normal as it is,
followed by a replay of the chain to level k, is accepted with probability min(1, exp(S' - S)) (Cotter et al. 2013). It
reaches what resampling has lost for good: the early steps, and the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..core.population import broadcast_like
from ..core.resampling import Resampler
from ..core.trajectory import EMPTY_CACHE, ResamplingRecord, Trajectory
from ..cost import rows_between
from ..errors import StateSpaceError, SteerError
from ..key import Key
from ..processes.second_order import begun, beside, noisy, normal_of
from ..types import ReverseProcess, Transition

Judge = Callable[[Trajectory, Key], tuple[Trajectory, Tensor]]
"""A state at its level, and the key of hooks' draws -> the state caching what its next step needs, and its
log-potential S [B, M], -inf where forbidden."""


class Chains(NamedTuple):
    """Particles [B, M, ...] on their way through moves, and the log-potentials [B, M] of their states."""

    state: Trajectory
    value: Tensor


@dataclass(frozen=True)
class PathMoves:
    """Waste-free moves: few ancestors are drawn, each begins a chain of moves, and every state of it is kept.

    Built by `path_moves`, which says what the fields mean.
    """

    at: frozenset[int]
    chain: int
    smallest: float

    def rows(self, process: ReverseProcess, particles: int) -> int:
        """Network rows per problem of a run with that many particles."""
        moved = (particles - self.chains(particles)) * sum(min(k + 1, process.steps) for k in self.at)
        return particles * rows_between(process, 0, process.steps) + process.rows * moved

    def chains(self, particles: int) -> int:
        """How many chains make that many particles; the last may be shorter."""
        return math.ceil(particles / self.chain)

    def ancestors(self, log_weight: Tensor, resampler: Resampler, key: Key) -> Tensor:
        """Where the chains of particles with log-weights [B, N] begin, repeated in turn, [B, N]."""
        particles = log_weight.shape[1]
        first = resampler(log_weight, key, self.chains(particles))
        # In random order: where chains differ in length, which ancestor gets a short one must not depend on its index.
        order = key.fold("order").uniform(first.shape, device=first.device).argsort(1)
        return first.gather(1, order).repeat(1, self.chain)[:, :particles]

    def check(self, process: ReverseProcess, level: int) -> None:
        """Raises where paths that begin at a level cannot be replayed."""
        if level != 0 or process.prior_moments is None:
            raise StateSpaceError(
                "moves replay paths from a Gaussian prior, so a run with moves begins at level 0 of a process that has "
                f"one, got level {level} of {type(process).__name__}; run without moves"
            )

    def begin(self, state: Trajectory) -> Trajectory:
        """The state at level 0, with the noise that it is."""
        # Moved states have a log-potential of their own; those that stay where they are must have one to keep.
        state = state.with_path_state(log_potential=state.path.log_potential_or_zero(state.log_weight))
        mean, std = _prior(state)
        return _with_noise(state, _START, (noisy(state.process, state.x) - mean) / std) if std > 0.0 else state

    def record(self, state: Trajectory, model: Transition) -> Trajectory:
        """The state with the noise of its last step: what the model's own step would have had to add."""
        law = normal_of(model)
        if law is None:
            raise StateSpaceError(
                f"moves replay paths by the noise of their steps, so steps must be steer.Normal, got "
                f"{type(model).__name__}; run without moves"
            )
        if not law.stochastic:
            return state
        return _with_noise(state, _noise(state.k - 1), (noisy(state.process, state.x) - law.mean) / law.std)

    def __call__(self, state: Trajectory, value: Tensor, judge: Judge, key: Key) -> Trajectory:
        """A state just resampled to its `ancestors`, with the copies moved.

        value: log-potentials [B, N] of its particles, -inf where their predictions are forbidden.
        """
        particles = value.shape[1]
        chains = self.chains(particles)
        here = Chains(_some(state, chains), value[:, :chains])
        kept, accepted = [here.state], []
        for first in range(chains, particles, chains):
            width, turn = min(chains, particles - first), key.fold(first // chains).at(state.k)
            here = Chains(_some(here.state, width), here.value[:, :width])
            there = self._proposed(here.state, judge, turn)
            chance = turn.fold("accept").uniform(there.value.shape, device=there.value.device)
            # A forbidden prediction has kept the weight from before it (see `Potential.apply`), which is no function of
            # its state: chains neither enter such states nor leave them.
            accept = (here.value > -torch.inf) & (chance.log() < there.value - here.value)
            accepted.append(accept.double())
            here = Chains(_either(accept, there.state, here.state), torch.where(accept, there.value, here.value))
            kept.append(here.state)
        # All but problems without any weight, which end in an error.
        moved = cast(ResamplingRecord, state.past[-1]).happened
        rate = torch.cat(accepted, 1).mean(1) if accepted else torch.full_like(value[:, 0], math.nan)
        diagnostics = {**state.diagnostics, f"{ACCEPTANCE} {state.k}": rate}
        return replace(_joined(state, kept, moved), diagnostics=diagnostics, moved=True)

    def _proposed(self, state: Trajectory, judge: Judge, key: Key) -> Chains:
        """Chains driven by moved noise, replayed to the level of the state."""
        process, noises = state.process, {}
        path_key = key.fold("path")  # a new path draws again what hooks draw in it
        log_size = key.fold("size").uniform(state.x.shape[:2], device=state.x.device) * math.log(self.smallest)
        like = noisy(process, state.x)
        size = broadcast_like(log_size.exp(), like).to(like)
        for name, noise in state.path.driving_noise.items():
            fresh = key.fold(name).normal(noise.shape, dtype=noise.dtype, device=noise.device)
            noises[name] = (1.0 - size.square()).sqrt() * noise + size * fresh
        mean, std = _prior(state)
        with torch.no_grad():
            x = begun(process, mean + std * noises[_START] if std > 0.0 else mean.expand_as(like))
            for k in range(state.k):
                model = process.transition(x, process.denoise(x, k, path_key), k)
                law = normal_of(model)
                assert law is not None  # as `record` has checked
                x = beside(model, law.mean + law.std * noises[_noise(k)] if law.stochastic else law.mean)
        state = replace(state, x=x, cache=EMPTY_CACHE).with_path_state(driving_noise=noises)
        state, value = judge(state, path_key)
        return Chains(state.with_path_state(log_potential=value), value)


def path_moves(at: Collection[int], *, chain: int = 2, smallest: float = 0.05) -> PathMoves:
    """Moves for `steer.resample(moves=...)`: N / chain ancestors are drawn, and each makes chain - 1 moves.

    Args:
        at: timesteps, numbered from noise, at which this happens whatever the ESS; K = process.steps: finished samples.
        chain: states kept of each ancestor, itself included, >= 2. Long chains need many particles: N / chain ancestors
            must stand for the population.
        smallest: sizes beta of moves are drawn log-uniformly from [smallest, 1]; a move of size 1 is a new path.

    Returns:
        What `steer.resample(moves=...)` takes.

    Raises:
        SteerError: without levels, for chain below 2, or smallest outside (0, 1].

    Cost: a level k of `at` replays N (1 - 1 / chain) paths of min(k + 1, K) network rows, with one reward (and, where
    the proposal is guided, one gradient) each. Memory: the noise of every step of every particle.

    Source: Dau & Chopin 2022 (Waste-free sequential Monte Carlo), Algorithm 2; Cotter et al. 2013 (pCN).
    Differs: sizes are random, which needs no tuning; the state space is the path's noise, so no density is evaluated.
    """
    levels = frozenset(at)
    if chain < 2 or not 0.0 < smallest <= 1.0 or not levels:
        raise SteerError(
            f"path_moves takes levels, chain >= 2 and smallest in (0, 1], got {sorted(levels)}, {chain} and {smallest}"
        )
    return PathMoves(levels, chain, smallest)


def forget(state: Trajectory) -> Trajectory:
    """The state without the noise that drove it."""
    return state.with_path_state(driving_noise={})


ACCEPTANCE = "acceptance of moves at level"
_START = "noise of the start"


def _noise(k: int) -> str:
    return f"noise of step {k}"


def _with_noise(state: Trajectory, name: str, noise: Tensor) -> Trajectory:
    return state.with_path_state(driving_noise={**state.path.driving_noise, name: noise})


def _prior(state: Trajectory) -> tuple[Tensor, float]:
    """Mean, of an axis for every axis of states, and standard deviation of the prior."""
    moments = state.process.prior_moments
    assert moments is not None  # as `begin` has checked
    mean, std = moments
    x = noisy(state.process, state.x)
    return (torch.zeros_like(x[:1, :1]) if mean is None else mean.to(x)), std


def _some(state: Trajectory, count: int) -> Trajectory:
    """The first particles."""
    return _mapped(lambda tensor: tensor[:, :count], state)


def _either(choice: Tensor, a: Trajectory, b: Trajectory) -> Trajectory:
    """Particles of a where choice [B, M], else of b."""
    return _mapped(lambda left, right: torch.where(broadcast_like(choice, left), left, right), a, b)


def _joined(state: Trajectory, kept: Sequence[Trajectory], where: Tensor) -> Trajectory:
    """States of chains, turn by turn, in place of the particles of the problems [B] `where` is true."""

    def joined(old: Tensor, *turns: Tensor) -> Tensor:
        return torch.where(broadcast_like(where[:, None], old), torch.cat(turns, 1), old)

    return _mapped(joined, state, *kept)


def _mapped(function: Callable[..., Tensor], state: Trajectory, *others: Trajectory) -> Trajectory:
    """The state with its per-particle tensors, beside those of others, through a function."""
    alike = [state, *others]
    return replace(
        state,
        x=function(*(one.x for one in alike)),
        log_weight=function(*(one.log_weight for one in alike)),
        cache=state.cache.map(function, *(one.cache for one in others)),
        path=state.path.map(function, *(one.path for one in others)),
    )
