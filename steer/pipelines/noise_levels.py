"""Noise levels and prediction types of diffusers' schedulers, read from a scheduler after `set_timesteps`.

Whatever its tables, a scheduler's states are x = alpha x_0 + sigma eps on one of three paths, and its table is a time
grid on it:

    variance preserving   alpha^2 + sigma^2 = 1   schedules.Trigonometric
    sigma space           alpha = 1               schedules.VE
    flow                  alpha + sigma = 1       schedules.RectifiedFlow

so coefficients and their derivatives are closed forms, and a zero terminal SNR (alpha = 0) is a level like any other.
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

_BY_TIMESTEP = (
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler", "LCMScheduler",
    "TCDScheduler", "UnCLIPScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler",
)  # fmt: skip
_BY_RATIO = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPC", "DEIS", "SASolver")  # sigmas hold sigma / alpha
_SIGMA_SPACE = ("EulerDiscrete", "EulerAncestral", "Heun", "LMS", "DPMSolverSDE", "EDM", "CosineDPM")
_FLOW = ("FlowMatch", "LTXEulerAncestralRF")


@dataclass(frozen=True)
class Grid:
    """The levels a pipeline's loop visits, as steer counts them.

    schedule:  the path.
    times:     steps + 1 times on it, falling; the last is where the last step ends, and may hold noise.
    indices:   the loop's own index of each step. Solvers that evaluate one level twice (Heun, PNDM) visit it once here.
    timesteps: what the networks are told at each step.
    kind:      how the networks' output stands for x_0, see `x0_of`.
    data_std:  EDM's sigma_data, of the kinds that use it.
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


def read(scheduler: Any, first: int, length: int) -> Grid:
    """The grid of a loop over `scheduler.timesteps[first : first + length]`. Raises ModelError where it is unknown."""
    config = scheduler.config
    alpha, sigma = _table(scheduler)
    alpha, sigma = alpha[first : first + length + 1], sigma[first : first + length + 1]
    kind = _kind(scheduler)
    if float(alpha[0]) == 0.0 and kind == "epsilon":
        raise ModelError(
            f"{type(scheduler).__name__} starts at pure noise (zero terminal SNR), where a prediction of eps says "
            "nothing about x_0; load the v-prediction checkpoint, or turn rescale_betas_zero_snr off"
        )
    if config.get("thresholding", False):
        raise ModelError("dynamic thresholding couples the coordinates of x_0; set thresholding=False on the scheduler")
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
        schedule, tuple(float(times[i]) for i in (*keep, length)), tuple(keep), tuple(float(given[i]) for i in keep),
        kind, _data_std(scheduler),
    )  # fmt: skip


def _table(scheduler: Any) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) at every timestep and at the end of the last step: float64, length len(timesteps) + 1."""
    name, config = type(scheduler).__name__, scheduler.config
    if _is_flow(scheduler):
        sigma = scheduler.sigmas.double().cpu()
        if float(sigma.max()) > 1.0:
            return torch.ones_like(sigma), sigma  # Cosmos 2 steps through sigma space by a flow scheduler
        # Mochi's sigmas count the share of the data
        return (sigma, 1.0 - sigma) if config.get("invert_sigmas", False) else (1.0 - sigma, sigma)
    if name == "SCMScheduler":
        angle = scheduler.timesteps.double().cpu()
        return angle.cos(), angle.sin() * config.sigma_data
    if name.startswith(_SIGMA_SPACE):
        sigma = scheduler.sigmas.double().cpu()
        return torch.ones_like(sigma), sigma
    if name.startswith(_BY_RATIO):
        ratio = scheduler.sigmas.double().cpu()
        alpha = (ratio.square() + 1.0).rsqrt()
        return alpha, ratio * alpha
    if name == "DDPMWuerstchenScheduler":  # its timesteps are a continuous time, with the end of the last step
        squared = scheduler._alpha_cumprod(scheduler.timesteps.double().cpu(), torch.device("cpu"))
        return squared.sqrt(), (1.0 - squared).sqrt()
    if name in _BY_TIMESTEP:
        kept = scheduler.alphas_cumprod.double().cpu()
        end = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0)).double().cpu().reshape(1)
        squared = torch.cat([kept[scheduler.timesteps.cpu().long()], end])
        return squared.sqrt(), (1.0 - squared).sqrt()
    raise ModelError(
        f"the noise levels of {name} are not known to steer; use a scheduler of the same training, for instance "
        "pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)"
    )


def _is_flow(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith(_FLOW) or bool(scheduler.config.get("use_flow_sigmas", False))


def _data_std(scheduler: Any) -> float:
    return float(scheduler.config.get("sigma_data", 1.0))


def _kind(scheduler: Any) -> str:
    name, config = type(scheduler).__name__, scheduler.config
    if name.startswith(_FLOW):
        return "reversed_flow" if config.get("invert_sigmas", False) else "flow_prediction"
    if name.startswith(("EDM", "CosineDPM")):
        return f"edm_{config.prediction_type}"
    if name == "SCMScheduler":
        return "trigflow"
    return config.get("prediction_type", "epsilon")


def x0_of(output: Tensor, x: Tensor, at: Level, kind: str, data_std: float = 1.0) -> Tensor:
    """The prediction of x_0 that a network output stands for, at a level where the state is x.

    Linear in (output, x), so gradients pass. Only "epsilon" divides by alpha.
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
    if kind == "trigflow":
        return alpha * x - sigma * output
    if kind in ("edm_epsilon", "edm_v_prediction"):
        total = sigma**2 + data_std**2
        sign = 1.0 if kind == "edm_epsilon" else -1.0
        return x * (data_std**2 / total) + output * (sign * sigma * data_std / math.sqrt(total))
    raise ModelError(f"steer does not know what a network of prediction type {kind!r} predicts")


def timestep_at(scheduler: Any, at: Level) -> float:
    """What the networks are told at a level off the grid: the inverse of the scheduler's own table, interpolated."""
    name = type(scheduler).__name__
    if _is_flow(scheduler):
        return _between(scheduler, entry_at(scheduler, at))
    if name == "SCMScheduler":
        return math.atan2(at.sigma / _data_std(scheduler), at.alpha)
    if name.startswith(("EDM", "CosineDPM")):
        return 0.25 * math.log(at.sigma)
    if name == "DDPMWuerstchenScheduler":
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


def _between(scheduler: Any, sigma: float) -> float:
    """The timestep of a flow scheduler at an entry between those of its own grid: straight between them, and to 0.

    Most tell the networks sigma times a constant; CogView4 shifts its sigmas and leaves its timesteps.
    """
    told = scheduler.timesteps.double().cpu()
    knots = dict(zip(scheduler.sigmas.double().cpu()[: len(told)].tolist(), told.tolist(), strict=True))
    entries = sorted({0.0: 0.0, **knots}.items())
    high = min(max(1, bisect.bisect_left(entries, (sigma, -math.inf))), len(entries) - 1)
    (left, low), (right, top) = entries[high - 1], entries[high]
    return low + (top - low) * (sigma - left) / (right - left)


def entry_at(scheduler: Any, at: Level) -> float:
    """What a scheduler's table `sigmas` would hold for a level off the grid: some pipelines look it up themselves."""
    if _is_flow(scheduler) and scheduler.config.get("invert_sigmas", False):
        return 1.0 - at.sigma
    if not _is_flow(scheduler) and type(scheduler).__name__.startswith(_BY_RATIO):
        return at.sigma / at.alpha if at.alpha > 0.0 else math.inf
    return at.sigma


def input_scale(scheduler: Any, at: Level) -> float:
    """The factor by which a scheduler scales states before the networks see them, at a level off the grid."""
    name = type(scheduler).__name__
    if name.startswith(("EDM", "CosineDPM")):
        return 1.0 / math.sqrt(at.sigma**2 + _data_std(scheduler) ** 2)
    if name.startswith(_SIGMA_SPACE):
        return 1.0 / math.sqrt(at.sigma**2 + 1.0)
    return 1.0
