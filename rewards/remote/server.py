"""The server of rewards over HTTP: for a network that has a GPU of its own, or packages of its own.

The messages are described in `wire_format`; `rewards.Remote` is the client.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from steer.errors import RewardError

from ..hub import optional_package
from ..scoring import Scorer
from .answers import Answers
from .connections import http_server, listen
from .http_request import is_loopback
from .scoring_queue import Memory, ScoringQueue
from .web_app import web_app
from .wire_format import Limits, max_decoded_bytes

if TYPE_CHECKING:
    from starlette.applications import Starlette


def serve(
    reward: Scorer | Mapping[str, Scorer],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | Literal[False] | None = None,
    queue: int = 64,
    threads: int = 1,
    batch: int = 1,
    max_bytes: int = 1 << 26,
    max_pixels: int = 1 << 26,
    memory: int = 1 << 30,
) -> RewardServer:
    """Starts serving one or several rewards over HTTP, and returns at once.

    Images reach a reward as float32 `[M, C, H, W]` in [0, 1] on the CPU; scores go back as they are, without
    gradients. Requests are scored in the order in which they come, those of clients that left are not.

    Args:
        reward: any reward; or several by name, each of which is then at `url/NAME`.
        host: a name, or an address of IPv4 or IPv6.
        port: 0 picks a free one.
        token: that clients must send, as whoever reaches the port can spend your compute, and every user of this
            machine reaches it. None makes one up: it is the server's `token`. False serves without, on this machine
            alone. It travels unencrypted: put a TLS proxy in front where the network is not yours.
        queue: requests waiting or running at once; more are answered 503, and clients retry.
        threads: calls of rewards at once. 1, as few rewards are thread-safe.
        batch: samples of one call of a reward, over requests for it that wait together. 1 makes a call for each
            request, so that scores are the same whatever other clients ask: in another batch a network rounds its last
            bits otherwise. Requests for a reward whose spec says that it is groupwise are never scored together.
        max_bytes: length of one request.
        max_pixels: numbers (M C H W) of all samples of one request, read from the files' headers before one is decoded.
        memory: bytes that all requests together hold, decoded samples included. Each is counted before it is taken: a
            request that finds no room is answered 503, and one whose turn has come waits for room to decode.

    Returns:
        The running server. Use it as a context manager, or call `close()`; `url` is its address, `token` its token.

    Raises:
        RewardError: for bad arguments, and missing packages (pip install 'steer-diffusion[serve]').
        OSError: where the port is taken, or there is no such host.

    Cost: at most `memory` bytes besides the rewards' own, 0.3 MB for each of at most 256 connections, and what the
        allocator keeps of pictures, up to 1.4 max_pixels bytes a thread.
    """
    if not 0 <= port < 1 << 16:
        raise RewardError(f"serve takes a port from 0 to 65535, got {port}")
    if token is False and not is_loopback(host):
        raise RewardError(
            f"serve(host={host!r}) can be reached from other machines and needs a token; pass token=..., or stay on "
            "127.0.0.1"
        )
    if token == "" or token is True:
        raise RewardError(f"serve(token=...) takes a text, None to make one up, or False for none, got {token!r}")
    optional_package("uvicorn", "serve")
    shared = secrets.token_urlsafe(24) if token is None else token or None
    app = asgi(
        reward,
        token=shared,
        queue=queue,
        threads=threads,
        batch=batch,
        max_bytes=max_bytes,
        max_pixels=max_pixels,
        memory=memory,
    )
    return RewardServer(app, (host, port), token=shared)


def asgi(
    reward: Scorer | Mapping[str, Scorer],
    *,
    token: str | None,
    queue: int = 64,
    threads: int = 1,
    batch: int = 1,
    max_bytes: int = 1 << 26,
    max_pixels: int = 1 << 26,
    memory: int = 1 << 30,
) -> Starlette:
    """The application that `serve` serves, for a server of your own: with TLS, on Ray Serve, under a path of another.

    Args:
        token: that clients must send; None answers whoever reaches it.
        Others: as `serve`.

    Returns:
        An ASGI application, with its threads. `rewards.Remote` talks to it at the address where it is mounted.

    Raises:
        RewardError: for bad arguments, and missing packages (pip install 'steer-diffusion[serve]').
    """
    rewards = dict(reward) if isinstance(reward, Mapping) else {"": reward}
    limits = Limits(max_bytes, max_pixels)
    if not all(map(callable, rewards.values())) or min(queue, threads, batch, *limits) < 1:
        raise RewardError(
            "a reward server takes callable rewards, and queue, threads, batch, max_bytes and max_pixels of at least "
            f"1, got {[type(each).__name__ for each in rewards.values()]}, queue={queue}, threads={threads}, "
            f"batch={batch}, max_bytes={max_bytes} and max_pixels={max_pixels}"
        )
    if isinstance(reward, Mapping) and not (rewards and all(re.fullmatch(_NAME, name) for name in rewards)):
        raise RewardError(f"a reward server takes rewards by names of letters, digits and _.-, got {list(rewards)}")
    reserve = max_decoded_bytes(limits)
    if memory < reserve + max_bytes:
        raise RewardError(
            f"memory={memory} has no room for one request of max_bytes={max_bytes} and max_pixels={max_pixels}, "
            f"which takes {reserve + max_bytes} bytes; allow as much, or lower these two"
        )
    optional_package("starlette", "serve")
    room = Memory(memory, reserve)
    answers = Answers(room, limits, batch)
    waiting = ScoringQueue(threads, queue, answers, answers.joins)
    return web_app(rewards, token=token, queue=waiting, memory=room, limits=limits)


_NAME = r"[\w.-]+"


class RewardServer:
    """A running server. Built by `serve`.

    Args:
        app: of `asgi`.
        address: host and port.
        token: that clients must send, or None.
    """

    def __init__(self, app: Starlette, address: tuple[str, int], *, token: str | None) -> None:
        self.token = token
        self._queue: ScoringQueue[Any] = app.state.queue
        self._socket = listen(*address)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._http: Any = http_server(app)
        self._thread = threading.Thread(target=self._http.run, args=([self._socket],), name="steer serve", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The server's address, for `rewards.Remote`."""
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def close(self) -> None:
        """Stops accepting requests and frees the port; what is being scored is not waited for."""
        self._http.should_exit = self._http.force_exit = True
        self._thread.join(5.0)
        self._queue.close()

    def wait(self) -> None:
        """Blocks until the server is closed, or Ctrl-C."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def __enter__(self) -> RewardServer:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
