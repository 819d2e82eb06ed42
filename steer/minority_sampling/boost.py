"""Boost-and-Skip: minority samples from a start of too much variance, one network row less per skipped step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ..errors import SteerError
from ..guidance import GuidedProcess
from ..processes.gaussian import GaussianProcess, need_gaussian_process, need_levels
from ..processes.second_order import SecondOrderProcess
from ..types import GaussianPath, NoiseLevels
from .signal_level import share, size


@dataclass(frozen=True)
class Boost:
    """A boosted start on one grid: standard deviation gamma, `skip` levels dropped, strength kappa."""

    gamma: float
    skip: int
    kappa: float


@dataclass(frozen=True)
class BoostAndSkip:
    """Boost-and-Skip at a strength, or at a number of skipped steps. Built by `boost_and_skip`."""

    kappa: float | None
    gamma: float
    skip: int | None

    def plan(self, process: NoiseLevels) -> Boost:
        """gamma, skipped steps and kappa on the grid of a process. kappa below .01 does next to nothing."""
        levels = need_levels(process, "a boosted start").levels
        shares = [share(level) for level in levels[:-1]]
        if self.skip is not None:
            if not 0 <= self.skip < len(shares):
                raise SteerError(f"skip leaves at least one of the {len(shares)} steps, got {self.skip}")
            return Boost(self.gamma, self.skip, (self.gamma**2 - 1.0) * shares[self.skip])
        assert self.kappa is not None
        # The level at which gamma as asked comes nearest to kappa; gamma makes up for what the grid leaves.
        wanted = self.kappa / (self.gamma**2 - 1.0)
        held = [k for k, at in enumerate(shares) if at > 0.0]
        skip = min(held, key=lambda k: abs(math.log(shares[k] / wanted))) if self.kappa > 0.0 else 0
        return Boost(math.sqrt(1.0 + self.kappa / shares[skip]) if self.kappa > 0.0 else 1.0, skip, self.kappa)

    def __call__(self, process: GaussianPath) -> GaussianProcess | GuidedProcess:
        """The process from its boosted start."""
        if isinstance(process, SecondOrderProcess):
            return cast(Any, process.around(self))
        if isinstance(process, GuidedProcess):
            return replace(process, base=self(process.base))
        model = need_gaussian_process(
            process, "a boosted start", cure="boost the model first: restart(minority(process, boost), spans)"
        )
        if model.initial is not None and bool((model.initial[0] != 0.0).any()):
            raise SteerError(
                "boost_and_skip scales noise around zero, and this process starts from an image; boost the process "
                "of a plain prompt or label"
            )
        boost = self.plan(model)
        mean = torch.zeros((1, 1, *model.event), dtype=model.dtype, device=model.device)
        std = boost.gamma * size(model.levels[boost.skip])
        return replace(model, times=model.times[boost.skip :], initial=(mean, std))


def boost_and_skip(kappa: float | None = None, *, gamma: float = 4.0, skip: int | None = None) -> BoostAndSkip:
    """Boost-and-Skip for `steer.minority`: x ~ N(0, gamma^2) at a later level, then the unchanged sampler.

    Why kappa: given its start x_s, the data's distribution is p(x_0) N(x_s; alpha x_0, sigma^2), which depends on the
    start by alpha x_s alone, and that has variance gamma^2 alpha-bar. Two starts of one kappa give the same one up
    to O(alpha-bar), on any schedule; the paper's gamma = 4, 3 of 250 steps are kappa = .005 on a cosine schedule
    and .0008 on a linear one. With a deterministic rule this is Prior Guidance (Karczewski et al. 2025,
    2502.05807).
    It is a change of distribution, without weights that would undo it: samplers given the process target
    boosted(x) exp(r / T).

    Args:
        kappa: strength, (gamma^2 - 1) alpha-bar of the level that is started from: the excess variance that is left in
            the data, in units of their own. About .05 shows, .5 is strong, below .01 nothing happens. The level is the
            one of the grid at which gamma is nearest to what was asked, and gamma is then set so that kappa is exact.
        gamma: standard deviation of the start in units of sqrt(alpha^2 + sigma^2), above 1.
        skip: the paper's number of dropped steps, instead of kappa; kappa follows, see `.plan(process)`.

    Source: Um et al. 2025 (Boost-and-Skip, 2502.06516).
    Differs: a strength that carries over between schedules.
    """
    if (kappa is None) == (skip is None):
        raise SteerError("boost_and_skip takes a strength kappa or a number of steps to skip, one of the two")
    if kappa is not None and not 0.0 <= kappa < math.inf:
        raise SteerError(f"kappa is (gamma^2 - 1) alpha-bar, at least 0, got {kappa}")
    if not gamma >= 1.0 or (skip is None and gamma == 1.0):
        raise SteerError(f"gamma boosts the start, so it is above 1 (1 with skip= to skip only), got {gamma}")
    if kappa is not None and kappa >= gamma**2 - 1.0:
        raise SteerError(
            f"kappa is (gamma^2 - 1) times a share of signal below 1, so at gamma={gamma} it stays below "
            f"{gamma**2 - 1.0:.3g}, got {kappa}; lower kappa, or raise gamma"
        )
    return BoostAndSkip(kappa, gamma, skip)
