"""How rewards are called: names, specs, prompts, gradients, exceptions and shapes are handled here for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from steer.errors import NotDifferentiableError, RewardError, ShapeError, SteerError
from steer.torch_modes import without_autocast
from steer.types import RewardSpec

Scorer = Callable[..., Any]
"""A reward: samples [M, *event] or images [M, C, H, W], and prompts if it names that argument, to M scores."""

Gradient = Literal["exact", "surrogate", "none", ""]

_FROM_WEAKEST: tuple[Gradient, ...] = ("none", "", "surrogate", "exact")


def name_of(reward: Scorer) -> str:
    """The name of a reward in messages.

    Args:
        reward: any reward.

    Returns:
        Its `__name__`, or the name of its class.
    """
    return getattr(reward, "__name__", None) or type(reward).__name__


def spec_of(reward: Scorer) -> RewardSpec:
    """What a reward declares of its scores.

    Args:
        reward: any reward.

    Returns:
        Its attribute `spec`. Of a plain function, a spec that only says whether it takes prompts.
    """
    spec = getattr(reward, "spec", None)
    return spec if isinstance(spec, RewardSpec) else RewardSpec(prompts=takes_prompts(reward))


def combined_spec(
    rewards: Sequence[Scorer],
    unit: str | None,
    bounds: tuple[float, float],
    without_gradient: Sequence[Scorer] = (),
) -> RewardSpec:
    """The spec of a smooth function of several rewards.

    Args:
        rewards: the rewards that the gradient flows through; the whole is as differentiable as the least of them.
        unit: of the whole; None where it has none.
        bounds: the least and the greatest score of the whole.
        without_gradient: further rewards, called without a gradient.

    Returns:
        A spec that is groupwise, and takes prompts, where one of all the rewards does. Its version lists theirs.
    """
    # "exact" for no rewards at all.
    gradients: list[Gradient] = [*(spec_of(reward).gradient for reward in rewards), "exact"]
    all_rewards = [*rewards, *without_gradient]
    versions = [spec_of(reward).version for reward in all_rewards]
    return RewardSpec(
        unit=unit,
        bounds=bounds,
        gradient=min(gradients, key=_FROM_WEAKEST.index),
        scope="groupwise" if any(spec_of(reward).scope == "groupwise" for reward in all_rewards) else "pointwise",
        prompts=any(takes_prompts(reward) for reward in all_rewards),
        version=" ".join(version for version in versions if version),
    )


def takes_prompts(reward: Scorer) -> bool:
    """Whether a reward has an argument named `prompts`.

    Args:
        reward: any reward.

    Returns:
        False also for a callable whose arguments cannot be read.
    """
    try:
        return "prompts" in inspect.signature(reward).parameters
    except (TypeError, ValueError):  # a callable written in C
        return False


def needs_prompts(reward: Scorer) -> bool:
    """Whether a reward cannot be called without prompts.

    Args:
        reward: any reward.

    Returns:
        True where its argument `prompts` has no default.
    """
    return takes_prompts(reward) and inspect.signature(reward).parameters["prompts"].default is inspect.Parameter.empty


def reward_signature(takes: bool, needs: bool) -> inspect.Signature:
    """The signature that a reward made of rewards shows to samplers.

    Samplers read it to decide whether to pass prompts, and refuse a process that has none where they are needed. A
    reward made of rewards must therefore take and need `prompts` exactly when one of its parts does.

    Args:
        takes: whether the reward takes prompts.
        needs: whether it needs them.

    Returns:
        (samples, /), with a keyword argument prompts where it takes them.
    """
    samples = inspect.Parameter("samples", inspect.Parameter.POSITIONAL_ONLY)
    default = inspect.Parameter.empty if needs else None
    prompts = inspect.Parameter("prompts", inspect.Parameter.KEYWORD_ONLY, default=default)
    return inspect.Signature([samples, prompts] if takes else [samples])


def check_prompts(prompts: Sequence[str], count: int, name: str) -> None:
    """Checks that there is one prompt per sample.

    Args:
        prompts: should be a list of M strings. A single string is refused, also one of M letters.
        count: M.
        name: of the reward, for the message.

    Raises:
        RewardError: for another number of prompts, or a single string.
    """
    if isinstance(prompts, str):
        raise RewardError(
            f"{name} needs a list of {count} prompts, one per sample, got the single string {prompts!r:.200}; put it "
            "in a list"
        )
    if len(prompts) != count:
        raise RewardError(
            f"{name} needs {count} prompts, one per sample, got {len(prompts)}; repeat a prompt for each of its samples"
        )


def score_tensor(scores: Any, rows: int, name: str) -> Tensor:
    """Scores of whatever holds numbers.

    Args:
        scores: a tensor, an array or a list of M numbers.
        rows: M.
        name: of the reward, for messages.

    Returns:
        `[M]`, float64, detached.

    Raises:
        RewardError: for something other than numbers.
        ShapeError: for another number of them.
    """
    try:
        tensor = scores if isinstance(scores, Tensor) else torch.tensor([float(v) for v in scores], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"{name} must return one number per sample, got {type(scores).__name__}; return a list of {rows} numbers"
        ) from error
    if tensor.shape != (rows,):
        raise ShapeError(
            f"{name} must return {rows} scores for {rows} samples, got shape {tuple(tensor.shape)}; return one number "
            "per sample"
        )
    return tensor.detach().double()


def without_gradient(
    call: Scorer, name: str, unit: str | None, version: str, bounds: tuple[float, float] = (-inf, inf)
) -> Scorer:
    """A function as a reward that has no gradient.

    Args:
        call: of samples and prompts to scores; changed in place.
        name: its name in messages.
        unit: of the scores, if they have one.
        version: of the weights behind it.
        bounds: the least and the greatest score.

    Returns:
        The function.
    """
    call.__name__ = call.__qualname__ = name
    vars(call)["spec"] = RewardSpec(unit, bounds, "none", prompts=takes_prompts(call), version=version)
    return call


def refuse_groupwise(reward: Scorer, why: str) -> None:
    """Refuses a reward whose scores depend on the other samples in its call.

    Args:
        reward: any reward.
        why: the problem and its cure, for the message.

    Raises:
        RewardError: for a groupwise reward.
    """
    if spec_of(reward).scope == "groupwise":
        raise RewardError(f"{name_of(reward)} compares samples with the others in its call, {why}")


def gradient_requested(samples: Tensor) -> bool:
    """Whether the caller records a gradient through the samples.

    Args:
        samples: `[M, ...]`.

    Returns:
        True where gradients are enabled and the samples require one.
    """
    return torch.is_grad_enabled() and samples.requires_grad


def refuse_gradient(samples: Tensor, name: str) -> None:
    """Refuses samples that a gradient is recorded through, for a reward that has none.

    Args:
        samples: `[M, ...]`.
        name: of the reward, for the message.

    Raises:
        NotDifferentiableError: where a gradient is requested.
    """
    if gradient_requested(samples):
        raise NotDifferentiableError(
            f"a gradient was requested, but the reward {name} has no gradient; use a sampler or a proposal without "
            "gradients (proposal=steer.bootstrap), or call the reward under torch.no_grad()"
        )


def score(reward: Scorer, samples: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
    """Scores of samples by one reward, checked.

    The reward gets a copy of the samples, and its answer is copied: it may work in place, on what other rewards or a
    trainer still need, or return one buffer again and again. It runs outside the caller's autocast.

    Args:
        reward: any reward.
        samples: `[M, ...]`.
        prompts: M strings; passed on only if the reward has an argument of that name.

    Returns:
        Scores `[M]`, floating point.

    Raises:
        RewardError: if the reward raises, or returns something other than numbers; for another number of prompts.
            steer's own errors pass unchanged.
        ShapeError: if the scores do not have shape `[M]`. All name the reward.
    """
    arguments = {}
    if prompts is not None and takes_prompts(reward):
        check_prompts(prompts, len(samples), name_of(reward))
        arguments = {"prompts": prompts}
    try:
        with without_autocast(samples.device):
            raw = reward(samples.clone(), **arguments)
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
            f"the reward {name_of(reward)} must return one number per sample, got {type(raw).__name__}; return a "
            f"tensor or a list of {samples.shape[0]} numbers"
        ) from error
    if scores.shape != (samples.shape[0],):
        raise ShapeError(
            f"the reward {name_of(reward)} must return shape ({samples.shape[0]},), one score per sample, for samples "
            f"of shape {tuple(samples.shape)}, got {tuple(scores.shape)}; average or sum over the other axes"
        )
    return scores.to(scores.dtype if scores.is_floating_point() else torch.float64, copy=True)  # flags are numbers too


def score_part(whole: str, name: str, reward: Scorer, samples: Tensor, prompts: Sequence[str] | None) -> Tensor:
    """Scores of one part of a combined reward, with a gradient wherever one is requested of the whole.

    Args:
        whole: name of the combined reward, for messages.
        name: name of the part, for messages.
        reward: the part.
        samples: `[M, ...]`.
        prompts: M strings, or None.

    Returns:
        Scores `[M]` on the samples' device.

    Raises:
        NotDifferentiableError: if a gradient is requested and the part has none. Without this check the gradient of
            the other parts would be taken for that of the whole.
    """
    has_none = gradient_requested(samples) and spec_of(reward).gradient == "none"
    scores = None if has_none else score(reward, samples, prompts).to(samples.device)
    if scores is None or (gradient_requested(samples) and not scores.requires_grad):
        raise NotDifferentiableError(
            f"the gradient of {whole} would leave out {name}, whose scores carry none; use a "
            "sampler or a proposal without gradients (proposal=steer.bootstrap), or leave this part out"
        )
    return scores
