"""A reward as an HTTP server on this machine: for a network that has a GPU of its own, or packages of its own.

What it speaks is written in `rewards/wire.py`; `rewards.Remote` is the other end.
"""

from __future__ import annotations

import hmac
import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from steer.errors import RewardError, SteerError

from ..scoring import Scorer, name_of, score, spec_of
from .http_request import is_loopback
from .wire_format import Limits, decode_request, encode_scores, encode_spec

_IDLE = 30.0
"""Seconds after which a connection that sends nothing is closed."""


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
    """Starts serving a reward; returns at once. Use it as a context manager, or call `close()`; `url` is its address.

    host: of another machine's reach only with a token: whoever reaches the port can spend your compute. The token
        travels in the clear; put a TLS proxy in front where the network is not yours. port: 0 picks a free one.
    queue: requests read into memory at once, waiting or running; more are answered 503, and clients come again.
    threads: calls of the reward at once. 1, as few rewards are thread-safe.
    max_bytes, max_pixels: of one request: its length, and the numbers (M C H W) of all its samples, checked before
        anything is allocated. Memory is at most queue (max_bytes + 4 max_pixels) besides the reward's own.
    Images reach the reward as float32 (M, C, H, W) in [0, 1] on the CPU, scores go back as they are; no gradients.
    Raises RewardError for a bad argument, OSError where the port is taken.
    """
    if not is_loopback(host) and not token:
        raise RewardError(
            f"serve(host={host!r}) can be reached from other machines and needs a token; pass token=..., or stay on "
            "127.0.0.1"
        )
    if not callable(reward) or min(queue, threads, max_bytes, max_pixels) < 1 or not 0 <= port < 1 << 16:
        raise RewardError(
            "serve takes a callable reward, a port below 65536, and queue, threads, max_bytes and max_pixels of at "
            f"least 1, got {type(reward).__name__}, {port}, {queue}, {threads}, {max_bytes} and {max_pixels}"
        )
    return RewardServer(reward, (host, port), token, queue, threads, max_bytes, max_pixels)


class RewardServer(ThreadingHTTPServer):
    """A running server. Built by `serve`."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256  # connections that the system holds while threads start

    def __init__(
        self, reward: Scorer, address: tuple[str, int], token: str | None, queue: int, threads: int, max_bytes: int,
        max_pixels: int,
    ) -> None:  # fmt: skip
        super().__init__(address, _Handler)
        self.reward, self.token, self.limits = reward, token, Limits(max_bytes, max_pixels)
        self.slots, self.turns = threading.BoundedSemaphore(queue), threading.BoundedSemaphore(threads)
        self.spec = spec_of(reward)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name="steer serve", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
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
        """A client that went away is not news."""

    def __exit__(self, *details: object) -> None:
        self.close()


class _Refused(Exception):
    """An answer other than scores: status and message."""


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = _IDLE
    server_version = "steer"
    sys_version = ""

    def do_GET(self) -> None:
        def spec() -> bytes:
            self._route("/spec")
            return encode_spec(self.server.spec, name_of(self.server.reward), self.server.limits)

        self._answer(spec)

    def do_POST(self) -> None:
        def scores() -> bytes:
            self._route("/score")
            length = self._length()
            if not self.server.slots.acquire(blocking=False):
                self._drain(length)
                raise _Refused(503, "every place in the queue is taken; try again")
            try:
                return self._scores(length)
            finally:
                self.server.slots.release()

        self._answer(scores)

    def _scores(self, length: int) -> bytes:
        server, body = self.server, self.rfile.read(length)
        if len(body) < length:
            raise _Refused(400, f"expected {length} bytes, got {len(body)}")
        try:
            samples, prompts = decode_request(body, server.limits.pixels)
        except SteerError as error:
            raise _Refused(400, str(error)) from error
        del body
        with server.turns, torch.no_grad():
            try:
                scores = score(server.reward, samples, prompts)
            except SteerError as error:
                raise _Refused(500, str(error)) from error
            return encode_scores(scores, name_of(server.reward), server.spec.version)

    def _route(self, path: str) -> None:
        given = self.headers.get("Authorization") or ""
        if self.server.token and not hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode()):
            raise _Refused(401, "wrong or missing token")
        if self.path != path:
            raise _Refused(404, "there are GET /spec and POST /score")

    def _length(self) -> int:
        given = self.headers.get("Content-Length") or ""
        if not (given.isascii() and given.isdigit()):
            raise _Refused(411, "a request needs a Content-Length")
        if len(given) > 15 or int(given) > self.server.limits.bytes:
            self._drain(self.server.limits.bytes)
            raise _Refused(413, f"expected at most {self.server.limits.bytes} bytes, got {given[:20]}")
        return int(given)

    def _drain(self, length: int) -> None:
        """Reads and forgets, so that a client still sending hears the answer instead of a broken connection."""
        self.connection.settimeout(1.0)
        with suppress(TimeoutError):
            while length > 0 and (chunk := self.rfile.read1(min(length, 1 << 16))):
                length -= len(chunk)

    def _answer(self, work: Any) -> None:
        try:
            status, body = 200, work()
        except _Refused as refused:
            status, body = refused.args[0], json.dumps({"error": refused.args[1]}).encode()
        except OSError:  # the client went away or fell silent
            self.close_connection = True
            return
        except Exception as error:  # of the server's own: the client hears what, and does not try again
            status, body = 500, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what failed is told to the client, in words."""
