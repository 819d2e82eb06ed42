"""The messages between `rewards.Remote` and `rewards.serve`: a JSON header, then PNG files or safetensors files.

A request is 4 bytes (the length of the header, big-endian), the header, and the parts one after the other. The header
is {"encoding": "png" | "tensor", "sizes": [bytes of each part], "prompts": [...] or null}. A reply is the JSON object
{"name", "version", "scores"} where a score is a number, "-inf", "inf", or null for NaN. Nothing is ever unpickled.

A request that waits for its turn is answered 200 at once, with a blank every half second until it is scored. What fails
after that is told in the body, as {"error", "status"}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from steer.errors import RemoteError, RewardError
from steer.types import RewardSpec

from ..pil_images import from_png, png_shape, to_pictures, to_png
from ..scoring import refuse_gradient
from .http_request import printable

PROTOCOL = 2
HEADER_LIMIT = 1 << 20
_LONGEST_TEXT = 100_000
Encoding = Literal["png", "tensor"]


class Limits(NamedTuple):
    """The most that a server takes in one request.

    Args:
        bytes: length of the request.
        pixels: numbers (M C H W) of all its samples.
    """

    bytes: int
    pixels: int


def encode_parts(samples: Tensor, encoding: Encoding, name: str) -> list[bytes]:
    """One body per sample.

    Args:
        samples: `[M, ...]`; for "png" images `[M, 1 or 3, H, W]` in [0, 1].
        encoding: "png" rounds images to 8 bits, and is lossless otherwise; "tensor" is exact.
        name: of the reward, for messages.

    Returns:
        M files.

    Raises:
        NotDifferentiableError: where a gradient is requested.
        ShapeError: for samples that are no images, with "png".
        RewardError: for images with values outside [0, 1], with "png".
    """
    if encoding == "png":
        return [to_png(picture) for picture in to_pictures(samples, name)]
    from safetensors.torch import save

    refuse_gradient(samples, name)
    return [save({"sample": sample.contiguous()}) for sample in samples.detach().cpu()]


def encode_request(parts: Sequence[bytes], prompts: Sequence[str] | None, encoding: Encoding) -> bytes:
    """A request for scores.

    Args:
        parts: encoded samples, of `encode_parts`.
        prompts: one per part, or None.
        encoding: of the parts.

    Returns:
        The body of the request.
    """
    sizes = [len(part) for part in parts]
    header = json.dumps({"encoding": encoding, "sizes": sizes, "prompts": None if prompts is None else list(prompts)})
    raw = header.encode()
    return b"".join([len(raw).to_bytes(4, "big"), raw, *parts])


def header_bytes(prompt: str | None) -> int:
    """Bytes that one sample takes in the header of a request, rounded up.

    Args:
        prompt: of the sample, or None.

    Returns:
        Bytes.
    """
    return 24 + (0 if prompt is None else len(json.dumps(prompt)))


class ScoreRequest(NamedTuple):
    """A request whose header was read and whose samples are not decoded yet.

    Args:
        encoding: of the parts.
        parts: one encoded sample each, views of the request's body.
        prompts: one per part, or None.
        decoded_bytes: the most memory that decoding takes, its result included.
    """

    encoding: Encoding
    parts: list[memoryview]
    prompts: list[str] | None
    decoded_bytes: int


def read_request(body: bytes | bytearray, max_pixels: int) -> ScoreRequest:
    """Reads the header of a request and those of its PNG files. No sample is decoded.

    Args:
        body: of the request.
        max_pixels: numbers that all samples may have together.

    Returns:
        The request.

    Raises:
        RewardError: saying what is malformed, and for PNG files that stand for more than max_pixels.
    """
    whole = memoryview(body)
    length = int.from_bytes(whole[:4], "big")
    if len(whole) < 4 or length > min(HEADER_LIMIT, len(whole) - 4):
        raise RewardError(
            f"expected a request with a header of at most {HEADER_LIMIT} bytes, got {len(whole)} bytes that announce "
            f"one of {length}"
        )
    encoding, sizes, prompts = _header(bytes(whole[4 : 4 + length]))
    if sum(sizes) != len(whole) - 4 - length:
        raise RewardError(f"expected {sum(sizes)} bytes after the header, got {len(whole) - 4 - length}")
    parts, start = [], 4 + length
    for size in sizes:
        parts.append(whole[start : start + size])
        start += size
    if encoding == "tensor":
        return ScoreRequest(encoding, parts, prompts, max_decoded_bytes(Limits(sum(sizes), 0)))
    shapes = [png_shape(bytes(part[:33])) for part in parts]
    _check_size(sum(map(math.prod, shapes)), max_pixels)
    _check_kinds(set(shapes))
    return ScoreRequest(encoding, parts, prompts, max_decoded_bytes(Limits(max(sizes), sum(map(math.prod, shapes)))))


def max_decoded_bytes(limits: Limits) -> int:
    """The most memory that decoding a request of these sizes takes, its result included.

    Args:
        limits: of the request.

    Returns:
        Bytes. A number of an image takes one byte in the decoder's copies, of which there are up to four, and four as
        float32, of which there are up to two beside one of the former: 10 with what the allocator rounds up. A tensor
        is its file, which is copied, taken apart and stacked.
    """
    return max(limits.bytes + 10 * limits.pixels, 3 * limits.bytes)


def decode_samples(request: ScoreRequest, max_pixels: int) -> Tensor:
    """The samples of a request.

    Args:
        request: as read.
        max_pixels: numbers that all samples may have together.

    Returns:
        Samples `[M, ...]`.

    Raises:
        RewardError: for a file that cannot be decoded, too many numbers, and samples of several shapes or dtypes.
    """
    if request.encoding == "png":
        return torch.stack([from_png(bytes(part)) for part in request.parts])
    samples = [_decoded_tensor(bytes(part)) for part in request.parts]
    _check_size(sum(sample.numel() for sample in samples), max_pixels)
    _check_kinds({(tuple(sample.shape), sample.dtype) for sample in samples})
    return torch.stack(samples)


def encode_scores(scores: Tensor, name: str, version: str) -> bytes:
    """A reply with scores.

    Args:
        scores: `[M]`.
        name: of the reward.
        version: of the reward.

    Returns:
        The body of the reply.
    """
    as_json = [_json_number(float(score)) for score in scores.detach().to("cpu", torch.float64)]
    return json.dumps({"name": name, "version": version, "scores": as_json}).encode()


def decode_scores(body: bytes, rows: int, expected: tuple[str, str], name: str) -> Tensor:
    """The scores of a reply.

    Args:
        body: of the reply.
        rows: M, the samples that were sent.
        expected: name and version of the reward at the start of the run.
        name: of the reward, for messages.

    Returns:
        `[M]`, float64.

    Raises:
        RewardError: where the count, the reward or its version differ, for NaN, and for an error that the server tells.
    """
    reply = _json_object(body, f"the reward {name}'s reply")
    if "error" in reply:
        raise RemoteError(f"the reward {name} answered {reply.get('status')}: {printable(str(reply['error']))}")
    came = (reply.get("name"), reply.get("version"))
    if came != expected:
        raise RewardError(
            f"the reward {name} was {_title(*expected)} when this run began, and is {_title(*came)} now: its scores do "
            "not compare; finish the run with one version, or connect anew"
        )
    scores = reply.get("scores")
    if not isinstance(scores, list) or len(scores) != rows:
        got = f"{len(scores)}" if isinstance(scores, list) else type(scores).__name__
        raise RewardError(
            f"the reward {name} must return {rows} scores, one per sample, got {got}; check the server's reward"
        )
    missing = [row for row, score in enumerate(scores) if score is None]
    if missing:
        raise RewardError(
            f"the reward {name} gave NaN for {len(missing)} of {rows} samples (first: row {missing[0]} of the "
            "request); a score must be a number, or -inf to forbid a sample"
        )
    return torch.tensor([_number(score, name) for score in scores], dtype=torch.float64)


def encode_spec(spec: RewardSpec, name: str, limits: Limits) -> bytes:
    """A server's description of its reward.

    Args:
        spec: of the reward.
        name: of the reward.
        limits: the most that the server takes in one request.

    Returns:
        The body of the reply.
    """
    as_json = asdict(spec) | {"bounds": [_json_number(bound) for bound in spec.bounds]}
    return json.dumps({"protocol": PROTOCOL, "name": name, "spec": as_json, "limits": limits}).encode()


def decode_spec(body: bytes, name: str) -> tuple[str, RewardSpec, Limits]:
    """The description that a server gives of its reward.

    Args:
        body: of the reply.
        name: of the reward, for messages.

    Returns:
        The reward's name, its spec without a gradient (none passes a network), and the most the server takes in one
        request.

    Raises:
        RemoteError: for another protocol, and a description that cannot be read.
    """
    reply = _json_object(body, f"the reward {name}'s description")
    if reply.get("protocol") != PROTOCOL:
        raise RemoteError(
            f"the reward {name} speaks protocol {reply.get('protocol')!r}, and this is {PROTOCOL}; check that the "
            "address is of a steer reward server, and install the same version of steer on both sides"
        )
    try:
        known = {field.name for field in fields(RewardSpec)}
        values = {key: value for key, value in reply["spec"].items() if key in known}
        low, high = (_number(bound, name) for bound in values["bounds"])
        spec = RewardSpec(**values | {"bounds": (low, high), "gradient": "none"})
        said, limits = reply["name"], Limits(*map(int, reply["limits"]))
        texts = [said, spec.version] if spec.unit is None else [said, spec.version, spec.unit]
        if not all(isinstance(text, str) and len(text) <= _LONGEST_TEXT for text in texts):
            raise ValueError(f"name, version and unit should be texts of at most {_LONGEST_TEXT} letters")
        if spec.scope not in ("pointwise", "groupwise") or type(spec.prompts) is not bool or min(limits) < 1:
            raise ValueError(f"scope={spec.scope!r}, prompts={spec.prompts!r}, limits={tuple(limits)}")
        return said, spec, limits
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RemoteError(
            f"the reward {name} sent a description that cannot be read: {error!r}; install the same version of steer "
            "on both sides"
        ) from error


def _header(raw: bytes) -> tuple[Encoding, list[int], list[str] | None]:
    """Encoding, sizes and prompts of a request's header; RewardError saying which is malformed."""
    header = _json_object(raw, "a request's header")
    encoding, sizes, prompts = (header.get(key) for key in ("encoding", "sizes", "prompts"))
    if encoding not in ("png", "tensor"):
        raise RewardError(f'expected the encoding "png" or "tensor", got {encoding!r}')
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes) or not sizes:
        raise RewardError(f"expected sizes, the bytes of each of at least one sample, got {sizes!r:.200}")
    if prompts is not None and not (
        isinstance(prompts, list) and len(prompts) == len(sizes) and all(isinstance(text, str) for text in prompts)
    ):
        raise RewardError(f"expected {len(sizes)} prompts, one text per sample, or null, got {prompts!r:.200}")
    return encoding, sizes, prompts


def _json_object(raw: bytes, what: str) -> dict[str, Any]:
    """The JSON object in bytes; RemoteError, naming `what` it is, for anything else."""
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RemoteError(f"expected {what} to be JSON, got {raw[:80]!r}; check the address") from error
    if not isinstance(value, dict):
        raise RemoteError(f"expected {what} to be a JSON object, got {type(value).__name__}; check the address")
    return value


def _refuse_constant(constant: str) -> None:
    """NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(f"{constant} is not JSON")


def _decoded_tensor(part: bytes) -> Tensor:
    from safetensors.torch import load

    try:
        return load(part)["sample"]
    except Exception as error:  # safetensors raises its own
        raise RewardError(f"expected a safetensors file with one tensor, called sample, got {error!r}") from error


def _check_kinds(kinds: set[Any]) -> None:
    if len(kinds) != 1:
        raise RewardError(
            f"expected samples of one shape and dtype, got {sorted(map(str, kinds))}; send each kind in a request of "
            "its own"
        )


def _check_size(numbers: int, most: int) -> None:
    if numbers > most:
        raise RewardError(f"expected at most {most} numbers in a request, got {numbers}; send fewer or smaller samples")


def _json_number(score: float) -> float | str | None:
    """A score as JSON has it: None for NaN, a text for an infinity."""
    if math.isnan(score):
        return None
    return str(score) if math.isinf(score) else score


def _number(score: Any, name: str) -> float:
    """A score from JSON; RewardError for what is none."""
    if type(score) is float or (type(score) is int and abs(score) < 2**53) or score in ("inf", "-inf"):
        return float(score)
    raise RewardError(f"the reward {name} must return numbers, got {score!r}; check the server's reward")


def _title(name: Any, version: Any) -> str:
    """Name and version of a reward in a message."""
    return f"{name} (version {version})" if version else f"{name} (of no stated version)"
