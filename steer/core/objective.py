"""The choke point between samplers and rewards: decode, call, check, count."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..calls import Answer
from ..cost import Meter, check_counts, rows_at
from ..errors import NonFiniteError, NotDifferentiableError, RewardError, ShapeError, SteerError
from ..finite import total
from ..key import Key
from ..torch_modes import without_autocast
from ..types import ReverseProcess, RewardSpec

Owner = Callable[[int, int], tuple[int, int]]
"""(row, column) of states [B, n] -> the problem and the particle of the run that they are."""
_NO_GRADIENT = (
    "use a differentiable reward, or a method that needs no gradient: steer.smc with its default proposal, and its "
    "default start or start=steer.pcn(), steer.fk_steering, search.svdd"
)


@dataclass(frozen=True, eq=False)
class Objective:
    """A reward as samplers use it: clean states [B, N, *event] to scores [B, N], float64, on the states' device.

    Built by `open_objective`. What it checks at once: the reward's exceptions, type and shape. NaN and +inf, in samples
    and scores, are looked for by the meter's `FiniteWatch`, which does not stall the device. A groupwise reward is
    called once per problem: its group is the particles of one problem.

    Rewards run outside the caller's autocast, and own what they are given and what they return: they may work in place,
    or return one buffer again and again.
    """

    process: ReverseProcess
    reward: Callable[..., Any]
    prompts: str  # "needed", "welcome" or "" as the reward's signature has it
    owner: Owner = lambda row, column: (row, column)  # whose the states it is given are, for messages

    def __call__(self, x: Tensor, where: str = "") -> Tensor:
        """Scores of clean states, through the decoder. where: for messages, "at level 3 of 20"."""
        kind = "groupwise" if self.groupwise else "score"
        return self.process.meter.call(kind, -1, lambda x: {"score": self._scores(x, where)}, x)["score"]

    def _scores(self, x: Tensor, where: str) -> Tensor:
        problems, particles = x.shape[:2]
        if torch.is_grad_enabled() and x.requires_grad:
            self.check_differentiable()
        samples, prompts = self.process.decode(x), self._prompts(particles)
        self.process.meter.finite.samples(x, samples, where)
        if _memory(samples) == _memory(x):  # by storage: numpy writes leave a tensor's version as it was
            samples = samples.clone()
        with self.process.meter.scoring(problems * particles):
            if self.groupwise:
                starts = range(0, problems * particles, particles)
                texts = ({name: every[i : i + particles] for name, every in prompts.items()} for i in starts)
                scores = torch.cat([self._score(*group) for group in zip(samples.split(particles), texts, strict=True)])
            else:
                scores = self._score(samples, prompts)
        scores = scores.to(x.device, torch.float64).view(problems, particles)
        self.look_at(scores, where)
        return scores

    def of(self, owner: Owner) -> Objective:
        """The same, for states of which messages name others as owners."""
        return replace(self, owner=owner)

    def look_at(self, scores: Tensor, where: str, who: str = "the reward") -> None:
        """Has the meter look for NaN and +inf in scores [B, n], without reading them where that stalls the device."""
        scores = scores.detach()
        self.process.meter.finite.look(scores.amax(), lambda: _not_finite(scores, where, self.owner, who), -torch.inf)

    @cached_property
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
        self.check_differentiable()
        strengths = (strength,) if isinstance(strength, Tensor) else ()

        def paid(x: Tensor, *strengths: Tensor) -> Answer:
            return self._value_and_grad(x, k, strengths[0] if strengths else strength, key)

        named = "" if strengths else f"strength {float(strength)!r}"
        kind = "value_and_grad" if self.process.hooks is None else "guided"
        answer = self.process.meter.call(kind, k, paid, x, *strengths, named=named)
        return answer["x0"], answer["score"], answer["gradient"]

    def _value_and_grad(self, x: Tensor, k: int, strength: float | Tensor, key: Key | None) -> Answer:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = self.process.denoise(x, k, key)
            value = self(self.process.complete(x, x0), at_level(self.process, k))
            if not value.requires_grad:
                raise NotDifferentiableError(
                    f"this method follows the gradient of the reward {_name(self.reward)}, which returned scores "
                    f"without one (it detaches, uses no_grad, or is not a torch function); {_NO_GRADIENT}"
                )
            with self.process.meter.gradient(x.shape[0] * x.shape[1] * rows_at(self.process, k)):
                (gradient,) = torch.autograd.grad((strength * value).sum(), x)
        self._look_at_gradient(gradient, value.detach(), k)
        return {"x0": x0.detach(), "score": value.detach(), "gradient": gradient}

    def _look_at_gradient(self, gradient: Tensor, scores: Tensor, k: int) -> None:
        """Has the meter look for gradients that are not finite although their score is."""
        where = at_level(self.process, k)
        self.process.meter.finite.look(total(gradient), lambda: _bad_gradient(gradient, scores, where))

    def check_differentiable(self, cure: str = _NO_GRADIENT) -> None:
        """Raises NotDifferentiableError where the reward says that it has no gradient."""
        if _spec(self.reward).gradient == "none":
            raise NotDifferentiableError(
                f"this method follows the gradient of the reward {_name(self.reward)}, which says that it has none "
                f'(spec.gradient is "none"); {cure}'
            )

    def _score(self, samples: Tensor, prompts: dict[str, Any]) -> Tensor:
        try:
            with without_autocast(samples.device):
                raw = self.reward(samples, **prompts)
        except SteerError:
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
        if scores.is_complex() or scores.device.type == "meta":
            raise RewardError(
                f"the reward {_name(self.reward)} must return real numbers, got {scores.dtype} on {scores.device}"
            )
        return scores.to(torch.float64, copy=True)


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


def from_column(first: int) -> Owner:
    """Owners of the rows of a chunk of a population, whose column 0 is that particle of the run."""
    return lambda problem, column: (problem, first + column)


def _not_finite(scores: Tensor, where: str, owner: Owner, who: str) -> NonFiniteError:
    """The error of scores of which some are NaN or +inf, naming the first by problem and particle."""
    bad = scores.isnan() | (scores == torch.inf)
    row, column = (int(i) for i in bad.nonzero()[0])
    problem, particle = owner(row, column)
    return NonFiniteError(
        f"{who} gave {scores[row, column].item()} for problem {problem}, particle {particle}"
        f"{' ' if where else ''}{where} ({int(bad.sum())} of {scores.numel()} scores); rewards must be finite, or -inf "
        "to forbid a sample"
    )


def _bad_gradient(gradient: Tensor, scores: Tensor, where: str) -> NonFiniteError | None:
    bad = ~gradient.isfinite().flatten(2).all(2) & scores.isfinite()
    if not bool(bad.any()):
        return None
    problem, particle = (int(i) for i in bad.nonzero()[0])
    return NonFiniteError(
        f"the gradient of the reward of a prediction is not finite for problem {problem}, particle {particle} {where}, "
        "although the score is; make the reward smooth there (a square root at 0?), or use a method that needs no "
        "gradient"
    )


def at_level(process: ReverseProcess, k: int) -> str:
    """Where a score was asked for, for messages."""
    return f"at level {k} of {process.steps}"


FINISHED = "of the finished samples"


def check_temperature(temperature: float | str) -> float:
    """A temperature, checked: positive, in units of the reward."""
    if not isinstance(temperature, int | float) or not temperature > 0.0:
        raise SteerError(
            f"temperature divides rewards and must be positive (inf turns them off), got {temperature!r}; samplers of "
            'a distribution (smc, tds, ...) choose it where they are given "auto", ess= or kl='
        )
    return float(temperature)


def _memory(x: Tensor) -> int:
    """Where the storage of a tensor begins, the same for all its views."""
    return x.untyped_storage().data_ptr()


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
