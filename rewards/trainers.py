"""Rewards across the border to trainers, both ways; nothing of theirs is imported.

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
from steer.types import RewardSpec

from .scoring import Scorer, name_of, needs_prompts, refuse_gradient, score, spec_of, takes_prompts
from .text import ToText, decode

Columns = Callable[[Sequence[str]], Mapping[str, Sequence[Any]]]
"""From the prompts of samples to what a dataset says of them, one entry per prompt in each column."""


def from_flow_grpo(
    fn: Callable[..., Any],
    *,
    metadata: Callable[[Sequence[str]], Sequence[Any]] | None = None,
    key: str = "avg",
    unit: str | None = None,
    version: str = "",
) -> Scorer:
    """A reward of images from flow_grpo's `fn(images, prompts, metadata) -> (scores, info)`.

    fn: what their factory returns, `pickscore_score(device)` or `multi_score(device, {"ocr": 1.0})`. It gets images
        (M, C, H, W) in [0, 1], a list of M prompts (None from a process without any) and M metadata; a fourth argument,
        as `geneval_score` takes, is yours to bind (functools.partial(fn, only_strict=True)).
    metadata: the datasets' metadata of prompts; {} each where it is left out. key: where the scores are a dict.
    Scores (M,) float64, no gradient (they round to 8 bits). Raises RewardError for what does not score every image.
    """

    def call(samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        refuse_gradient(samples, call.__name__)
        texts = None if prompts is None else list(prompts)
        about = [{} for _ in samples] if metadata is None else list(metadata(texts or []))
        with torch.no_grad():
            answer = fn(samples.detach(), texts, about)
        scores = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(scores, Mapping):
            if key not in scores:
                raise RewardError(f"{call.__name__} has no scores {key!r}, only {sorted(scores)}; pass key=...")
            scores = scores[key]
        return _tensor(scores, len(samples), call.__name__).to(samples.device)

    return _ours(call, f"from_flow_grpo({name_of(fn)})", unit, version)


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

    text: decodes samples (M, L) to M strings, the completions. completion_ids are the samples' tokens, all of them.
    columns: a dataset's other columns for prompts. conversational: prompts and completions are lists of messages, as
        `trl.rewards.think_format_reward` takes them. absent: the score where fn says None, "does not apply"; without it
        that is a RewardError. As in TRL, fn also gets trainer_state (None), log_extra, log_metric (which do nothing).
    Scores (M,) float64, no gradient.
    """

    def call(samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        completions: list[Any] = list(decode(text, samples))
        asked: list[Any] = [""] * len(samples) if prompts is None else list(prompts)
        rest = {} if columns is None else {name: list(column) for name, column in columns(asked).items()}
        if conversational:
            asked = [[{"role": "user", "content": each}] for each in asked]
            completions = [[{"role": "assistant", "content": each}] for each in completions]
        ids = samples.tolist()
        rest |= {"trainer_state": None, "log_extra": _drop, "log_metric": _drop}
        scores = _finished(fn(prompts=asked, completions=completions, completion_ids=ids, **rest))
        missing = [row for row, value in enumerate(scores) if value is None]
        if missing and absent is None:
            raise RewardError(
                f"{call.__name__} gives no score (None) for sample {missing[0]}, {completions[missing[0]]!r}; "
                "a sampler needs one for every sample: pass absent=..."
            )
        return _tensor([absent if v is None else v for v in scores], len(samples), call.__name__).to(samples.device)

    return _ours(call, f"from_trl({name_of(fn)})", unit, version)


def as_flow_grpo(reward: Scorer, *, forbidden: float | None = None) -> Callable[..., tuple[list[float], dict]]:
    """flow_grpo's `fn(images, prompts, metadata) -> (scores, {})` from a reward of images.

    images: a tensor (M, C, H, W) in [0, 1], or an array (M, H, W, C) of uint8, as their own functions take. To use it
    by name in their configuration, put `lambda: as_flow_grpo(reward)` into the table of `multi_score`.
    """
    _refuse_groupwise(reward)

    def fn(images: Any, prompts: Sequence[str], metadata: Any = None) -> tuple[list[float], dict]:
        return _scores(reward, _images(images, name_of(reward)), prompts, forbidden), {}

    return _theirs(fn, reward)


def as_flow_grpo_scores(
    rewards: Mapping[str, Scorer], weights: Mapping[str, float] | None = None, *, forbidden: float | None = None
) -> Callable[..., tuple[dict[str, list[float]], dict]]:
    """flow_grpo's `reward_fn`, as its training scripts call it: each reward by name, and their weighted sum as "avg".

    It stands in for `multi_score(device, {name: weight})`: the scripts train on "avg" (a sum, for all its name) and log
    the rest. weights: 1 each where left out. It ignores metadata and only_strict.
    """
    weight = dict.fromkeys(rewards, 1.0) | dict(weights or {})
    if not rewards or set(weight) != set(rewards) or {"avg", "ori_avg"} & set(rewards):
        raise RewardError(
            f"as_flow_grpo_scores needs rewards by name, none called avg or ori_avg, and weights of those names only, "
            f"got {sorted(rewards)} and weights of {sorted(weights or {})}"
        )
    for reward in rewards.values():
        _refuse_groupwise(reward)

    def reward_fn(
        images: Any, prompts: Sequence[str], metadata: Any = None, only_strict: bool = True
    ) -> tuple[dict[str, list[float]], dict]:
        pixels = _images(images, "as_flow_grpo_scores")
        scores = {name: _scores(reward, pixels, prompts, forbidden) for name, reward in rewards.items()}
        rows = zip(*scores.values(), strict=True)
        total = [sum((weight[name] * value for name, value in zip(scores, row, strict=True)), 0.0) for row in rows]
        scores["avg"] = total
        return scores, {}

    return reward_fn


def as_trl(reward: Scorer, *, pad: int, forbidden: float | None = None) -> Callable[..., list[float | None]]:
    """TRL's `fn(prompts, completions, completion_ids, **columns) -> list[float | None]` from a reward of tokens.

    The reward sees completion_ids (M, L), padded on the right with the token `pad` (tokenizer.pad_token_id), and
    decodes them itself, so one reward serves samplers and trainer. Of a conversational prompt it sees the content of
    the last message.
    """
    _refuse_groupwise(reward)

    def fn(prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any) -> list:
        if completion_ids is None:
            raise RewardError(f"as_trl({name_of(reward)}) scores completion_ids, which TRL passes; got none")
        length = max((len(ids) for ids in completion_ids), default=0)
        tokens = torch.tensor([[*ids, *[pad] * (length - len(ids))] for ids in completion_ids], dtype=torch.long)
        texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        return _scores(reward, tokens.reshape(len(completion_ids), length), texts, forbidden)

    return _theirs(fn, reward)


def as_verl_omni(reward: Scorer, *, forbidden: float | None = None) -> Callable[..., dict[str, float]]:
    """verl-omni's `compute_score(data_source, solution_image, ground_truth, extra_info) -> {"score": float}`.

    solution_image: one image (C, H, W) of uint8. The prompt is ground_truth, where their own PickScore reads it.
    """
    _refuse_groupwise(reward)

    def compute_score(
        data_source: Any = None, solution_image: Any = None, ground_truth: str = "", extra_info: Any = None, **more: Any
    ) -> dict[str, float]:
        image = torch.as_tensor(solution_image)
        if image.dtype != torch.uint8 or image.ndim != 3:
            raise ShapeError(
                f"as_verl_omni({name_of(reward)}) scores one image (C, H, W) of uint8, got {tuple(image.shape)} of "
                f"{image.dtype}"
            )
        return {"score": _scores(reward, image[None].float().div(255), [ground_truth], forbidden)[0]}

    return _theirs(compute_score, reward)


def _refuse_groupwise(reward: Scorer) -> None:
    if spec_of(reward).scope == "groupwise":
        raise RewardError(
            f"{name_of(reward)} compares samples with the others in its call, and trainers' calls are no groups of one "
            "prompt; they normalise within groups themselves: pass the reward inside it"
        )


def _images(images: Any, name: str) -> Tensor:
    """Images (M, C, H, W) in [0, 1] of either form that flow_grpo's functions take."""
    if isinstance(images, Tensor):
        pixels = images.detach()
    else:
        pixels = torch.as_tensor(images)
        if pixels.dtype != torch.uint8:
            raise ShapeError(f"{name} takes a tensor in [0, 1] or an array of uint8, got an array of {pixels.dtype}")
        pixels = pixels.movedim(-1, 1).float().div(255) if pixels.ndim == 4 else pixels
    if pixels.ndim != 4:
        raise ShapeError(f"{name} takes images (M, C, H, W), or an array (M, H, W, C), got {tuple(pixels.shape)}")
    return pixels.float() if pixels.element_size() < 4 else pixels


@torch.no_grad()
def _scores(reward: Scorer, samples: Tensor, prompts: Sequence[str] | None, forbidden: float | None) -> list[float]:
    """Finite scores of one of our rewards; -inf becomes `forbidden`."""
    texts = list(prompts) if prompts is not None and takes_prompts(reward) else None
    if texts is None and needs_prompts(reward):
        raise RewardError(f"{name_of(reward)} needs prompts and the trainer passed none")
    scores = [float(value) for value in score(reward, samples, texts)]
    scores = [forbidden if value == -torch.inf and forbidden is not None else value for value in scores]
    for row, value in enumerate(scores):
        if not isfinite(value):
            cure = "pass forbidden=..., the score of what it forbids" if value == -torch.inf else "look into the reward"
            raise NonFiniteError(
                f"{name_of(reward)} scored sample {row} {value}: every advantage of its group becomes NaN; {cure}"
            )
    return scores


def _tensor(scores: Any, rows: int, name: str) -> Tensor:
    """Scores (M,), float64, of whatever holds M numbers."""
    try:
        tensor = scores if isinstance(scores, Tensor) else torch.tensor([float(v) for v in scores], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise RewardError(f"{name} must return one number per sample, got {type(scores).__name__}") from error
    if tensor.shape != (rows,):
        raise ShapeError(f"{name} must return {rows} scores for {rows} samples, got shape {tuple(tensor.shape)}")
    return tensor.detach().double()


def _finished(answer: Any) -> list:
    """The answer of a function that may be asynchronous, also from inside a running loop (a notebook's)."""
    if not inspect.isawaitable(answer):
        return list(answer)

    async def wait() -> Any:
        return await answer

    with ThreadPoolExecutor(1) as pool:
        return list(pool.submit(asyncio.run, wait()).result())


def _drop(*columns: Any) -> None:
    """Logs nothing."""


def _ours(call: Scorer, name: str, unit: str | None, version: str) -> Scorer:
    call.__name__ = call.__qualname__ = name
    vars(call)["spec"] = RewardSpec(unit=unit, gradient="none", prompts=True, version=version)
    return call


def _theirs(fn: Callable[..., Any], reward: Scorer) -> Callable[..., Any]:
    """`fn` under the reward's name, which trainers log by."""
    fn.__name__ = fn.__qualname__ = name_of(reward)
    return fn
