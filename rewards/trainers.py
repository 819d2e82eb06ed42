"""Conversions between trainers' reward functions and rewards here; no trainer is imported.

    from_flow_grpo, from_trl                               a trainer's reward function as one of ours
    as_flow_grpo, as_flow_grpo_scores, as_trl, as_verl_omni     one of ours as the trainer's

Trainers average rewards over groups, so none of them can use -inf, which forbids a sample here: what goes out is finite
(`forbidden` says what -inf becomes) or an error. What comes in has no gradient.
Signatures read at yifan123/flow_grpo@ac4c86e, huggingface/trl@f2cd577, verl-project/verl-omni@a1139ba:
docs/exporters.md.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from steer.errors import NonFiniteError, RewardError, ShapeError

from .image_checks import check_images, check_range, from_any_layout
from .scoring import (
    Scorer,
    check_prompts,
    name_of,
    needs_prompts,
    refuse_gradient,
    refuse_groupwise,
    score,
    score_tensor,
    takes_prompts,
    without_gradient,
)
from .text import ToText, decode

Columns = Callable[[Sequence[str]], Mapping[str, Sequence[Any]]]
"""From the prompts of samples to further columns of a dataset, each with one entry per prompt."""

_NOT_GROUPS_OF_ONE_PROMPT = (
    "and a trainer's calls are not groups of one prompt; trainers normalise within groups themselves: pass the reward "
    "inside it"
)


def from_flow_grpo(
    fn: Callable[..., Any],
    *,
    metadata: Callable[[Sequence[str]], Sequence[Any]] | None = None,
    key: str = "avg",
    unit: str | None = None,
    version: str = "",
) -> Scorer:
    """A reward of images from flow_grpo's `fn(images, prompts, metadata) -> (scores, info)`.

    Args:
        fn: what their factory returns, `pickscore_score(device)` or `multi_score(device, {"ocr": 1.0})`. It gets images
            `[M, C, H, W]` in [0, 1], a list of M prompts (None from a process without any) and M metadata. Bind a
            fourth argument, as `geneval_score` takes, yourself (functools.partial(fn, only_strict=True)).
        metadata: from prompts to the dataset's metadata of each; None for {} each.
        key: which scores to take where fn returns a dictionary of them.
        unit: of the scores, if they have one.
        version: of the weights behind fn, which a cached score must match.

    Returns:
        A reward with scores `[M]`, float64, without a gradient (their functions round to 8 bits).

    Raises:
        RewardError: when called, where fn does not give one number per image, or has no scores called `key`; for
            pixels that are NaN or outside [0, 1], which their functions would clamp.
        ShapeError: when called, for another number of scores.
    """

    def call(samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        refuse_gradient(samples, call.__name__)
        images = check_images(samples, call.__name__, channels=(1, 3)).detach()
        check_range(images, call.__name__, nan_passes=False)
        texts = _texts(prompts, len(samples), call.__name__)
        metadata_of_rows = [{} for _ in samples] if metadata is None else list(metadata(texts or []))
        with torch.no_grad():
            answer = fn(images.clone(), texts, metadata_of_rows)
        scores = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(scores, Mapping):
            if key not in scores:
                raise RewardError(
                    f"{call.__name__} returned no scores called {key!r}; it returned {sorted(scores)}: pass one of "
                    "these as key=..."
                )
            scores = scores[key]
        return score_tensor(scores, len(samples), call.__name__).to(samples.device)

    return without_gradient(call, f"from_flow_grpo({name_of(fn)})", unit, version)


def from_trl(
    fn: Callable[..., Any],
    text: ToText,
    *,
    columns: Columns | None = None,
    conversational: bool = False,
    absent: float | None = None,
    unit: str | None = None,
    version: str = "",
) -> Scorer:
    """A reward of tokens from TRL's `fn(prompts, completions, **columns) -> list[float | None]`, sync or async.

    As in TRL, fn also gets completion_ids (the samples' tokens, all of them), trainer_state (None), and log_extra and
    log_metric (which do nothing).

    Args:
        fn: TRL's reward function.
        text: from tokens `[M, L]` to M strings, the completions.
        columns: from prompts to the dataset's other columns.
        conversational: whether prompts and completions are passed as lists of messages, as
            `trl.rewards.think_format_reward` takes them.
        absent: the score where fn returns None ("does not apply"); None makes that a RewardError.
        unit: of the scores, if they have one.
        version: of the weights behind fn, which a cached score must match.

    Returns:
        A reward with scores `[M]`, float64, without a gradient.

    Raises:
        RewardError: when called, where fn does not give one number per sample.
        ShapeError: when called, for another number of scores.
    """

    def call(samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        completions: list[Any] = list(decode(text, samples))
        asked: list[Any] = _texts(prompts, len(samples), call.__name__) or [""] * len(samples)
        rest = {} if columns is None else {name: list(column) for name, column in columns(asked).items()}
        if conversational:
            asked = [[{"role": "user", "content": each}] for each in asked]
            completions = [[{"role": "assistant", "content": each}] for each in completions]
        ids = samples.tolist()
        rest |= {"trainer_state": None, "log_extra": _log_nothing, "log_metric": _log_nothing}
        scores = _awaited(fn(prompts=asked, completions=completions, completion_ids=ids, **rest))
        missing = [row for row, value in enumerate(scores) if value is None]
        if missing and absent is None:
            raise RewardError(
                f"{call.__name__} gives no score (None) for sample {missing[0]}, {completions[missing[0]]!r}; "
                "a sampler needs one for every sample: pass absent=..., the score of such samples"
            )
        filled = [absent if value is None else value for value in scores]
        return score_tensor(filled, len(samples), call.__name__).to(samples.device)

    return without_gradient(call, f"from_trl({name_of(fn)})", unit, version)


def as_flow_grpo(reward: Scorer, *, forbidden: float | None = None) -> Callable[..., tuple[list[float], dict]]:
    """flow_grpo's `fn(images, prompts, metadata) -> (scores, {})` from a reward of images.

    To use it by name in their configuration, put `lambda: as_flow_grpo(reward)` into the table of `multi_score`.

    Args:
        reward: of images `[M, C, H, W]` in [0, 1].
        forbidden: the score that -inf becomes; None makes that an error.

    Returns:
        A function of images, a tensor `[M, C, H, W]` in [0, 1] or an array `[M, H, W, C]` of uint8 (as their own
        functions take; either may have its channels first or last, and be of uint8), to M scores and an empty
        dictionary.

    Raises:
        RewardError: for a groupwise reward; when called, where the reward needs prompts and none come.
        NonFiniteError: when called, for a score that is not finite.
        ShapeError: when called, for other images.
        RewardError: when called, for pixels that are NaN or outside [0, 1].
    """
    refuse_groupwise(reward, _NOT_GROUPS_OF_ONE_PROMPT)

    def fn(images: Any, prompts: Sequence[str], metadata: Any = None) -> tuple[list[float], dict]:
        return _finite_scores(reward, from_any_layout(images, name_of(reward)), prompts, forbidden), {}

    return _named_after(fn, reward)


def as_flow_grpo_scores(
    rewards: Mapping[str, Scorer], weights: Mapping[str, float] | None = None, *, forbidden: float | None = None
) -> Callable[..., tuple[dict[str, list[float]], dict]]:
    """flow_grpo's `reward_fn`, as its training scripts call it: each reward by name, and their weighted sum as "avg".

    It stands in for `multi_score(device, {name: weight})`: the scripts train on "avg" (a sum, in spite of its name) and
    log the rest. It ignores metadata and only_strict.

    Args:
        rewards: by name, none called "avg" or "ori_avg".
        weights: by the same names; 1 for a name that is left out.
        forbidden: the score that -inf becomes; None makes that an error.

    Returns:
        A function of images, prompts and metadata to a dictionary of M scores each, and an empty one.

    Raises:
        RewardError: for no rewards, other names of weights, and groupwise rewards.
        NonFiniteError: when called, for a score that is not finite.
        ShapeError: when called, for other images.
        RewardError: when called, for pixels that are NaN or outside [0, 1].
    """
    weight = dict.fromkeys(rewards, 1.0) | dict(weights or {})
    if not rewards or set(weight) != set(rewards) or {"avg", "ori_avg"} & set(rewards):
        raise RewardError(
            f"as_flow_grpo_scores needs rewards by name, none called avg or ori_avg, and weights of those names only, "
            f"got {sorted(rewards)} and weights of {sorted(weights or {})}"
        )
    for reward in rewards.values():
        refuse_groupwise(reward, _NOT_GROUPS_OF_ONE_PROMPT)

    def reward_fn(
        images: Any, prompts: Sequence[str], metadata: Any = None, only_strict: bool = True
    ) -> tuple[dict[str, list[float]], dict]:
        pixels = from_any_layout(images, "as_flow_grpo_scores")
        scores = {name: _finite_scores(reward, pixels, prompts, forbidden) for name, reward in rewards.items()}
        rows = zip(*scores.values(), strict=True)
        total = [sum((weight[name] * value for name, value in zip(scores, row, strict=True)), 0.0) for row in rows]
        scores["avg"] = total
        return scores, {}

    return reward_fn


def as_trl(reward: Scorer, *, pad: int, forbidden: float | None = None) -> Callable[..., list[float | None]]:
    """TRL's `fn(prompts, completions, completion_ids, **columns) -> list[float | None]` from a reward of tokens.

    The reward decodes the tokens itself, so the same reward serves samplers and trainer. Of a conversational prompt it
    sees the content of the last message.

    Args:
        reward: of tokens `[M, L]`.
        pad: the token that completion_ids are padded with on the right (tokenizer.pad_token_id).
        forbidden: the score that -inf becomes; None makes that an error.

    Returns:
        TRL's reward function, which gives M numbers.

    Raises:
        RewardError: for a groupwise reward; when called, without completion_ids.
        NonFiniteError: when called, for a score that is not finite.
    """
    refuse_groupwise(reward, _NOT_GROUPS_OF_ONE_PROMPT)

    def fn(prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any) -> list:
        if completion_ids is None:
            raise RewardError(
                f"as_trl({name_of(reward)}) scores completion_ids, got none; TRL's trainers pass them, so pass them "
                "too where you call it yourself"
            )
        length = max((len(ids) for ids in completion_ids), default=0)
        padded = [[*ids, *[pad] * (length - len(ids))] for ids in completion_ids]
        tokens = torch.tensor(padded, dtype=torch.long).reshape(len(completion_ids), length)
        if isinstance(prompts, str):
            check_prompts(prompts, len(completion_ids), name_of(reward))
        texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        return _finite_scores(reward, tokens, texts, forbidden)

    return _named_after(fn, reward)


def as_verl_omni(reward: Scorer, *, forbidden: float | None = None) -> Callable[..., dict[str, float]]:
    """verl-omni's `compute_score(data_source, solution_image, ground_truth, extra_info)` from a reward of images.

    The prompt is ground_truth, where their own PickScore reads it.

    Args:
        reward: of images `[M, C, H, W]` in [0, 1].
        forbidden: the score that -inf becomes; None makes that an error.

    Returns:
        A function of one solution_image `[C, H, W]` or `[H, W, C]` of uint8, to {"score": number}.

    Raises:
        RewardError: for a groupwise reward.
        NonFiniteError: when called, for a score that is not finite.
        ShapeError: when called, for another image.
    """
    refuse_groupwise(reward, _NOT_GROUPS_OF_ONE_PROMPT)

    def compute_score(
        data_source: Any = None, solution_image: Any = None, ground_truth: str = "", extra_info: Any = None, **more: Any
    ) -> dict[str, float]:
        image = torch.as_tensor(solution_image)
        if image.dtype != torch.uint8 or image.ndim != 3:
            raise ShapeError(
                f"as_verl_omni({name_of(reward)}) scores one image (C, H, W) of uint8, got {tuple(image.shape)} of "
                f"{image.dtype}; pass verl-omni's solution_image as it is"
            )
        images = from_any_layout(image[None], f"as_verl_omni({name_of(reward)})")
        return {"score": _finite_scores(reward, images, [ground_truth], forbidden)[0]}

    return _named_after(compute_score, reward)


def _texts(prompts: Sequence[str] | None, count: int, name: str) -> list[str] | None:
    """Prompts as a list, checked; None where there are none."""
    if prompts is None:
        return None
    check_prompts(prompts, count, name)
    return list(prompts)


@torch.no_grad()
def _finite_scores(
    reward: Scorer, samples: Tensor, prompts: Sequence[str] | None, forbidden: float | None
) -> list[float]:
    """M finite scores of one of our rewards; -inf becomes `forbidden`."""
    texts = _texts(prompts, len(samples), name_of(reward)) if takes_prompts(reward) else None
    if texts is None and needs_prompts(reward):
        raise RewardError(f"{name_of(reward)} needs prompts and the trainer passed none; pass one per sample")
    scores = [float(value) for value in score(reward, samples, texts)]
    scores = [forbidden if value == -torch.inf and forbidden is not None else value for value in scores]
    for row, value in enumerate(scores):
        if not isfinite(value):
            cure = (
                "pass forbidden=..., the score that -inf becomes"
                if value == -torch.inf
                else "look into the reward, which must return finite numbers"
            )
            raise NonFiniteError(
                f"{name_of(reward)} must give finite scores to a trainer, and scored sample {row} {value}: every "
                f"advantage of its group would become NaN; {cure}"
            )
    return scores


def _awaited(answer: Any) -> list:
    """The answer of a function that may be asynchronous, also from inside a running event loop (a notebook's)."""
    if not inspect.isawaitable(answer):
        return list(answer)

    async def wait() -> Any:
        return await answer

    with ThreadPoolExecutor(1) as pool:
        return list(pool.submit(asyncio.run, wait()).result())


def _log_nothing(*columns: Any) -> None:
    """What log_extra and log_metric are here."""


def _named_after(fn: Callable[..., Any], reward: Scorer) -> Callable[..., Any]:
    """`fn` under the reward's name, which trainers log by."""
    fn.__name__ = fn.__qualname__ = name_of(reward)
    return fn
