"""How rewards that are made of rewards call them: one place for names, prompts, exceptions and shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.errors import RewardError, ShapeError, SteerError

Scorer = Callable[..., Any]
"""A reward: samples (M, *event) or images (M, C, H, W), and prompts if it names them, to one score per sample."""


def name_of(reward: Scorer) -> str:
    """What messages call a reward: its `__name__`, or the name of its class."""
    return getattr(reward, "__name__", None) or type(reward).__name__


def unit_of(reward: Scorer) -> str | None:
    """The unit that a reward declares in its attribute `unit`; None for plain functions."""
    return getattr(reward, "unit", None)


def takes_prompts(reward: Scorer) -> bool:
    """Whether a reward names the argument `prompts`."""
    try:
        return "prompts" in inspect.signature(reward).parameters
    except (TypeError, ValueError):  # a callable written in C
        return False


def signature(wants_prompts: bool) -> inspect.Signature:
    """The signature of a reward that does or does not want prompts.

    Samplers read it to decide whether to hand prompts over, and refuse a process that has none. A reward made of
    rewards must therefore name `prompts` exactly when one of its parts does.
    """
    samples = inspect.Parameter("samples", inspect.Parameter.POSITIONAL_ONLY)
    prompts = inspect.Parameter("prompts", inspect.Parameter.KEYWORD_ONLY, default=None)
    return inspect.Signature([samples, prompts] if wants_prompts else [samples])


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
    return scores
