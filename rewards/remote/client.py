"""The client of a reward that runs in another process: `rewards.serve` or `steer serve-reward` there, `Remote` here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.types import RewardSpec

from ..scoring import check_prompts, reward_signature
from .http_request import check_url, in_parallel, request
from .wire_format import (
    HEADER_LIMIT,
    Encoding,
    Limits,
    decode_scores,
    decode_spec,
    encode_parts,
    encode_request,
    header_bytes,
)

if TYPE_CHECKING:
    import httpx

_RETRIED = (408, 429, 502, 503, 504, 529)
"""Statuses of a server that is busy, and of a proxy before one that restarts. 500 is the reward's own error."""

_FRAME_BYTES = 128
"""Bytes of a request besides those of its samples and prompts, rounded up."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_Group = tuple[list[bytes], "list[str] | None"]
"""Encoded samples of one request, and their prompts."""


@dataclass(frozen=True, eq=False)
class Remote:
    """A reward served over HTTP.

    Connecting asks the server once for the reward's name and spec, which are this object's from then on: whether it
    takes prompts, its unit, its version. A server that later answers with another name or version is an error.

    Called with samples `[M, ...]` and, where the reward takes them, M prompts.

    Args:
        url: "http://127.0.0.1:8000", or "http://127.0.0.1:8000/NAME" of a server of several rewards. https for other
            machines: plain HTTP shows token and images to the network.
        token: the server's; it prints one, unless it was started without.
        timeout: seconds for one request as a whole, not counting its wait in the server's queue; at least a second
            where there is a queue.
        retries: further attempts, with doubling pauses, where the connection fails or a proxy has no answer (408, 429,
            502, 503, 504, 529). The default outlasts a restart of the server of a few seconds.
        batch: samples per request, fewer where the server takes less at a time, all of them for a groupwise reward.
        parallel: requests under way at once.
        encoding: "png" sends images `[M, 1 or 3, H, W]` in [0, 1] rounded to 8 bits, and refuses others; "tensor"
            sends any samples exactly, as safetensors.
        queue_timeout: seconds that a request may spend in the server's queue.

    Returns:
        Scores `[M]`, float64, on the samples' device, in order, without a gradient.

    Raises:
        RemoteError: where the server cannot be reached or fails.
        RewardError: for bad arguments, NaN, and missing packages (pip install 'steer-diffusion[serve]'); a failure is
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
    queue_timeout: float = 600.0
    name: str = field(init=False)
    spec: RewardSpec = field(init=False)
    limits: Limits = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_url(self.url, "Remote")
        if self.encoding not in ("png", "tensor"):
            raise RewardError(f"Remote(encoding=...) must be 'png' or 'tensor', got {self.encoding!r}")
        if not (
            self.timeout > 0 and min(self.queue_timeout, self.retries) >= 0 and min(self.batch, self.parallel) >= 1
        ):
            raise RewardError(
                "Remote takes timeout > 0, queue_timeout and retries >= 0, batch and parallel >= 1, got "
                f"timeout={self.timeout}, queue_timeout={self.queue_timeout}, retries={self.retries}, "
                f"batch={self.batch} and parallel={self.parallel}"
            )
        object.__setattr__(self, "url", self.url.rstrip("/"))
        (said,) = self._each(lambda client, path: self._ask(client, path, None, 1 << 20), ["/spec"])
        name, spec, limits = decode_spec(said, self.url)
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
        scores = self._each(self._score, groups)
        return torch.cat([torch.zeros(0, dtype=torch.float64), *scores]).to(samples.device)

    def _groups(self, parts: list[bytes], prompts: list[str] | None, pixels: int) -> Iterator[_Group]:
        """Samples, of `pixels` numbers each, and prompts in groups that the server accepts."""
        batch = len(parts) if self.spec.scope == "groupwise" else self.batch
        rows, start, size, header = min(batch, self.limits.pixels // max(pixels, 1)), 0, 0, 0
        most, most_header = self.limits.bytes - _FRAME_BYTES, HEADER_LIMIT - _FRAME_BYTES
        for row, part in enumerate(parts):
            own = header_bytes(prompts[row] if prompts else None)
            if len(part) + own > most or rows < 1:
                raise RewardError(
                    f"{self.__name__} takes at most {self.limits.bytes} bytes and {self.limits.pixels} pixels per "
                    f"request, and sample {row} alone has {len(part) + own} and {pixels}; start the server with higher "
                    "limits, or score smaller images"
                )
            if own > most_header:
                raise RewardError(
                    f"{self.__name__} takes at most {HEADER_LIMIT} bytes of prompts per request, and prompt {row} "
                    f"alone has {own}; shorten it"
                )
            if row - start == rows or size + len(part) + own > most or header + own > most_header:
                yield parts[start:row], prompts[start:row] if prompts else None
                start, size, header = row, 0, 0
            size, header = size + len(part) + own, header + own
        if parts:
            yield parts[start:], prompts[start:] if prompts else None

    async def _score(self, client: httpx.AsyncClient, group: _Group) -> Tensor:
        """Scores of one request."""
        parts, prompts = group
        body = encode_request(parts, prompts, self.encoding)
        reply = await self._ask(client, "/score", body, 4096 + 64 * len(parts))
        return decode_scores(reply, len(parts), (self.name, self.spec.version), f"{self.__name__} at {self.url}")

    async def _ask(self, client: httpx.AsyncClient, path: str, body: bytes | None, limit: int) -> bytes:
        """The server's reply. limit: bytes that it may have."""
        return await request(
            client,
            self.url + path,
            body,
            name=self.__name__,
            timeout=self.timeout,
            retries=self.retries,
            limit=limit,
            retry_on=_RETRIED,
            queue_timeout=self.queue_timeout,
        )

    def _each(
        self, call: Callable[[httpx.AsyncClient, _Item], Awaitable[_Result]], items: list[_Item]
    ) -> list[_Result]:
        """A call on each item, with the server's token."""
        headers = {"Content-Type": "application/octet-stream"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return in_parallel(call, items, url=self.url, headers=headers, parallel=self.parallel, name=self.__name__)
