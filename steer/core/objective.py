"""The choke point between samplers and rewards: decode, call, check, count."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calls import Answer
from ..cost import Meter, check_counts
from ..errors import NonFiniteError, NotDifferentiableError, RewardError, ShapeError, SteerError
from ..key import Key
from ..types import ReverseProcess, RewardSpec


@dataclass(frozen=True, eq=False)
class Objective:
    """A reward as samplers use it: clean states [B, N, *event] to scores [B, N], float64, on the states' device.

    Built by `open_objective`. What it checks at once: the reward's exceptions, type and shape. NaN and +inf are looked
    for by `check_finite`, where reading the scores does not stall the device. A groupwise reward is called once per
    problem: its group is the particles of one problem.
    """

    process: ReverseProcess
    reward: Callable[..., Any]
    prompts: str  # "needed", "welcome" or "" as the reward's signature has it

    def __call__(self, x: Tensor) -> Tensor:
        """Scores of clean states, through the decoder."""
        kind = "groupwise" if self.groupwise else "score"
        return self.process.meter.call(kind, -1, lambda x: {"score": self._scores(x)}, x)["score"]

    def _scores(self, x: Tensor) -> Tensor:
        problems, particles = x.shape[:2]
        if torch.is_grad_enabled() and x.requires_grad:
            self._check_differentiable()
        samples, prompts = self.process.decode(x), self._prompts(particles)
        with self.process.meter.scoring(problems * particles):
            if self.groupwise:
                starts = range(0, problems * particles, particles)
                texts = ({name: every[i : i + particles] for name, every in prompts.items()} for i in starts)
                scores = torch.cat([self._score(*group) for group in zip(samples.split(particles), texts, strict=True)])
            else:
                scores = self._score(samples, prompts)
        return scores.to(x.device, torch.float64).view(problems, particles)

    @property
    def groupwise(self) -> bool:
        """Whether a score depends on the other samples in its call."""
        return _spec(self.reward).scope == "groupwise"

    def value_and_grad(
        self, x: Tensor, k: int, strength: float | Tensor, key: Key | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prediction x0, its score, and the gradient of strength * score with respect to the states.

        Args:
            x: states at level k, [B, N, *event].
            k: timestep index.
            strength: what the score is multiplied by, a number or [B, N].
            key: names what hooks draw in the prediction.

        Returns:
            x0 [B, N, ...], scores [B, N] float64, gradient [B, N, *event].

        Raises:
            NotDifferentiableError: before the network is called, where the reward says that it has no gradient.

        Cost: one network row and one backward pass a state.
        """
        self._check_differentiable()
        strengths = (strength,) if isinstance(strength, Tensor) else ()

        def paid(x: Tensor, *strengths: Tensor) -> Answer:
            return self._value_and_grad(x, k, strengths[0] if strengths else strength, key)

        named = "" if strengths else repr(float(strength))
        kind = "value_and_grad" if self.process.hooks is None else "guided"
        answer = self.process.meter.call(kind, k, paid, x, *strengths, named=named)
        return answer["x0"], answer["score"], answer["gradient"]

    def _value_and_grad(self, x: Tensor, k: int, strength: float | Tensor, key: Key | None) -> Answer:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = self.process.denoise(x, k, key)
            value = self(self.process.complete(x, x0))
            if not value.requires_grad:
                raise NotDifferentiableError(
                    f"guidance needs the gradient of the reward {_name(self.reward)}, which returned scores without "
                    "one (it detaches, uses no_grad, or is not a torch function); use proposal=steer.bootstrap, "
                    "or a differentiable reward"
                )
            with self.process.meter.gradient(x.shape[0] * x.shape[1] * self.process.rows):
                (gradient,) = torch.autograd.grad((strength * value).sum(), x)
        return {"x0": x0.detach(), "score": value.detach(), "gradient": gradient}

    def _check_differentiable(self) -> None:
        if _spec(self.reward).gradient == "none":
            raise NotDifferentiableError(
                f"guidance needs the gradient of the reward {_name(self.reward)}, which says that it has none "
                '(spec.gradient is "none"); use proposal=steer.bootstrap, or a differentiable reward'
            )

    def _score(self, samples: Tensor, prompts: dict[str, Any]) -> Tensor:
        try:
            raw = self.reward(samples, **prompts)
        except (SteerError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise RewardError(
                f"the reward {_name(self.reward)} raised {type(error).__name__}: {error} "
                f"on samples of shape {tuple(samples.shape)}"
            ) from error
        return self._checked(raw, samples, samples.shape[0])

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


def open_objective(
    process: ReverseProcess, reward: Callable[..., Any], *, groupwise: bool = False
) -> tuple[ReverseProcess, Objective, Meter]:
    """A metered process, the objective on it, and their meter.

    Args:
        process: the model.
        reward: function of samples [M, ...] to [M].
        groupwise: whether the method only ranks or reports finished samples, and so can do with a reward whose scores
            depend on the others in the call. Such a reward is no function of x: p(x) exp(r(x) / T) is not defined.

    Raises:
        RewardError: the reward is no callable, or groupwise where that is not allowed.
    """
    if not callable(reward):
        raise RewardError(f"a reward is a callable from samples to scores, got {type(reward).__name__}")
    if _spec(reward).scope == "groupwise" and not groupwise:
        raise RewardError(
            f"the reward {_name(reward)} scores a sample against the others in its group, so it is no function of one "
            "sample and there is no distribution to tilt by it; steer by the reward inside it, or use "
            "search.best_of_n or steer.rollout, which score finished samples once"
        )
    meter = Meter()
    process = process.metered(meter)
    return process, Objective(process, reward, _prompts_of(reward)), meter


def num_problems(process: ReverseProcess, batch: int) -> int:
    """`batch`, or as many problems as the process is conditioned on where that was left at 1."""
    check_counts(batch=batch)
    return process.problems if process.problems is not None and batch == 1 else batch


def check_finite(scores: Tensor, where: str, *, first: int = 0) -> None:
    """Raises NonFiniteError naming problem and particle where a score is NaN or +inf. Reads the scores.

    Args:
        scores: [B, n].
        where: end of the message: "at level 3 of 20".
        first: index of column 0 among the particles of the run.
    """
    bad = scores.isnan() | (scores == torch.inf)
    if bool(bad.any()):
        problem, particle = (int(i) for i in bad.nonzero()[0])
        raise NonFiniteError(
            f"the reward gave {scores[problem, particle].item()} for problem {problem}, particle {first + particle} "
            f"{where} ({int(bad.sum())} of {scores.numel()} scores); rewards must be finite, or -inf to forbid a sample"
        )


def check_temperature(temperature: float) -> float:
    """A temperature, checked: positive, in units of the reward."""
    if not isinstance(temperature, int | float) or not temperature > 0.0:
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


def _spec(reward: Callable[..., Any]) -> RewardSpec:
    spec = getattr(reward, "spec", None)
    return spec if isinstance(spec, RewardSpec) else RewardSpec()


def _name(reward: Callable[..., Any]) -> str:
    return getattr(reward, "__name__", None) or type(reward).__name__
