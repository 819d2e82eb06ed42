"""The client of a reward that runs in another process: `rewards.serve` or `steer serve-reward` there, `Remote` here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.types import RewardSpec

from ..scoring import check_prompts, reward_signature
from .http_request import check_url, in_parallel, request
from .wire_format import Encoding, Limits, decode_scores, decode_spec, encode_parts, encode_request

_HEADER_BYTES = 4096
"""Bytes of a request besides samples and prompts, for 64 samples, rounded up."""

_Group = tuple[list[bytes], "list[str] | None"]
"""Encoded samples of one request, and their prompts."""


@dataclass(frozen=True, eq=False)
class Remote:
    """A reward served over HTTP.

    Connecting asks the server once for the reward's name and spec, which are this object's from then on: whether it
    takes prompts, its unit, its version. A server that later answers with another name or version is an error.

    Called with samples `[M, ...]` and, where the reward takes them, M prompts.

    Args:
        url: "http://127.0.0.1:8000", or https for other machines: plain HTTP shows token and images to the network.
        token: what the server was started with, if anything.
        timeout: seconds for one request.
        retries: further attempts, with doubling pauses, where the connection fails or the server is busy (503). The
            default outlasts a restart of the server of a few seconds.
        batch: samples per request, fewer where the server takes less at a time, all of them for a groupwise reward.
        parallel: requests under way at once.
        encoding: "png" sends images `[M, 1 or 3, H, W]` in [0, 1] rounded to 8 bits, and refuses others; "tensor"
            sends any samples exactly, as safetensors.

    Returns:
        Scores `[M]`, float64, on the samples' device, in order, without a gradient.

    Raises:
        RewardError: for bad arguments, and whatever goes wrong on the server or on the way, NaN included; a failure is
            never scored 0.
        ShapeError: for samples that are no images, with encoding "png".
        NotDifferentiableError: where a gradient is requested.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 8
    batch: int = 16
    parallel: int = 4
    encoding: Encoding = "png"
    name: str = field(init=False)
    spec: RewardSpec = field(init=False)
    limits: Limits = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_url(self.url, "Remote")
        if self.encoding not in ("png", "tensor"):
            raise RewardError(f"Remote(encoding=...) must be 'png' or 'tensor', got {self.encoding!r}")
        if not (self.timeout > 0 and self.retries >= 0 and self.batch >= 1 and self.parallel >= 1):
            raise RewardError(
                f"Remote takes timeout > 0, retries >= 0, batch >= 1 and parallel >= 1, got timeout={self.timeout}, "
                f"retries={self.retries}, batch={self.batch} and parallel={self.parallel}"
            )
        object.__setattr__(self, "url", self.url.rstrip("/"))
        name, spec, limits = decode_spec(self._request("/spec", None, 1 << 20), self.url)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "spec", spec)
        object.__setattr__(self, "limits", limits)
        object.__setattr__(self, "__signature__", reward_signature(spec.prompts, False))

    @property
    def __name__(self) -> str:
        return f"Remote({self.name})" if hasattr(self, "name") else "Remote"

    def __call__(self, samples: Tensor, *, prompts: Sequence[str] | None = None) -> Tensor:
        parts = encode_parts(samples, self.encoding, self.__name__)
        if prompts is not None:
            check_prompts(prompts, len(parts), self.__name__)
        texts = None if prompts is None or not self.spec.prompts else list(prompts)
        groups = list(self._groups(parts, texts, samples[:1].numel()))
        if len(groups) > 1 and self.spec.scope == "groupwise":
            raise RewardError(
                f"{self.__name__} scores samples against the others of a call, which must fit in one request, and "
                f"{len(parts)} do not (limits: {self.limits.bytes} bytes, {self.limits.pixels} pixels); start the "
                "server with higher limits"
            )
        scores = in_parallel(self._score, groups, threads=self.parallel, thread_name="steer remote reward")
        return torch.cat([torch.zeros(0, dtype=torch.float64), *scores]).to(samples.device)

    def _groups(self, parts: list[bytes], prompts: list[str] | None, pixels: int) -> Iterator[_Group]:
        """Samples, of `pixels` numbers each, and prompts in groups that the server accepts."""
        batch = len(parts) if self.spec.scope == "groupwise" else self.batch
        rows, start, size = min(batch, self.limits.pixels // max(pixels, 1)), 0, 0
        for row, part in enumerate(parts):
            # JSON escapes a prompt to at most six times its length.
            length = len(part) + 24 + (6 * len(prompts[row].encode()) if prompts else 0)
            if length + _HEADER_BYTES > self.limits.bytes or rows < 1:
                raise RewardError(
                    f"{self.__name__} takes at most {self.limits.bytes} bytes and {self.limits.pixels} pixels per "
                    f"request, and sample {row} alone has {length} and {pixels}; start the server with higher limits, "
                    "or score smaller images"
                )
            if row - start == rows or size + length + _HEADER_BYTES > self.limits.bytes:
                yield parts[start:row], prompts[start:row] if prompts else None
                start, size = row, 0
            size += length
        if parts:
            yield parts[start:], prompts[start:] if prompts else None

    def _score(self, group: _Group) -> Tensor:
        """Scores of one request."""
        parts, prompts = group
        body = encode_request(parts, prompts, self.encoding)
        reply = self._request("/score", body, 4096 + 64 * len(parts))
        return decode_scores(reply, len(parts), (self.name, self.spec.version), f"{self.__name__} at {self.url}")

    def _request(self, path: str, body: bytes | None, limit: int) -> bytes:
        """The server's reply. limit: bytes that it may have."""
        headers = {"Content-Type": "application/octet-stream"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return request(
            self.url + path, body, headers, name=self.__name__, timeout=self.timeout, retries=self.retries, limit=limit
        )
