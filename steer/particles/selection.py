"""Selections: when a population is resampled, and how scores and weights are checked."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import population
from ..core.resampling import Resampler, multinomial, systematic
from ..core.trajectory import LevelRecord, Trajectory
from ..errors import CollapsedWeightsError, NonFiniteError, SteerError
from ..key import Key
from .path_mcmc import PathMoves


@dataclass(frozen=True)
class Resample:
    """When and how to resample: where the ESS of a problem's accumulated weights falls below threshold * N.

    resampler: log-weights [B, N] to ancestors [B, N].
    threshold: share of N; 0 never, 1 whenever weights differ.
    at:        timesteps at which it may happen, None for all that are weighted.
    moves:     at its own levels, in place of that: few ancestors, and moves of their copies, whatever the ESS.
    """

    resampler: Resampler = systematic
    threshold: float = 0.5
    at: frozenset[int] | None = None
    moves: PathMoves | None = None

    def moving(self, k: int) -> bool:
        """Whether copies are moved at level k."""
        return self.moves is not None and k in self.moves.at

    def allowed(self, k: int) -> bool:
        """Whether resampling may happen at level k."""
        return self.moving(k) or (self.threshold > 0.0 and (self.at is None or k in self.at))

    def ancestors(self, log_weight: Tensor, k: int, key: Key) -> Tensor:
        """Which of N particles each particle at level k becomes a copy of, [B, N].

        log_weight: [B, N], in memory that nobody else needs: resamplers may work in place.
        """
        if self.moves is not None and self.moving(k):
            return self.moves.ancestors(log_weight, self.resampler, key)
        return self.resampler(log_weight, key, log_weight.shape[1])


def resample(
    resampler: Resampler = systematic,
    threshold: float = 0.5,
    at: Collection[int] | None = None,
    moves: PathMoves | None = None,
) -> Resample:
    """A selection that resamples by effective sample size (ESS), at chosen levels.

    Args:
        resampler: `systematic`, `stratified`, `multinomial`, `residual`, `ssp`, `killing`, or a function of log-weights
            [B, N], a key and a count to ancestors [B, count].
        threshold: resample where the ESS is below this share of N, in [0, 1]; 0 never, 1 whenever weights differ.
        at: timesteps at which it may happen, numbered from noise; None for all that are weighted.
        moves: `path_moves(...)`, to tell copies apart by MCMC on their paths at a few levels.

    Returns:
        What `steer.smc(selection=...)` takes.

    Raises:
        SteerError: for a threshold outside [0, 1], or a resampler that is no function.
    """
    if not callable(resampler):
        raise SteerError(f"a resampler is a function, for instance steer.systematic or steer.ssp, got {resampler!r}")
    if not 0.0 <= threshold <= 1.0:
        raise SteerError(f"threshold is a share of N in [0, 1], got {threshold}")
    return Resample(resampler, threshold, None if at is None else frozenset(at), moves)


def select(state: Trajectory, scores: Tensor, selection: Resample, key: Key, seen: list[LevelRecord]) -> Trajectory:
    """The state resampled in the problems whose ESS is low."""
    particles, size = state.x.shape[1], state.ess
    seen.append(LevelRecord(state.k, size, scores))
    # One problem on the host: reading the decision is free and saves the gather. Elsewhere some problem nearly always
    # resamples, or reading would stall the device: decide per problem by torch.where, and look for bad numbers once,
    # at the end. NaN, where every weight is zero, is not low.
    enough = math.inf if selection.moving(state.k) else selection.threshold * particles * (1.0 - population.SLACK)
    if state.x.device.type == "cpu" and state.x.shape[0] == 1:
        size_now = size.item()
        if math.isnan(size_now):
            check(state)
        if size_now >= enough:
            return state
    if not selection.allowed(state.k) or particles == 1:
        return state
    low = size < enough
    # Where nothing is resampled, possibly for want of any weight, ancestors are not used but must exist.
    log_weight = state.log_weight.masked_fill(~low[:, None], 0.0)
    ancestors = selection.ancestors(log_weight, state.k, key.at(state.k))
    return state.resample(ancestors, low, independent=selection.resampler is multinomial)


def check(state: Trajectory) -> None:
    """Raises the error that bad weights call for, naming step and problem. Reads the device."""
    if state.process.meter is not None:  # what made them so comes first
        state.process.meter.finite.settle()
    # The weights carried, not log_evidence: that is NaN by right where the start's is unknown, and what was
    # collected was finite, or nothing would have been resampled.
    dead = state.log_total == -torch.inf
    if bool(dead.any()):
        raise CollapsedWeightsError(
            f"every particle of problem {int(dead.nonzero()[0])} has weight zero at level {state.k}: the reward "
            "forbids (-inf) all of them; use more particles, or a reward that is finite on what the model makes"
        )
    if not bool(state.log_total.isfinite().all()):
        raise NonFiniteError(
            f"log-weights at level {state.k} are not finite although no score is NaN: states ran away, or densities "
            "overflow (lower the guidance scale, start below the noise that the model was trained on, or keep states "
            "in float32); or the reward forbids (-inf) a prediction, whose gain Feynman-Kac weights cannot take (use "
            "weight=steer.KernelRatio(), or a reward that is finite)"
        )
