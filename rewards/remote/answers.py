"""Replies to requests whose turn has come: read, scored by one call of their reward where that may be, split again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steer.errors import RewardError, SteerError

from ..scoring import Scorer, name_of, score, spec_of
from .scoring_queue import Body, Memory, Reply
from .wire_format import Limits, decode_samples, encode_scores, max_decoded_bytes, read_request


@dataclass(eq=False)
class Asked:
    """A request for scores that waits for its turn.

    Args:
        reward: that is asked.
        body: of the request.
        max_pixels: numbers that its samples may have.
    """

    reward: Scorer
    body: Body
    max_pixels: int

    @cached_property
    def size(self) -> Size | None:
        """Read off its header; None where that is malformed."""
        try:
            request = read_request(self.body.data, self.max_pixels)
        except RewardError:
            return None
        return Size(len(request.parts), request.decoded_bytes)

    def decoded(self) -> tuple[Tensor, list[str] | None]:
        """Its samples and prompts. The body is released."""
        try:
            request = read_request(self.body.data, self.max_pixels)
            return decode_samples(request, self.max_pixels), request.prompts
        finally:
            self.body.release()


class Size(NamedTuple):
    """Of a request.

    Args:
        rows: samples.
        decoded_bytes: the most memory that decoding takes, its result included.
    """

    rows: int
    decoded_bytes: int


class Answers:
    """Answers requests, several by one call of a pointwise reward.

    Args:
        memory: that decoded samples are counted in.
        limits: of one request. Those answered together take no more memory than the largest.
        batch: rows of one call of a reward, over several requests; 1 makes a call for each.
    """

    def __init__(self, memory: Memory, limits: Limits, batch: int) -> None:
        self.memory, self.batch, self.most = memory, batch, max_decoded_bytes(limits)

    def joins(self, taken: Sequence[Asked], other: Asked) -> bool:
        """Whether a request that waits is answered together with those."""
        if self.batch == 1 or other.reward is not taken[0].reward or spec_of(other.reward).scope == "groupwise":
            return False
        sizes = [each.size for each in (*taken, other)]
        known = [size for size in sizes if size is not None]
        rows, space = sum(size.rows for size in known), sum(size.decoded_bytes for size in known)
        return len(known) == len(sizes) and rows <= self.batch and space <= self.most

    def __call__(self, asked: Sequence[Asked]) -> list[Reply]:
        """The replies to requests of one reward, in order. It never raises."""
        replies: dict[int, Reply] = {}
        samples: dict[int, Tensor] = {}
        prompts: dict[int, list[str] | None] = {}
        with self.memory.decoding(sum(each.size.decoded_bytes for each in asked if each.size)):
            for i, each in enumerate(asked):
                try:
                    samples[i], prompts[i] = each.decoded()
                except SteerError as error:
                    replies[i] = _error(400, str(error))
                except BaseException as error:
                    replies[i] = _fault(error)
            kinds: dict[Any, list[int]] = {}
            for i, own in samples.items():
                kinds.setdefault((own.shape[1:], own.dtype, prompts[i] is None), []).append(i)
            for members in kinds.values():
                replies |= _scored(asked[0].reward, members, samples, prompts)
        return [replies[i] for i in range(len(asked))]


def _scored(
    reward: Scorer, members: list[int], samples: dict[int, Tensor], prompts: dict[int, list[str] | None]
) -> dict[int, Reply]:
    """The replies to requests of one shape, by one call; where that fails each has its own, so that a bad one is alone.

    Takes its samples out of `samples`.
    """
    if len(members) == 1:
        (i,) = members
        return {i: _alone(reward, samples.pop(i), prompts[i])}
    rows = [len(samples[i]) for i in members]
    whole = torch.cat([samples.pop(i) for i in members])
    texts = None if prompts[members[0]] is None else [text for i in members for text in prompts[i] or ()]
    try:
        parts = _scores(reward, whole, texts).split(rows)
        return {i: _reply(reward, part) for i, part in zip(members, parts, strict=True)}
    except BaseException:
        each = zip(members, whole.split(rows), strict=True)
        return {i: _alone(reward, part, prompts[i]) for i, part in each}


def _alone(reward: Scorer, samples: Tensor, prompts: list[str] | None) -> Reply:
    """The reply to one request."""
    try:
        return _reply(reward, _scores(reward, samples, prompts))
    except SteerError as error:
        return _error(500, str(error))
    except BaseException as error:
        return _fault(error)


def _scores(reward: Scorer, samples: Tensor, prompts: list[str] | None) -> Tensor:
    with torch.no_grad():
        return score(reward, samples, prompts)


def _reply(reward: Scorer, scores: Tensor) -> Reply:
    return 200, encode_scores(scores, name_of(reward), spec_of(reward).version)


def _fault(error: BaseException) -> Reply:
    """Of the server: the client is told, and does not retry."""
    return _error(500, f"{type(error).__name__}: {error}")


def _error(status: int, message: str) -> Reply:
    return status, json.dumps({"error": message, "status": status}).encode()
