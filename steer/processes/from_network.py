"""A process from a network, by what the network predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..types import Denoiser, Rule, Schedule
from . import parameterization, schedules
from .clipping import Clip, as_clip
from .gaussian import GaussianProcess
from .transitions import DDIM


def from_denoiser(
    denoiser: Denoiser,
    schedule: Schedule,
    times: Sequence[float] | int,
    *,
    event: Sequence[int],
    transition: Rule | None = None,
    decoder: Callable[[Tensor], Tensor] | None = None,
    problems: int | None = None,
    clip: float | tuple[float, float] | Clip | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> GaussianProcess:
    """A process from a function of (x, t) that predicts E[x_0 | x_t].

    Args:
        denoiser: gets states x [B, N, *event] and a Python float t, and returns E[x_0 | x_t] of the same shape.
        schedule: the path (alpha, sigma), for instance `steer.VP()` or `steer.RectifiedFlow()`.
        times: a grid falling to 0, or a number of steps, equally spaced in t from the schedule's start.
        event: shape of one state.
        transition: how steps are drawn; ancestral sampling, `steer.ddim(1.0)`, by default.
        decoder: states [M, *event] to what rewards see; None: the state.
        problems: number of conditionings the denoiser is closed over (axis 0), None where any batch runs.
        clip: bounds on predictions of x_0, for networks that run out of the range of the data where there is most
            noise: c for [-c, c], a pair (low, high), or `steer.dynamic_clip()`. The chain steps by what is within, so
            this changes the distribution of the model, as the same option of other samplers does; None changes nothing.
        device: where states are.
        dtype: of states.

    Returns:
        The process, over states [B, N, *event].

    Raises:
        SteerError: times that do not fall within [0, 1], or bounds that are none.
        StateSpaceError: a transition rule that is not one for a Gaussian path.
    """
    grid = schedules.uniform_times(schedule, times) if isinstance(times, int) else schedules.check_times(times)
    return GaussianProcess(
        denoiser=denoiser,
        schedule=schedule,
        times=grid,
        event=tuple(event),
        decoder=decoder,
        problems=problems,
        clip=as_clip(clip),
        device=device,
        dtype=dtype,
    ).with_rule(transition or DDIM())


def from_eps(network: parameterization.Network, schedule: Schedule, times: Sequence[float] | int, **options):
    """A process from a network that predicts the noise eps.

    Args:
        network: gets states x [B, N, *event] and a Python float t, and returns the noise eps, of the same shape.
        schedule: the path (alpha, sigma).
        times: a grid falling to 0, or a number of steps, equally spaced in t from the schedule's start.
        **options: as `from_denoiser`, of which event is required.

    Returns:
        The process, over states [B, N, *event].

    Raises:
        SteerError: times that do not fall within [0, 1].
        StateSpaceError: a transition rule that is not one for a Gaussian path.
        ModelError: in a run whose grid begins at alpha = 0, where the network says nothing about x_0.
    """
    return from_denoiser(parameterization.from_eps(network, schedule), schedule, times, **options)


def from_v(network: parameterization.Network, schedule: Schedule, times: Sequence[float] | int, **options):
    """A process from a network that predicts v = alpha eps - sigma x_0.

    Args:
        network: gets states x [B, N, *event] and a Python float t, and returns v, of the same shape.
        schedule: the path (alpha, sigma).
        times: a grid falling to 0, or a number of steps, equally spaced in t from the schedule's start.
        **options: as `from_denoiser`, of which event is required.

    Returns:
        The process, over states [B, N, *event].

    Raises:
        SteerError: times that do not fall within [0, 1].
        StateSpaceError: a transition rule that is not one for a Gaussian path.

    Source: Salimans & Ho 2022 (v-prediction).
    """
    return from_denoiser(parameterization.from_v(network, schedule), schedule, times, **options)


def from_velocity(network: parameterization.Network, schedule: Schedule, times: Sequence[float] | int, **options):
    """A process from a network that predicts the flow's velocity, noise minus data.

    Args:
        network: gets states x [B, N, *event] and a Python float t, and returns the velocity
            E[d_alpha x_0 + d_sigma eps | x_t], of the same shape.
        schedule: the path (alpha, sigma).
        times: a grid falling to 0, or a number of steps, equally spaced in t from the schedule's start.
        **options: as `from_denoiser`, of which event is required.

    Returns:
        The process, over states [B, N, *event].

    Raises:
        SteerError: times that do not fall within [0, 1].
        StateSpaceError: a transition rule that is not one for a Gaussian path.

    A network trained for data minus noise has the opposite sign: negate it first.
    """
    return from_denoiser(parameterization.from_velocity(network, schedule), schedule, times, **options)


def from_score(network: parameterization.Network, schedule: Schedule, times: Sequence[float] | int, **options):
    """A process from a network that predicts the score of p_t.

    Args:
        network: gets states x [B, N, *event] and a Python float t, and returns the gradient of log p_t, of that shape.
        schedule: the path (alpha, sigma).
        times: a grid falling to 0, or a number of steps, equally spaced in t from the schedule's start.
        **options: as `from_denoiser`, of which event is required.

    Returns:
        The process, over states [B, N, *event].

    Raises:
        SteerError: times that do not fall within [0, 1].
        StateSpaceError: a transition rule that is not one for a Gaussian path.
        ModelError: in a run whose grid begins at alpha = 0, where the network says nothing about x_0.
    """
    return from_denoiser(parameterization.from_score(network, schedule), schedule, times, **options)
