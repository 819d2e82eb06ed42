"""The choke point between samplers and rewards: decode, call, check, count."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cost import Meter
from .errors import NonFiniteError, NotDifferentiableError, RewardError, ShapeError, SteerError
from .types import ReverseProcess


@dataclass(frozen=True, eq=False)
class Objective:
    """A reward as samplers use it: clean states (B, N, *event) to scores (B, N), float64, on the states' device.

    Built by `open_run`. What it checks at once: the reward's exceptions, type and shape. NaN and +inf are looked for
    by `check_finite`, where reading the scores does not stall the device.
    """

    process: ReverseProcess
    reward: Callable[..., Any]
    prompts: str  # "needed", "welcome" or "" as the reward's signature has it

    def __call__(self, x: Tensor) -> Tensor:
        """Scores of clean states, through the decoder."""
        problems, particles = x.shape[:2]
        samples = self.process.decode(x)
        rows = problems * particles
        with self.process.meter.scoring(rows):
            try:
                raw = self.reward(samples, **self._prompts(particles))
            except (SteerError, KeyboardInterrupt):
                raise
            except Exception as error:
                raise RewardError(
                    f"the reward {_name(self.reward)} raised {type(error).__name__}: {error} "
                    f"on samples of shape {tuple(samples.shape)}"
                ) from error
        return self._checked(raw, samples, rows).to(x.device, torch.float64).view(problems, particles)

    def value_and_grad(self, x: Tensor, k: int, strength: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prediction x0, score of it, and the gradient of strength * score with respect to x at level k."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = self.process.denoise(x, k)
            value = self(self.process.complete(x, x0))
            if not value.requires_grad:
                raise NotDifferentiableError(
                    f"guidance needs the gradient of the reward {_name(self.reward)}, which returned scores without "
                    "one (it detaches, uses no_grad, or is not a torch function); use proposal=steer.bootstrap, "
                    "or a differentiable reward"
                )
            with self.process.meter.gradient(x.shape[0] * x.shape[1] * self.process.rows):
                (gradient,) = torch.autograd.grad((strength * value).sum(), x)
        return x0.detach(), value.detach(), gradient

    def _prompts(self, particles: int) -> dict[str, Any]:
        if not self.prompts or (self.process.prompts is None and self.prompts == "welcome"):
            return {}
        if self.process.prompts is None:
            raise RewardError(
                f"the reward {_name(self.reward)} asks for prompts, and this process has none; give the process "
                "prompts (prompt=...), or close the reward over a text of its own"
            )
        return {"prompts": [prompt for prompt in self.process.prompts for _ in range(particles)]}

    def _checked(self, raw: Any, samples: Tensor, rows: int) -> Tensor:
        try:
            scores = raw if isinstance(raw, Tensor) else torch.as_tensor(raw, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(
                f"the reward {_name(self.reward)} must return one number per sample, got {type(raw).__name__}"
            ) from error
        if scores.shape != (rows,):
            raise ShapeError(
                f"the reward {_name(self.reward)} must return shape ({rows},), one score per sample, for samples of "
                f"shape {tuple(samples.shape)}, got {tuple(scores.shape)}"
            )
        return scores


def open_run(process: ReverseProcess, reward: Callable[..., Any]) -> tuple[ReverseProcess, Objective, Meter]:
    """A metered process, the objective on it, and their meter: the first line of every sampler."""
    if not callable(reward):
        raise RewardError(f"a reward is a callable from samples to scores, got {type(reward).__name__}")
    meter = Meter()
    process = process.metered(meter)
    return process, Objective(process, reward, _prompts_of(reward)), meter


def conditioned(process: ReverseProcess, batch: int) -> int:
    """The number of problems to run: `batch`, or as many as the process is conditioned on where that was left at 1."""
    return process.problems if process.problems is not None and batch == 1 else batch


def check_finite(scores: Tensor, where: str, *, first: int = 0) -> None:
    """Raises NonFiniteError naming problem and particle where a score is NaN or +inf. Reads the scores.

    first: slot of column 0.
    """
    bad = scores.isnan() | (scores == torch.inf)
    if bool(bad.any()):
        problem, particle = (int(i) for i in bad.nonzero()[0])
        raise NonFiniteError(
            f"the reward gave {scores[problem, particle].item()} for problem {problem}, particle {first + particle} "
            f"{where} ({int(bad.sum())} of {scores.numel()} scores); rewards must be finite, or -inf to forbid a sample"
        )


def log_potential(scores: Tensor, temperature: float) -> Tensor:
    """scores / temperature; 0 for every sample that is not forbidden where the temperature is infinite."""
    if temperature == float("inf"):
        return torch.where(scores == -torch.inf, scores, 0.0 * scores)
    return scores / temperature


def check_temperature(temperature: float) -> float:
    """A temperature, checked: positive, in units of the reward."""
    if not temperature > 0.0:
        raise SteerError(f"temperature divides rewards and must be positive (inf turns them off), got {temperature}")
    return float(temperature)


def _prompts_of(reward: Callable[..., Any]) -> str:
    try:
        parameter = inspect.signature(reward).parameters.get("prompts")
    except (TypeError, ValueError):
        return ""
    if parameter is None:
        return ""
    return "needed" if parameter.default is inspect.Parameter.empty else "welcome"


def _name(reward: Callable[..., Any]) -> str:
    return getattr(reward, "__name__", None) or type(reward).__name__
