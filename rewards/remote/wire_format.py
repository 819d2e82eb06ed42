"""The bytes between `rewards.Remote` and `rewards.serve`: a JSON header, then PNG files or one safetensors file.

A request is 4 bytes (the length of the header, big-endian), the header, and the parts one after the other. The header
is {"encoding": "png" | "tensor", "sizes": [bytes of each part], "prompts": [...] or null}. A reply is the JSON object
{"name", "version", "scores"} where a score is a number, "-inf", "inf", or null for NaN. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.types import RewardSpec

from ..pil_images import from_png, png_shape, to_pictures, to_png
from ..scoring import refuse_gradient

PROTOCOL = 1
HEADER_LIMIT = 1 << 20
Encoding = Literal["png", "tensor"]


class Limits(NamedTuple):
    """What a server takes in one request: its length in bytes, and the numbers (M C H W) of all its samples."""

    bytes: int
    pixels: int


def encode_parts(samples: Tensor, encoding: Encoding, name: str) -> list[bytes]:
    """One body per sample: PNG, which rounds images in [0, 1] to 8 bits and loses nothing else, or exact floats."""
    if encoding == "png":
        return [to_png(picture) for picture in to_pictures(samples, name)]
    from safetensors.torch import save

    refuse_gradient(samples, name)
    return [save({"sample": sample.contiguous()}) for sample in samples.detach().cpu()]


def encode_request(parts: Sequence[bytes], prompts: Sequence[str] | None, encoding: Encoding) -> bytes:
    """A request for the scores of the parts."""
    sizes = [len(part) for part in parts]
    header = json.dumps({"encoding": encoding, "sizes": sizes, "prompts": None if prompts is None else list(prompts)})
    raw = header.encode()
    return b"".join([len(raw).to_bytes(4, "big"), raw, *parts])


def decode_request(body: bytes, max_pixels: int) -> tuple[Tensor, list[str] | None]:
    """Samples (M, ...) and their prompts; RewardError naming what is malformed.

    max_pixels: numbers that all samples may have together. It is checked on the headers of the PNG files before one is
    decoded, so that a small file which stands for a huge image costs nothing.
    """
    length = int.from_bytes(body[:4], "big")
    if len(body) < 4 or length > min(HEADER_LIMIT, len(body) - 4):
        raise RewardError(f"expected a request with a header, got {len(body)} bytes that announce one of {length}")
    header = _object(body[4 : 4 + length], "a request's header")
    encoding, sizes, prompts = (header.get(key) for key in ("encoding", "sizes", "prompts"))
    if encoding not in ("png", "tensor"):
        raise RewardError(f'expected the encoding "png" or "tensor", got {encoding!r}')
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes) or not sizes:
        raise RewardError("expected sizes, the bytes of each of at least one sample")
    if sum(sizes) != len(body) - 4 - length:
        raise RewardError(f"expected {sum(sizes)} bytes after the header, got {len(body) - 4 - length}")
    if prompts is not None and not (
        isinstance(prompts, list) and len(prompts) == len(sizes) and all(isinstance(text, str) for text in prompts)
    ):
        raise RewardError(f"expected {len(sizes)} prompts, one text per sample, or null")
    parts, start = [], 4 + length
    for size in sizes:
        parts.append(body[start : start + size])
        start += size
    if encoding == "png":
        _check_size(sum(math.prod(png_shape(part)) for part in parts), max_pixels)
        samples = [from_png(part) for part in parts]
    else:
        samples = [_tensor(part) for part in parts]
        _check_size(sum(sample.numel() for sample in samples), max_pixels)
    if len({(sample.shape, sample.dtype) for sample in samples}) != 1:
        raise RewardError("expected samples of one shape, got several")
    return torch.stack(samples), prompts


def encode_scores(scores: Tensor, name: str, version: str) -> bytes:
    """A reply with scores (M,)."""
    spelled = [_spell(float(score)) for score in scores.detach().to("cpu", torch.float64)]
    return json.dumps({"name": name, "version": version, "scores": spelled}).encode()


def decode_scores(body: bytes, rows: int, expected: tuple[str, str], name: str) -> Tensor:
    """The scores (rows,), float64, of a reply; RewardError where count, reward or version are others, or for NaN."""
    reply = _object(body, f"the reward {name}'s reply")
    came = (reply.get("name"), reply.get("version"))
    if came != expected:
        raise RewardError(
            f"the reward {name} was {_title(*expected)} when this run began, and is {_title(*came)} now: its scores do "
            "not compare; finish the run with one version, or connect anew"
        )
    scores = reply.get("scores")
    if not isinstance(scores, list) or len(scores) != rows:
        got = f"{len(scores)}" if isinstance(scores, list) else type(scores).__name__
        raise RewardError(f"the reward {name} must return {rows} scores, one per sample, got {got}")
    missing = [row for row, score in enumerate(scores) if score is None]
    if missing:
        raise RewardError(
            f"the reward {name} gave NaN for {len(missing)} of {rows} samples (first: row {missing[0]} of the "
            "request); a score must be a number, or -inf to forbid a sample"
        )
    return torch.tensor([_number(score, name) for score in scores], dtype=torch.float64)


def encode_spec(spec: RewardSpec, name: str, limits: Limits) -> bytes:
    """What a server says of its reward, and what it takes at once."""
    said = asdict(spec) | {"bounds": [_spell(bound) for bound in spec.bounds]}
    return json.dumps({"protocol": PROTOCOL, "name": name, "spec": said, "limits": limits}).encode()


def decode_spec(body: bytes, name: str) -> tuple[str, RewardSpec, Limits]:
    """The reward's name, its spec without a gradient (none passes a network), and what the server takes at once."""
    reply = _object(body, f"the reward {name}'s description")
    if reply.get("protocol") != PROTOCOL:
        raise RewardError(
            f"the reward {name} speaks protocol {reply.get('protocol')!r}, and this is {PROTOCOL}; see that the "
            "address is of a steer reward server, and install the same version of steer on both sides"
        )
    try:
        known = {field.name for field in fields(RewardSpec)}
        said = {key: value for key, value in reply["spec"].items() if key in known}
        low, high = (_number(bound, name) for bound in said["bounds"])
        spec = RewardSpec(**said | {"bounds": (low, high), "gradient": "none"})
        return str(reply["name"]), spec, Limits(*map(int, reply["limits"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RewardError(f"the reward {name} sent a description that cannot be read: {error!r}") from error


def _object(raw: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise RewardError(f"expected {what} to be JSON, got {raw[:80]!r}") from error
    if not isinstance(value, dict):
        raise RewardError(f"expected {what} to be a JSON object, got {type(value).__name__}")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _tensor(part: bytes) -> Tensor:
    from safetensors.torch import load

    try:
        return load(part)["sample"]
    except Exception as error:  # safetensors raises its own
        raise RewardError(f"expected a safetensors file with one tensor, sample: {error}") from error


def _check_size(came: int, most: int) -> None:
    if came > most:
        raise RewardError(f"expected at most {most} numbers in a request, got {came}; send fewer or smaller samples")


def _spell(score: float) -> float | str | None:
    return None if math.isnan(score) else str(score) if math.isinf(score) else score


def _number(score: Any, name: str) -> float:
    if type(score) is float or (type(score) is int and abs(score) < 2**53) or score in ("inf", "-inf"):
        return float(score)
    raise RewardError(f"the reward {name} must return numbers, got {score!r}")


def _title(name: Any, version: Any) -> str:
    return f"{name} ({f'version {version}' if version else 'of no stated version'})"
