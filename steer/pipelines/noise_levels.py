"""Noise levels and prediction types of diffusers' schedulers, read from a scheduler after `set_timesteps`.

A scheduler's states are x = alpha x_0 + sigma eps on one of three paths, and its tables are a time grid on that path:

    variance preserving   alpha^2 + sigma^2 = 1   schedules.Trigonometric
    sigma space           alpha = 1               schedules.VE
    flow                  alpha + sigma = 1       schedules.RectifiedFlow

So coefficients and their derivatives are closed forms, and a zero terminal SNR (alpha = 0) is a level like any other.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..processes.schedules import VE, RectifiedFlow, Trigonometric
from ..types import Level, Schedule
from .families import (
    COSINE_SCHEDULERS,
    EDM_SCHEDULERS,
    FLOW_SCHEDULERS,
    RENOISING_SCHEDULERS,
    SIGMA_RATIO_SCHEDULERS,
    SIGMA_SPACE_SCHEDULERS,
    TCD_SCHEDULERS,
    TIMESTEP_SCHEDULERS,
    TRIGFLOW_SCHEDULERS,
    name_begins,
    name_is_in,
)


@dataclass(frozen=True)
class Grid:
    """The noise levels that a pipeline's loop visits.

    Args:
        schedule: The path.
        times: steps + 1 times on the path, falling. The last is where the last step ends, and may still hold noise.
        indices: The loop's own index of each step. Solvers that evaluate a level twice (Heun, PNDM) have it once here.
        timesteps: The timestep that the networks are told at each step.
        kind: Prediction type of the networks, see `x0_from_output`.
        data_std: EDM's sigma_data, for the prediction types that use it.
    """

    schedule: Schedule
    times: tuple[float, ...]
    indices: tuple[int, ...]
    timesteps: tuple[float, ...]
    kind: str
    data_std: float = 1.0

    def step_at(self, t: float) -> int | None:
        """The step that starts at exactly time t, if one does."""
        steps = self.times[:-1]
        return steps.index(t) if t in steps else None

    def step_before(self, t: float) -> int:
        """The last step that starts at time t or earlier in the chain (a level at least as noisy)."""
        return max(0, bisect.bisect_right(self.times[:-1], -t, key=lambda time: -time) - 1)


def read_grid(scheduler: Any, first: int, length: int) -> Grid:
    """Read the noise levels of a loop over `scheduler.timesteps[first : first + length]`.

    Args:
        scheduler: A diffusers scheduler after `set_timesteps`.
        first: Index of the loop's first timestep (image-to-image starts halfway).
        length: Number of timesteps in the loop.

    Returns:
        The grid, with one step per distinct level.

    Raises:
        ModelError: Where the scheduler is in no table of `families`, where it predicts eps at pure noise, and for
            dynamic thresholding.
    """
    config = scheduler.config
    alpha, sigma = _alpha_sigma_table(scheduler)
    alpha, sigma = alpha[first : first + length + 1], sigma[first : first + length + 1]
    kind = _output_kind(scheduler)
    if float(alpha[0]) == 0.0 and kind == "epsilon":
        raise ModelError(
            f"{type(scheduler).__name__} starts at pure noise (zero terminal SNR), where x_0 cannot be computed from a "
            "prediction of eps; load the v-prediction checkpoint, or turn rescale_betas_zero_snr off"
        )
    if config.get("thresholding", False):
        raise ModelError(
            "steer expects predictions of x_0 coordinate by coordinate, and dynamic thresholding rescales all by their "
            f"quantile; set thresholding=False in the config of {type(scheduler).__name__}"
        )
    if bool((alpha == 1.0).all()):
        schedule = VE(sigma_max=float(sigma[0]))
        times = sigma / sigma[0]
    elif _is_flow(scheduler):
        schedule, times = RectifiedFlow(), sigma
    else:
        scale = _data_std(scheduler) if kind == "trigflow" else 1.0
        schedule = Trigonometric(scale=scale)
        times = torch.atan2(sigma / scale, alpha).mul(2.0 / math.pi).clamp(max=1.0)
    given = scheduler.timesteps[first : first + length].tolist()
    keep = [i for i in range(length) if i == 0 or times[i] < times[i - 1]]
    return Grid(
        schedule=schedule,
        times=tuple(float(times[i]) for i in (*keep, length)),
        indices=tuple(keep),
        timesteps=tuple(float(given[i]) for i in keep),
        kind=kind,
        data_std=_data_std(scheduler),
    )


def check_known(scheduler: Any) -> None:
    """Raises ModelError where the scheduler is in no table of `families`, so that its noise levels are not known."""
    named = (TRIGFLOW_SCHEDULERS, COSINE_SCHEDULERS, TIMESTEP_SCHEDULERS)
    beginnings = (SIGMA_SPACE_SCHEDULERS, SIGMA_RATIO_SCHEDULERS)
    known = any(name_is_in(scheduler, table) for table in named)
    known = known or any(name_begins(scheduler, table) for table in beginnings)
    if not known and not _is_flow(scheduler):
        raise ModelError(
            f"the noise levels of {type(scheduler).__name__} are not known to steer; use a scheduler of the same "
            "training, for instance pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)"
        )


def _alpha_sigma_table(scheduler: Any) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) at every timestep and at the end of the last step: float64, [len(timesteps) + 1] each."""
    config = scheduler.config
    if _is_flow(scheduler):
        sigma = scheduler.sigmas.double().cpu()
        if float(sigma.max()) > 1.0:
            return torch.ones_like(sigma), sigma  # Cosmos 2 uses a flow scheduler in sigma space
        # Mochi's sigmas are the fraction of data
        return (sigma, 1.0 - sigma) if config.get("invert_sigmas", False) else (1.0 - sigma, sigma)
    if name_is_in(scheduler, TRIGFLOW_SCHEDULERS):
        angle = scheduler.timesteps.double().cpu()
        return angle.cos(), angle.sin() * config.sigma_data
    if name_begins(scheduler, SIGMA_SPACE_SCHEDULERS):
        sigma = scheduler.sigmas.double().cpu()
        return torch.ones_like(sigma), sigma
    if name_begins(scheduler, SIGMA_RATIO_SCHEDULERS):
        ratio = scheduler.sigmas.double().cpu()
        alpha = (ratio.square() + 1.0).rsqrt()
        return alpha, ratio * alpha
    if name_is_in(scheduler, COSINE_SCHEDULERS):  # timesteps include the end of the last step
        squared = scheduler._alpha_cumprod(scheduler.timesteps.double().cpu(), torch.device("cpu"))
        return squared.sqrt(), (1.0 - squared).sqrt()
    check_known(scheduler)
    kept = scheduler.alphas_cumprod.double().cpu()
    squared = torch.cat([kept[scheduler.timesteps.cpu().long()], _end_of_last_step(scheduler).reshape(1)])
    return squared.sqrt(), (1.0 - squared).sqrt()


def _end_of_last_step(scheduler: Any) -> Tensor:
    """alpha^2 where the last step of a scheduler with `alphas_cumprod` ends."""
    if name_is_in(scheduler, TCD_SCHEDULERS):
        return scheduler.alphas_cumprod[0].double().cpu()
    ends_clean = name_is_in(scheduler, RENOISING_SCHEDULERS)  # whatever set_alpha_to_one says
    return torch.as_tensor(1.0 if ends_clean else getattr(scheduler, "final_alpha_cumprod", 1.0)).double().cpu()


def _is_flow(scheduler: Any) -> bool:
    """Whether the scheduler's `sigmas` are those of a flow, alpha + sigma = 1."""
    return name_begins(scheduler, FLOW_SCHEDULERS) or bool(scheduler.config.get("use_flow_sigmas", False))


def _data_std(scheduler: Any) -> float:
    """EDM's sigma_data; 1 for schedulers without one."""
    return float(scheduler.config.get("sigma_data", 1.0))


def _output_kind(scheduler: Any) -> str:
    """Prediction type of the networks: the scheduler's own, or one implied by its family."""
    config = scheduler.config
    if name_begins(scheduler, FLOW_SCHEDULERS):
        return "reversed_flow" if config.get("invert_sigmas", False) else "flow_prediction"
    if name_begins(scheduler, EDM_SCHEDULERS):
        return f"edm_{config.prediction_type}"
    if name_is_in(scheduler, TRIGFLOW_SCHEDULERS):
        return "trigflow"
    return config.get("prediction_type", "epsilon")


def x0_from_output(output: Tensor, x: Tensor, at: Level, kind: str, data_std: float = 1.0) -> Tensor:
    """Compute the prediction of x_0 from a network's output.

    Linear in (output, x), so gradients pass through. Only "epsilon" divides by alpha.

    Args:
        output: What the network predicts, same shape as x.
        x: The state at the level.
        at: The noise level.
        kind: Prediction type: "epsilon", "sample", "v_prediction", "flow_prediction", "reversed_flow", "trigflow",
            "edm_epsilon" or "edm_v_prediction".
        data_std: sigma_data, for "trigflow" and the two "edm_" types.

    Returns:
        E[x_0 | x], same shape as x.

    Raises:
        ModelError: For any other prediction type.
    """
    alpha, sigma = at.alpha, at.sigma
    square = alpha**2 + sigma**2
    if kind == "epsilon":
        return (x - sigma * output) / alpha
    if kind == "sample":
        return output
    if kind == "v_prediction":  # the network is given x / sqrt(square), which has unit variance on every path
        return (alpha * x - (sigma * math.sqrt(square)) * output) / square
    if kind == "flow_prediction":  # eps - x_0
        return x - sigma * output
    if kind == "reversed_flow":  # x_0 - eps
        return x + sigma * output
    if kind == "trigflow":  # the output is in units of sigma_data, and so is sigma
        return alpha * x - (sigma / data_std) * output
    if kind in ("edm_epsilon", "edm_v_prediction"):
        total = sigma**2 + data_std**2
        sign = 1.0 if kind == "edm_epsilon" else -1.0
        return x * (data_std**2 / total) + output * (sign * sigma * data_std / math.sqrt(total))
    raise ModelError(
        "steer knows the prediction types epsilon, sample, v_prediction and flow_prediction, and those of TrigFlow and "
        f"EDM, got {kind!r}; open the network itself by steer.from_denoiser"
    )


def timestep_at(scheduler: Any, at: Level) -> float:
    """Timestep to tell the networks at a level off the grid: the scheduler's own table inverted by interpolation.

    Args:
        scheduler: A diffusers scheduler after `set_timesteps`.
        at: The noise level.

    Returns:
        The timestep, in the scheduler's units.
    """
    if _is_flow(scheduler):
        return _flow_timestep(scheduler, sigma_entry_at(scheduler, at))
    if name_is_in(scheduler, TRIGFLOW_SCHEDULERS):
        return math.atan2(at.sigma / _data_std(scheduler), at.alpha)
    if name_begins(scheduler, EDM_SCHEDULERS):
        return 0.25 * math.log(at.sigma)
    if name_is_in(scheduler, COSINE_SCHEDULERS):
        return _cosine_time(scheduler, at.alpha)
    kept = scheduler.alphas_cumprod.double().cpu()
    ratios = (0.5 * ((1.0 - kept) / kept).log()).tolist()  # log(sigma / alpha), rising with the timestep
    target = math.log(at.sigma / at.alpha) if at.alpha > 0.0 else math.inf
    high = bisect.bisect_left(ratios, target)
    if not 0 < high < len(ratios):
        return float(min(high, len(ratios) - 1))
    low = high - 1
    if ratios[high] == math.inf:  # a zero terminal SNR
        return float(high if target == math.inf else low)
    return low + (target - ratios[low]) / (ratios[high] - ratios[low])


def _cosine_time(scheduler: Any, alpha: float) -> float:
    """The time at which the cosine schedule of Wuerstchen and Stable Cascade has this alpha: its inverse."""
    s, first = float(scheduler.s), float(scheduler._init_alpha_cumprod)
    angle = math.acos(min(1.0, alpha * math.sqrt(first)))
    time = min(max((1.0 + s) * angle * 2.0 / math.pi - s, 0.0), 1.0)
    power = 1.0 / scheduler.scaler
    return 1.0 - (1.0 - time) ** power if scheduler.scaler > 1 else time**power


def _flow_timestep(scheduler: Any, sigma: float) -> float:
    """Timestep of a flow scheduler at a sigma between its own: linear between neighbours, and down to 0.

    Most schedulers use sigma times a constant; CogView4 shifts its sigmas but not its timesteps.
    """
    told = scheduler.timesteps.double().cpu()
    knots = dict(zip(scheduler.sigmas.double().cpu()[: len(told)].tolist(), told.tolist(), strict=True))
    entries = sorted({0.0: 0.0, **knots}.items())
    high = min(max(1, bisect.bisect_left(entries, (sigma, -math.inf))), len(entries) - 1)
    (left, low), (right, top) = entries[high - 1], entries[high]
    return low + (top - low) * (sigma - left) / (right - left)


def sigma_entry_at(scheduler: Any, at: Level) -> float:
    """Entry of the scheduler's table `sigmas` for a level off the grid, which some pipelines look up themselves.

    Args:
        scheduler: A diffusers scheduler after `set_timesteps`.
        at: The noise level.

    Returns:
        The entry: sigma, sigma / alpha or the fraction of data, as that scheduler stores it.
    """
    if _is_flow(scheduler) and scheduler.config.get("invert_sigmas", False):
        return 1.0 - at.sigma
    if not _is_flow(scheduler) and name_begins(scheduler, SIGMA_RATIO_SCHEDULERS):
        return at.sigma / at.alpha if at.alpha > 0.0 else math.inf
    return at.sigma


def input_scale(scheduler: Any, at: Level) -> float:
    """Factor by which the scheduler scales states before the networks see them, at a level off the grid.

    Args:
        scheduler: A diffusers scheduler.
        at: The noise level.

    Returns:
        The factor, 1 for schedulers that do not scale.
    """
    if name_begins(scheduler, EDM_SCHEDULERS):
        return 1.0 / math.sqrt(at.sigma**2 + _data_std(scheduler) ** 2)
    if name_begins(scheduler, SIGMA_SPACE_SCHEDULERS):
        return 1.0 / math.sqrt(at.sigma**2 + 1.0)
    return 1.0
