"""Networks in the form of EDM: D(x, sigma), the expected data at noise level sigma (Karras et al. 2022)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ModelError, ShapeError
from ..types import Rule
from . import parameterization
from .clipping import Clip, as_clip
from .gaussian import GaussianProcess
from .schedules import VE
from .transitions import DDIM


@dataclass(frozen=True, eq=False)
class EDMDenoiser:
    """The denoiser around D(x, sigma), called on flat rows, at most `chunk` at once."""

    network: Callable[[Tensor, Tensor], Tensor]
    sigma_max: float
    chunk: int | None = None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        flat, sigma = x.flatten(0, 1), t * self.sigma_max
        parts = flat.split(self.chunk or len(flat))
        out = torch.cat([self.network(rows, rows.new_full((len(rows),), sigma)) for rows in parts])
        if out.shape != flat.shape:
            raise ShapeError(
                f"D(x, sigma) must return E[x_0] in the shape of its rows x, {tuple(flat.shape)} = (M, *event), got "
                f"{tuple(out.shape)}; sigma has shape ({len(flat)},) and may need axes: sigma.view(-1, 1)"
            )
        return out.view(x.shape)

    def only(self, problem: int) -> EDMDenoiser:
        """The denoiser of one problem, where the network is conditioned on several and says so by `only`."""
        return replace(self, network=parameterization.only(self.network, problem))


def from_edm(
    network: Callable[[Tensor, Tensor], Tensor],
    sigmas: Sequence[float] | int,
    *,
    event: Sequence[int],
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    transition: Rule | None = None,
    decoder: Callable[[Tensor], Tensor] | None = None,
    problems: int | None = None,
    chunk: int | None = None,
    clip: float | tuple[float, float] | Clip | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> GaussianProcess:
    """A process from a denoiser D(x, sigma) = E[x_0 | x_0 + sigma eps = x]: EDM, k-diffusion, any callable.

    The path is x = x_0 + sigma eps (alpha = 1), so a state at level k has standard deviation sigma_k around the data.
    The sampler of the paper takes a second network call per step (Heun); rules here take one.

    Args:
        network: gets rows [M, *event], not scaled, and their noise levels [M], and returns [M, *event]. Conditioning
            is closed over; rows come problem by problem.
        sigmas: falling noise levels, of which the first is the prior's and the last step ends at 0; or a number of
            steps, spaced from sigma_max to sigma_min by their 1/rho power (Eq. 5), the last of them to 0.
        event: shape of one state.
        sigma_min, sigma_max, rho: of the grid where `sigmas` is a number, see `karras_sigmas`.
        transition: a rule; ancestral sampling by default. `steer.churn(...)` is the paper's own, `steer.ode()` its ODE.
        decoder: states [M, *event] to what rewards see; None: the state.
        problems: how many conditionings the network is closed over, None where any batch runs.
        chunk: most rows per network call; None: all. Not for networks that are closed over one condition per row.
        clip: bounds on predictions of x_0, as `steer.from_denoiser` takes them.
        device: where states are.
        dtype: of states.

    Returns:
        The process, over states [B, N, *event].

    Raises:
        ModelError: sigmas that do not fall strictly or are not positive.
        StateSpaceError: a transition rule that is not one for a Gaussian path.
        ShapeError: in a run, where the network returns another shape than its rows have.
    """
    if isinstance(sigmas, int):
        grid = karras_sigmas(sigmas, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    else:
        given = tuple(map(float, sigmas))
        grid = given[:-1] if given[-1:] == (0.0,) else given
        if not grid or grid[-1] <= 0.0 or any(a <= b for a, b in itertools.pairwise(grid)):
            raise ModelError(
                f"sigmas must fall strictly and be positive, as 80, ..., .002 (a last 0 may follow), got {len(given)} "
                f"values from {given[:1]} to {given[-1:]}; a number of steps makes Karras' grid"
            )
    times = (*(sigma / grid[0] for sigma in grid), 0.0)
    return GaussianProcess(
        denoiser=EDMDenoiser(network, grid[0], chunk),
        schedule=VE(sigma_max=grid[0]),
        times=times,
        event=tuple(event),
        decoder=decoder,
        problems=problems,
        clip=as_clip(clip),
        device=device,
        dtype=dtype,
    ).with_rule(transition or DDIM())


def karras_sigmas(
    steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> tuple[float, ...]:
    """Noise levels from sigma_max to sigma_min, evenly in their 1/rho power.

    Args:
        steps: number of noise levels, >= 1.
        sigma_min, sigma_max: smallest and largest level, standard deviations in units of the data.
        rho: the larger, the more of the levels are at low noise; 7 in the paper.

    Returns:
        The `steps` levels, falling, without a last 0.

    Raises:
        ModelError: steps < 1, rho <= 0, or levels that are not 0 < sigma_min < sigma_max.

    Source: Karras et al. 2022, Eq. 5.
    """
    if steps < 1 or not 0.0 < sigma_min < sigma_max or not rho > 0.0:
        raise ModelError(
            f"the grid needs steps >= 1, 0 < sigma_min < sigma_max and rho > 0, got steps={steps}, "
            f"sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}"
        )
    first, last = sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho)
    return tuple((first + (last - first) * k / max(1, steps - 1)) ** rho for k in range(steps))
