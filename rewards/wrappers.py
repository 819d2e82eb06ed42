"""Rewards around rewards: fewer samples at a time, frame by frame, a deadline, full precision.

Each keeps the wrapped reward's spec, closed form and wish for prompts, and carries its name.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from steer.errors import RewardError, ShapeError

from .scoring import Scorer, name_of, needs_prompts, score, signature, spec_of, takes_prompts


def chunked(reward: Scorer, rows: int) -> Scorer:
    """The reward called on at most `rows` samples at a time, in order: less memory, the same scores (M,).

    Every chunk must give one score per sample; ShapeError names the reward where it does not. RewardError for a
    groupwise reward, whose scores chunks would change.
    """
    if rows < 1:
        raise RewardError(f"chunked(reward, rows) needs rows >= 1, got {rows}")
    if spec_of(reward).scope == "groupwise":
        raise RewardError(
            f"{name_of(reward)} compares samples with the others in its call, so chunks would change its scores; "
            "chunk the reward inside it"
        )

    def call(samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        starts = range(0, max(len(samples), 1), rows)  # no samples are still one call, which knows dtype and device
        chunks = ((samples[i : i + rows], None if prompts is None else prompts[i : i + rows]) for i in starts)
        return torch.cat([score(reward, chunk, texts) for chunk, texts in chunks])

    return _like(reward, call, f"chunked({name_of(reward)}, {rows})")


def per_frame(reward: Scorer, every: int = 1) -> Scorer:
    """The reward of images on videos (M, F, C, H, W): the mean of its scores over every `every`-th frame.

    Prompts are those of the videos. Called once, on all frames that are scored.
    """
    if every < 1:
        raise RewardError(f"per_frame(reward, every) needs every >= 1, got {every}")
    if spec_of(reward).scope == "groupwise":
        raise RewardError(
            f"{name_of(reward)} scores a sample against the others in its call, and per_frame would make them frames "
            "of one video: give it per_frame(...) of the reward inside it instead"
        )

    def call(samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        if samples.ndim != 5:
            raise ShapeError(f"per_frame scores videos (M, F, C, H, W), got {tuple(samples.shape)}")
        frames = samples[:, ::every]
        texts = None if prompts is None else [text for text in prompts for _ in range(frames.shape[1])]
        return score(reward, frames.flatten(0, 1), texts).view(frames.shape[:2]).mean(1)

    return _like(reward, call, f"per_frame({name_of(reward)})")


def timeout(reward: Scorer, seconds: float) -> Scorer:
    """The reward with a deadline: a call that takes longer raises RewardError, from any thread.

    Python cannot stop the call itself: it goes on in a daemon thread, holding what it holds, until it returns or the
    program ends (which does not wait for it). Bound what can be bounded inside, such as network requests. The call
    sees the caller's grad mode and CUDA stream; other state that belongs to a thread, such as autocast, it does not.
    """
    if not 0.0 < seconds <= threading.TIMEOUT_MAX:
        raise RewardError(f"timeout(reward, seconds) needs a positive, finite number of seconds, got {seconds}")

    def call(samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        grad = torch.is_grad_enabled()
        on_cuda = samples.device.type == "cuda"
        stream = torch.cuda.stream(torch.cuda.current_stream(samples.device)) if on_cuda else nullcontext()
        answer: SimpleQueue[Tensor | BaseException] = SimpleQueue()

        def work() -> None:
            try:
                with torch.set_grad_enabled(grad), stream:
                    answer.put(score(reward, samples, prompts))
            except BaseException as error:  # raised again by the caller, where it belongs
                answer.put(error)

        threading.Thread(target=work, name=f"timeout {name_of(reward)}", daemon=True).start()
        try:
            result = answer.get(timeout=seconds)
        except Empty:
            raise RewardError(
                f"the reward {name_of(reward)} gave no answer within {seconds:g} s on samples of shape "
                f"{tuple(samples.shape)}; allow it more seconds, give it fewer samples at a time with "
                "rewards.chunked(reward, rows), or look for what it waits on"
            ) from None
        if isinstance(result, BaseException):
            raise result
        return result

    return _like(reward, call, f"timeout({name_of(reward)}, {seconds:g})")


def full_precision(reward: Scorer) -> Scorer:
    """The reward on samples of at least float32: half-precision ones are cast, others pass unchanged.

    Half precision makes ties (bfloat16 has 52 numbers in [0.19, 0.24], a range of CLIP similarities), and ties are
    noise to a sampler. A reward whose own network runs in half precision has to cast inside.
    """

    def call(samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        half = samples.is_floating_point() and samples.element_size() < 4
        return score(reward, samples.float() if half else samples, prompts)

    return _like(reward, call, f"full_precision({name_of(reward)})")


def _like(reward: Scorer, call: Scorer, name: str) -> Scorer:
    """`call`, standing in for the reward under another name."""
    call.__name__ = call.__qualname__ = name
    call.__doc__ = reward.__doc__
    vars(call)["__signature__"] = signature(takes_prompts(reward), needs_prompts(reward))
    vars(call).update({key: getattr(reward, key) for key in ("spec", "quadratic_form") if hasattr(reward, key)})
    return call
