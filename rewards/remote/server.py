"""The server of a reward over HTTP: for a network that has a GPU of its own, or packages of its own.

The messages are described in `wire_format`; `rewards.Remote` is the client.
"""

from __future__ import annotations

import hmac
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from steer.errors import RewardError, SteerError

from ..scoring import Scorer, name_of, score, spec_of
from .http_request import is_loopback
from .wire_format import Limits, decode_request, encode_scores, encode_spec

_IDLE_SECONDS = 30.0
"""After which a connection that sends nothing is closed."""


def serve(
    reward: Scorer,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    queue: int = 64,
    threads: int = 1,
    max_bytes: int = 1 << 26,
    max_pixels: int = 1 << 26,
) -> RewardServer:
    """Starts serving a reward over HTTP, and returns at once.

    Images reach the reward as float32 `[M, C, H, W]` in [0, 1] on the CPU; scores go back as they are, without
    gradients.

    Args:
        reward: any reward.
        host: an address that other machines can reach needs a token, as whoever reaches the port can spend your
            compute.
        port: 0 picks a free one.
        token: that clients must send. It travels unencrypted: put a TLS proxy in front where the network is not yours.
        queue: requests read into memory at once, waiting or running; more are answered 503, and clients retry.
        threads: calls of the reward at once. 1, as few rewards are thread-safe.
        max_bytes: length of one request.
        max_pixels: numbers (M C H W) of all samples of one request, checked before anything is allocated.

    Returns:
        The running server. Use it as a context manager, or call `close()`; `url` is its address.

    Raises:
        RewardError: for bad arguments.
        OSError: where the port is taken.

    Cost: at most queue (max_bytes + 4 max_pixels) bytes of memory besides the reward's own.
    """
    if not is_loopback(host) and not token:
        raise RewardError(
            f"serve(host={host!r}) can be reached from other machines and needs a token; pass token=..., or stay on "
            "127.0.0.1"
        )
    if not callable(reward) or min(queue, threads, max_bytes, max_pixels) < 1 or not 0 <= port < 1 << 16:
        raise RewardError(
            "serve takes a callable reward, a port below 65536, and queue, threads, max_bytes and max_pixels of at "
            f"least 1, got {type(reward).__name__}, port={port}, queue={queue}, threads={threads}, "
            f"max_bytes={max_bytes} and max_pixels={max_pixels}"
        )
    return RewardServer(
        reward, (host, port), token=token, queue=queue, threads=threads, limits=Limits(max_bytes, max_pixels)
    )


class RewardServer(ThreadingHTTPServer):
    """A running server. Built by `serve`.

    Args:
        reward: any reward.
        address: host and port.
        token: that clients must send, or None.
        queue: requests read into memory at once.
        threads: calls of the reward at once.
        limits: of one request.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256  # connections that the system holds while threads start

    def __init__(
        self,
        reward: Scorer,
        address: tuple[str, int],
        *,
        token: str | None,
        queue: int,
        threads: int,
        limits: Limits,
    ) -> None:
        super().__init__(address, _Handler)
        self.reward, self.token, self.limits = reward, token, limits
        self.queue_places = threading.BoundedSemaphore(queue)
        self.scoring_places = threading.BoundedSemaphore(threads)
        self.spec = spec_of(reward)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name="steer serve", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The server's address, for `rewards.Remote`."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def close(self) -> None:
        """Stops accepting requests and frees the port; what is being scored is not waited for."""
        self.shutdown()
        self.server_close()

    def wait(self) -> None:
        """Blocks until the server is closed, or Ctrl-C."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Does nothing: a client that disconnects is not worth a traceback."""

    def __exit__(self, *details: object) -> None:
        self.close()


class _Refused(Exception):
    """An answer other than scores: status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status, self.message = status, message


class _Handler(BaseHTTPRequestHandler):
    """One connection: GET /spec, or POST /score."""

    server: RewardServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = _IDLE_SECONDS
    server_version = "steer"
    sys_version = ""

    def do_GET(self) -> None:
        """Answers with the reward's spec."""
        self._answer(self._spec)

    def do_POST(self) -> None:
        """Answers with scores."""
        self._answer(self._queued_scores)

    def _spec(self) -> bytes:
        self._check_token_and_path("/spec")
        return encode_spec(self.server.spec, name_of(self.server.reward), self.server.limits)

    def _queued_scores(self) -> bytes:
        """Scores, or 503 where the queue is full."""
        self._check_token_and_path("/score")
        length = self._content_length()
        if not self.server.queue_places.acquire(blocking=False):
            self._drain(length)
            raise _Refused(503, "every place in the queue is taken; try again")
        try:
            return self._scores(length)
        finally:
            self.server.queue_places.release()

    def _scores(self, length: int) -> bytes:
        server, body = self.server, self.rfile.read(length)
        if len(body) < length:
            raise _Refused(400, f"expected {length} bytes, as Content-Length says, got {len(body)}")
        try:
            samples, prompts = decode_request(body, server.limits.pixels)
        except SteerError as error:
            raise _Refused(400, str(error)) from error
        del body  # it would stay in memory while waiting for a place to score
        with server.scoring_places, torch.no_grad():
            try:
                scores = score(server.reward, samples, prompts)
            except SteerError as error:
                raise _Refused(500, str(error)) from error
            return encode_scores(scores, name_of(server.reward), server.spec.version)

    def _check_token_and_path(self, path: str) -> None:
        given = self.headers.get("Authorization") or ""
        if self.server.token and not hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode()):
            raise _Refused(401, "wrong or missing token")
        if self.path != path:
            raise _Refused(404, f"there are GET /spec and POST /score, got {self.command} {self.path[:80]}")

    def _content_length(self) -> int:
        """The announced length of the body; 411 without one, 413 where it is over the limit."""
        given = self.headers.get("Content-Length") or ""
        if not (given.isascii() and given.isdigit()):
            raise _Refused(411, "a request needs a Content-Length")
        if len(given) > 15 or int(given) > self.server.limits.bytes:
            self._drain(self.server.limits.bytes)
            raise _Refused(413, f"expected at most {self.server.limits.bytes} bytes, got {given[:20]}")
        return int(given)

    def _drain(self, length: int) -> None:
        """Reads and discards, so that a client still sending gets the answer instead of a broken connection."""
        self.connection.settimeout(1.0)
        with suppress(TimeoutError):
            while length > 0 and (chunk := self.rfile.read1(min(length, 1 << 16))):
                length -= len(chunk)

    def _answer(self, work: Callable[[], bytes]) -> None:
        """Sends what the work returns, or the error it raises as JSON."""
        try:
            status, body = 200, work()
        except _Refused as refused:
            status, body = refused.status, json.dumps({"error": refused.message}).encode()
        except OSError:  # the client disconnected or fell silent
            self.close_connection = True
            return
        except Exception as error:  # a fault of the server: the client is told, and does not retry
            status, body = 500, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: the client is told what failed."""
