"""Wrappers around any reward: fewer at a time, frame by frame, a deadline, full precision; and rewards of PIL images.

All but the last keep the wrapped reward's spec and closed form, take prompts exactly when the reward does, and carry
its name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import inf
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from steer.errors import RewardError, ShapeError

from .pil_images import to_rgb
from .scoring import (
    Scorer,
    check_prompts,
    name_of,
    needs_prompts,
    refuse_groupwise,
    reward_signature,
    score,
    score_tensor,
    takes_prompts,
    without_gradient,
)


def chunked(reward: Scorer, rows: int) -> Scorer:
    """The reward called on at most `rows` samples at a time, in order: less memory, the same scores.

    Args:
        reward: any reward whose scores do not depend on the other samples in the call.
        rows: most samples in one call, >= 1.

    Returns:
        A reward with scores `[M]`.

    Raises:
        RewardError: for rows < 1, and for a groupwise reward, whose scores chunks would change.
        ShapeError: when called, where a chunk does not give one score per sample.
    """
    if rows < 1:
        raise RewardError(f"chunked(reward, rows) needs rows >= 1, got {rows}")
    refuse_groupwise(reward, "so chunks would change its scores; chunk the reward inside it")

    def call(samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        if prompts is not None:
            check_prompts(prompts, len(samples), name_of(reward))
        starts = range(0, max(len(samples), 1), rows)  # one call also for no samples: it sets dtype and device
        chunks = ((samples[i : i + rows], None if prompts is None else prompts[i : i + rows]) for i in starts)
        return torch.cat([score(reward, chunk, texts) for chunk, texts in chunks])

    return _renamed(reward, call, f"chunked({name_of(reward)}, {rows})")


def per_frame(reward: Scorer, every: int = 1) -> Scorer:
    """A reward of images, for videos: the mean of its scores over every `every`-th frame.

    Args:
        reward: of images `[M, C, H, W]`. It is called once, on all frames that are scored, with the prompts of their
            videos.
        every: 1 scores all frames, 2 every second one, and so on.

    Returns:
        A reward of videos `[M, F, C, H, W]` with scores `[M]`.

    Raises:
        RewardError: for every < 1, and for a groupwise reward, which would compare frames of one video.
        ShapeError: when called, for samples that are no videos.
    """
    if every < 1:
        raise RewardError(f"per_frame(reward, every) needs every >= 1, got {every}")
    refuse_groupwise(
        reward,
        "and with per_frame those would be frames of one video; apply per_frame to the reward inside it instead",
    )

    def call(samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        if samples.ndim != 5:
            raise ShapeError(
                f"per_frame scores videos (M, F, C, H, W), got {tuple(samples.shape)}; give the process a decoder that "
                "makes videos, or use the reward without per_frame for images"
            )
        if prompts is not None:
            check_prompts(prompts, len(samples), name_of(reward))
        frames = samples[:, ::every]
        texts = None if prompts is None else [text for text in prompts for _ in range(frames.shape[1])]
        return score(reward, frames.flatten(0, 1), texts).view(frames.shape[:2]).mean(1)

    return _renamed(reward, call, f"per_frame({name_of(reward)})")


def timeout(reward: Scorer, seconds: float) -> Scorer:
    """The reward with a deadline: a call that takes longer raises RewardError. Usable from any thread.

    Python cannot stop the call itself: it continues in a daemon thread, keeping its memory, until it returns or the
    program ends (which does not wait for it). Limit what can be limited inside, such as network requests. The call
    sees the caller's grad mode and CUDA stream, but no other state of the thread.

    Args:
        reward: any reward.
        seconds: the most that one call may take; positive and finite.

    Returns:
        A reward with scores `[M]`.

    Raises:
        RewardError: for seconds that are not positive and finite; when called, where the deadline passes.
    """
    if not 0.0 < seconds <= threading.TIMEOUT_MAX:
        raise RewardError(f"timeout(reward, seconds) needs a positive, finite number of seconds, got {seconds}")

    def call(samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        grad = torch.is_grad_enabled()
        on_cuda = samples.device.type == "cuda"
        stream = torch.cuda.stream(torch.cuda.current_stream(samples.device)) if on_cuda else nullcontext()
        result_queue: SimpleQueue[Tensor | BaseException] = SimpleQueue()

        def work() -> None:
            try:
                with torch.set_grad_enabled(grad), stream:
                    result_queue.put(score(reward, samples, prompts))
            except BaseException as error:  # raised again in the caller's thread
                result_queue.put(error)

        threading.Thread(target=work, name=f"timeout {name_of(reward)}", daemon=True).start()
        try:
            result = result_queue.get(timeout=seconds)
        except Empty:
            raise RewardError(
                f"the reward {name_of(reward)} gave no answer within {seconds:g} s on samples of shape "
                f"{tuple(samples.shape)}; allow it more seconds, give it fewer samples at a time with "
                "rewards.chunked(reward, rows), or find out what it waits for"
            ) from None
        if isinstance(result, BaseException):
            raise result
        return result

    return _renamed(reward, call, f"timeout({name_of(reward)}, {seconds:g})")


def full_precision(reward: Scorer) -> Scorer:
    """The reward on samples of at least float32: half-precision samples are cast, others pass unchanged.

    Half precision makes ties (bfloat16 has 52 numbers in [0.19, 0.24], a range of CLIP similarities), and ties are
    noise to a sampler. A reward whose own network runs in half precision has to cast inside.

    Args:
        reward: any reward.

    Returns:
        A reward with scores `[M]`.
    """

    def call(samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        half = samples.is_floating_point() and samples.element_size() < 4
        return score(reward, samples.float() if half else samples, prompts)

    return _renamed(reward, call, f"full_precision({name_of(reward)})")


def from_pil(
    fn: Callable[..., Any],
    *,
    unit: str | None = None,
    bounds: tuple[float, float] = (-inf, inf),
    version: str = "",
) -> Scorer:
    """A reward of images from a function of PIL images.

    Args:
        fn: from a list of M PIL images, RGB, to M numbers. Where it has an argument `prompts`, it gets M strings too.
        unit: of the scores, if they have one.
        bounds: the least and the greatest score.
        version: of the weights behind fn, which a cached score must match.

    Returns:
        A reward of images `[M, 1 or 3, H, W]` in [0, 1] with scores `[M]`, float64, without a gradient: PIL images are
        rounded to 8 bits.

    Raises:
        RewardError: where fn is no function; when called, for pixels that are NaN or outside [0, 1], and where fn does
            not give one number per image.
        ShapeError: when called, for other samples, and for another number of scores.
    """
    if not callable(fn):
        raise RewardError(f"from_pil(fn) takes a function of a list of PIL images, got {type(fn).__name__}")
    name = f"from_pil({name_of(fn)})"

    def call(samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        arguments = {}
        if prompts is not None and takes_prompts(fn):
            check_prompts(prompts, len(samples), name)
            arguments = {"prompts": list(prompts)}
        pictures = to_rgb(samples, name)
        with torch.no_grad():
            return score_tensor(fn(pictures, **arguments), len(samples), name).to(samples.device)

    vars(call)["__signature__"] = reward_signature(takes_prompts(fn), needs_prompts(fn))
    return without_gradient(call, name, unit, version, bounds)


def _renamed(reward: Scorer, call: Scorer, name: str) -> Scorer:
    """The function `call` as a reward, with the spec, closed form and prompts of `reward`."""
    call.__name__ = call.__qualname__ = name
    call.__doc__ = reward.__doc__
    vars(call)["__signature__"] = reward_signature(takes_prompts(reward), needs_prompts(reward))
    vars(call).update({key: getattr(reward, key) for key in ("spec", "quadratic_form") if hasattr(reward, key)})
    return call
