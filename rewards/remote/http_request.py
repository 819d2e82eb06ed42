"""HTTP requests with total deadlines, size limits and retries, several at once: the client side of remote rewards."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from steer.errors import RemoteError, RewardError

from ..hub import optional_package

if TYPE_CHECKING:
    import httpx

FIRST_WAIT, LONGEST_WAIT = 0.05, 2.0
"""Seconds before the first and the last retries; doubled in between, and jittered to avoid synchronised retries."""

_LONGEST_ASKED = 60.0
"""Seconds of a server's Retry-After that are waited at most."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_parallel(
    call: Callable[[httpx.AsyncClient, _Item], Awaitable[_Result]],
    items: Iterable[_Item],
    *,
    url: str,
    headers: Mapping[str, str],
    parallel: int,
    name: str,
) -> list[_Result]:
    """A call on each of several items, several at once, in an event loop of its own in a thread of its own.

    Redirects are not followed, as they would carry the token elsewhere, and a loopback host is reached without proxy.

    Args:
        call: from an HTTP client and an item to a result.
        items: what to call it on.
        url: where the requests go.
        headers: of all requests.
        parallel: calls at once.
        name: of the reward, for messages.

    Returns:
        The results, in the order of the items.

    Raises:
        RewardError: for a missing package (pip install 'steer-diffusion[serve]') or a header that cannot be sent.
        Exception: the first that a call raises, at once. The other requests are broken off, which tells the server
            that nobody waits for their scores.
    """
    httpx, anyio = optional_package("httpx", "serve"), optional_package("anyio.from_thread", "serve")
    if not all(value.isascii() and value.isprintable() for value in headers.values()):
        raise RewardError(f"the reward {name} was given a token that is not printable ASCII; look for a stray newline")

    async def run() -> list[_Result]:
        client = httpx.AsyncClient(
            headers={**headers, "Accept-Encoding": "identity"},
            timeout=None,  # `request` has deadlines for the whole; these would be for each packet
            trust_env=not is_loopback(urlsplit(url).hostname or ""),
            verify=_tls_context(),
            limits=httpx.Limits(max_connections=None),
        )
        async with client:
            return await _each(lambda item: call(client, item), list(items), parallel)

    with anyio.start_blocking_portal() as portal:
        return portal.call(run)


async def request(
    client: httpx.AsyncClient,
    url: str,
    body: bytes | None,
    *,
    name: str,
    timeout: float,
    retries: int,
    limit: int,
    retry_on: Collection[int],
    queue_timeout: float = 0.0,
) -> bytes:
    """The body of the reply to a GET or POST.

    Args:
        client: as `in_parallel` passes it.
        url: http:// or https://.
        body: of a POST; None for a GET.
        name: of the reward, for messages.
        timeout: seconds for one attempt as a whole, however its bytes are spread over them.
        retries: further attempts, only where the connection failed or the status is in `retry_on`.
        limit: bytes that a reply may have.
        retry_on: statuses that mean "try again later".
        queue_timeout: seconds that a request may spend in the server's queue besides. While it waits there the server
            sends blanks, and one that finds the queue full is answered 503 with Retry-After; neither counts against
            timeout and retries.

    Returns:
        The reply's body, without leading blanks.

    Raises:
        RemoteError: for every failure, naming the reward, the address, what came, and the cure.
    """
    import anyio
    import httpx

    began, attempts, failed = anyio.current_time(), 0, 0
    while True:
        attempts += 1
        try:
            return await _attempt(client, url, body, timeout, limit, queue_timeout, name)
        except _Refused as refused:
            failure, cause, asked = (
                f"the reward {name} at {url} answered {refused}",
                refused,
                refused.retry_after or 0.0,
            )
            if refused.status not in retry_on:
                cure = _CURES.get(refused.status, "look at the log of the server")
                raise RemoteError(f"{failure}; {cure}") from None
            full = refused.status == 503 and refused.retry_after is not None  # as the server of steer says it
            failed += not full or anyio.current_time() - began >= queue_timeout
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise RemoteError(f"the reward {name} has no address at {url!r}: {error}; check it") from error
        except (httpx.HTTPError, OSError) as error:
            failure = f"the reward {name} cannot be reached at {url}: {type(error).__name__}: {printable(str(error))}"
            cause, asked, failed = error, 0.0, failed + 1
        if failed > retries:
            raise RemoteError(
                f"{failure} (tried {attempts} times); check that the server runs and keeps up, or allow more retries"
            ) from cause
        pause = min(FIRST_WAIT * 2 ** min(attempts - 1, 16), LONGEST_WAIT) * random.Random().uniform(0.5, 1.0)
        await anyio.sleep(max(pause, asked))


def check_url(url: str, name: str) -> None:
    """Checks that a URL is of HTTP, and has a host and nothing that would be left out or sent elsewhere.

    Args:
        url: http:// or https://, a host, and perhaps a port and a path.
        name: of the reward, for the message.

    Raises:
        RewardError: for any other URL.
    """
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        parts, whole = urlsplit(""), None
    if not whole or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise RewardError(f"{name}(url) needs http://HOST:PORT or https://..., got {url!r}")
    if parts.username is not None or parts.password is not None:
        raise RewardError(f"{name}(url) takes no user and password, which logs and messages would show; pass a token")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, out of reach of any other.

    Args:
        host: a name or an address.

    Returns:
        True for a loopback address and "localhost".
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def printable(text: str) -> str:
    """A text of the other side for a message: on one line, without control characters.

    Args:
        text: any.

    Returns:
        The text, each run of blanks and control characters as one blank.
    """
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


class _Refused(Exception):
    """A reply other than 200."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status, self.retry_after = status, retry_after


async def _each(call: Callable[[_Item], Awaitable[_Result]], items: list[_Item], parallel: int) -> list[_Result]:
    """Results of a call on each item, in order; after the first error the other calls are cancelled."""
    import anyio

    results: dict[int, _Result] = {}
    errors: list[Exception] = []
    places = anyio.Semaphore(parallel)

    async def one(row: int, item: _Item) -> None:
        async with places:
            try:
                results[row] = await call(item)
            except Exception as error:
                errors.append(error)
                group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for row, item in enumerate(items):
            group.start_soon(one, row, item)
    if errors:
        raise errors[0]
    return [results[row] for row in range(len(items))]


async def _attempt(
    client: httpx.AsyncClient, url: str, body: bytes | None, timeout: float, limit: int, queue_timeout: float, name: str
) -> bytes:
    """The body of the reply to one attempt."""
    import anyio

    began, received = anyio.current_time(), bytearray()
    try:
        with anyio.fail_after(timeout) as scope:
            async with client.stream("GET" if body is None else "POST", url, content=body) as reply:
                waits = "Content-Length" not in reply.headers
                async for chunk in reply.aiter_raw():
                    received += chunk
                    if len(received) > limit or (reply.status_code != 200 and len(received) > 2000):
                        break
                    if waits and not received.strip():  # blanks: the request waits in the server's queue
                        received.clear()
                        scope.deadline = timeout + max(began, min(anyio.current_time(), began + queue_timeout))
    except TimeoutError as error:
        waited = anyio.current_time() - began - timeout
        where = f", after {waited:.3g} s in its queue" if waited > 0.05 else ""
        raise RemoteError(
            f"the reward {name} at {url} gave no answer within {timeout:g} s{where}; allow a longer timeout, or send "
            "fewer samples at a time"
        ) from error
    if reply.status_code != 200:
        message = printable(bytes(received[:2000]).decode("utf-8", "replace")) or "(no message)"
        asked = reply.headers.get("Retry-After", "")
        pause = min(float(asked), _LONGEST_ASKED) if asked.isascii() and asked.isdigit() else None
        raise _Refused(reply.status_code, printable(reply.reason_phrase), message, pause)
    if len(received) > limit:
        raise RemoteError(
            f"the reward {name} at {url} sent a reply longer than the {limit} bytes expected; check that the address "
            "is that of the reward"
        )
    return bytes(received)


@lru_cache
def _tls_context() -> Any:
    """The certificates of httpx, which take a while to read."""
    import httpx

    return httpx.create_ssl_context()


_CURES = {
    401: "give the token that the server was started with (rewards.Remote(url, token=...); on the command line, the "
    "environment variable STEER_REWARD_TOKEN)",
    403: "give a token that may use this server",
    404: "check the address",
    413: "send fewer or smaller samples, or start the server with higher limits",
    429: "the server limits your rate: send less at a time",
}
