"""How rewards that are made of rewards call them: one place for names, specs, prompts, exceptions and shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from steer.errors import NotDifferentiableError, RewardError, ShapeError, SteerError
from steer.types import RewardSpec

Scorer = Callable[..., Any]
"""A reward: samples (M, *event) or images (M, C, H, W), and prompts if it names them, to one score per sample."""

Gradient = Literal["exact", "surrogate", "none", ""]


def name_of(reward: Scorer) -> str:
    """What messages call a reward: its `__name__`, or the name of its class."""
    return getattr(reward, "__name__", None) or type(reward).__name__


def spec_of(reward: Scorer) -> RewardSpec:
    """What a reward declares in its attribute `spec`; of a plain function only whether it reads prompts is known."""
    spec = getattr(reward, "spec", None)
    return spec if isinstance(spec, RewardSpec) else RewardSpec(prompts=takes_prompts(reward))


def joined(
    rewards: Sequence[Scorer], unit: str | None, bounds: tuple[float, float], judges: Sequence[Scorer] = ()
) -> RewardSpec:
    """The spec of a smooth function of rewards, and of judges that are called without a gradient.

    As differentiable as the least of the rewards; groupwise, and in want of prompts, where one of either is.
    """
    weakest: tuple[Gradient, ...] = ("none", "", "surrogate", "exact")
    gradients: list[Gradient] = [spec_of(reward).gradient for reward in rewards]
    every = [*rewards, *judges]
    versions = [spec_of(reward).version for reward in every]
    return RewardSpec(
        unit=unit,
        bounds=bounds,
        gradient=weakest[min([weakest.index(gradient) for gradient in gradients], default=3)],
        scope="groupwise" if any(spec_of(reward).scope == "groupwise" for reward in every) else "pointwise",
        prompts=any(takes_prompts(reward) for reward in every),
        version=" ".join(version for version in versions if version),
    )


def takes_prompts(reward: Scorer) -> bool:
    """Whether a reward names the argument `prompts`."""
    try:
        return "prompts" in inspect.signature(reward).parameters
    except (TypeError, ValueError):  # a callable written in C
        return False


def needs_prompts(reward: Scorer) -> bool:
    """Whether a reward cannot be called without prompts."""
    return takes_prompts(reward) and inspect.signature(reward).parameters["prompts"].default is inspect.Parameter.empty


def signature(takes: bool, needs: bool) -> inspect.Signature:
    """The signature of a reward that reads prompts, and cannot do without, or does not.

    Samplers look at it to decide whether to hand prompts over, and refuse a process that has none where they are
    needed. A reward made of rewards must therefore take and need `prompts` exactly when one of its parts does.
    """
    samples = inspect.Parameter("samples", inspect.Parameter.POSITIONAL_ONLY)
    default = inspect.Parameter.empty if needs else None
    prompts = inspect.Parameter("prompts", inspect.Parameter.KEYWORD_ONLY, default=default)
    return inspect.Signature([samples, prompts] if takes else [samples])


def gradient_asked(samples: Tensor) -> bool:
    """Whether the caller records a gradient through the samples."""
    return torch.is_grad_enabled() and samples.requires_grad


def refuse_gradient(samples: Tensor, name: str) -> None:
    """NotDifferentiableError where a gradient is recorded through samples of a reward that has none to give."""
    if gradient_asked(samples):
        raise NotDifferentiableError(
            f"the reward {name} has no gradient; use a sampler or a proposal without gradients "
            "(proposal=steer.bootstrap), or score under torch.no_grad()"
        )


def score(reward: Scorer, samples: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
    """Scores (M,) of samples (M, ...) by one reward; prompts (M) reach it only if it names them.

    Raises RewardError where the reward raises or returns something else than numbers, and ShapeError for any other
    shape than (M,); both name this reward. steer's own errors pass unchanged.
    """
    arguments = {"prompts": prompts} if prompts is not None and takes_prompts(reward) else {}
    try:
        raw = reward(samples, **arguments)
    except SteerError:
        raise
    except Exception as error:
        raise RewardError(
            f"the reward {name_of(reward)} raised {type(error).__name__}: {error} "
            f"on samples of shape {tuple(samples.shape)}"
        ) from error
    try:
        scores = raw if isinstance(raw, Tensor) else torch.as_tensor(raw, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"the reward {name_of(reward)} must return one number per sample, got {type(raw).__name__}"
        ) from error
    if scores.shape != (samples.shape[0],):
        raise ShapeError(
            f"the reward {name_of(reward)} must return shape ({samples.shape[0]},), one score per sample, for samples "
            f"of shape {tuple(samples.shape)}, got {tuple(scores.shape)}"
        )
    return scores if scores.is_floating_point() else scores.double()  # flags and counts are numbers too


def score_part(whole: str, name: str, reward: Scorer, samples: Tensor, prompts: Sequence[str] | None) -> Tensor:
    """Scores (M,) of a part of a reward, on the samples' device, with a gradient wherever one is asked of the whole.

    Raises NotDifferentiableError where the part has none: half a gradient would pass for the whole.
    """
    lost = gradient_asked(samples) and spec_of(reward).gradient == "none"
    scores = None if lost else score(reward, samples, prompts).to(samples.device)
    if scores is None or (gradient_asked(samples) and not scores.requires_grad):
        raise NotDifferentiableError(
            f"the gradient of {whole} would leave out {name}, whose scores carry none; use a "
            "sampler or a proposal without gradients (proposal=steer.bootstrap), or leave this part out"
        )
    return scores
