"""One HTTP request with a deadline, a size limit and retries, and many calls at once: the base of remote rewards."""

from __future__ import annotations

import http.client
import ipaddress
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from steer.errors import RewardError

FIRST_WAIT, LONGEST_WAIT = 0.05, 2.0
"""Seconds before the first and the last retries; doubled in between, and jittered to avoid synchronised retries."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def request(
    url: str,
    body: bytes | None,
    headers: Mapping[str, str],
    *,
    name: str,
    timeout: float,
    retries: int,
    limit: int,
    retry_on: Collection[int] = (503,),
) -> bytes:
    """The body of the reply to a GET or POST.

    Redirects are not followed, as they would carry the token elsewhere, and a loopback host is reached without proxy.

    Args:
        url: http:// or https://.
        body: of a POST; None for a GET.
        headers: of the request.
        name: of the reward, for messages.
        timeout: seconds for one attempt.
        retries: further attempts, only where the connection failed or the status is in `retry_on`.
        limit: bytes that a reply may have.
        retry_on: statuses that mean "try again later".

    Returns:
        The reply's body.

    Raises:
        RewardError: for every failure, naming the reward, the address, what came, and the cure.
    """
    if not all(value.isascii() and value.isprintable() for value in headers.values()):
        raise RewardError(f"the reward {name} was given a token that is not printable ASCII; look for a stray newline")
    failure, cause = "", None
    for attempt in range(retries + 1):
        if attempt:
            pause = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
            time.sleep(pause * random.Random().uniform(0.5, 1.0))
        try:
            return _attempt(url, body, headers, timeout, limit, name)
        except urllib.error.HTTPError as error:
            cause = error
            with error:
                message = _message_of(error)
            failure = f"the reward {name} at {url} answered {error.code} {error.reason}: {message}"
            if error.code not in retry_on:
                raise RewardError(f"{failure}; {_CURES.get(error.code, 'look at the log of the server')}") from error
        except TimeoutError as error:
            raise _timed_out(name, url, timeout) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            cause = error
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _timed_out(name, url, timeout) from error
            failure = f"the reward {name} cannot be reached at {url}: {type(reason).__name__}: {reason}"
    raise RewardError(
        f"{failure} (tried {retries + 1} times); check that the server runs and keeps up, or allow more retries"
    ) from cause


def check_url(url: str, name: str) -> None:
    """Checks that a URL is of HTTP.

    Args:
        url: http:// or https://.
        name: of the reward, for the message.

    Raises:
        RewardError: for any other URL.
    """
    if not url.startswith(("http://", "https://")):
        raise RewardError(f"{name}(url) needs http://... or https://..., got {url!r}")


def in_parallel(
    call: Callable[[_Item], _Result], items: Iterable[_Item], *, threads: int, thread_name: str
) -> list[_Result]:
    """A call on each of several items, with several calls at once.

    Args:
        call: from an item to a result.
        items: what to call it on.
        threads: calls at once.
        thread_name: prefix of the threads' names.

    Returns:
        The results, in the order of the items.

    Raises:
        Exception: the first that a call raises, at once; calls under way are not waited for.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=thread_name)
    try:
        return list(pool.map(call, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error, calls under way are not waited for


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


def _attempt(url: str, body: bytes | None, headers: Mapping[str, str], timeout: float, limit: int, name: str) -> bytes:
    """The body of the reply to one attempt."""
    deadline = time.monotonic() + timeout
    prepared = urllib.request.Request(url, data=body, headers=dict(headers))
    handlers: list[Any] = [_NoRedirect()]
    if is_loopback(urlsplit(url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))
    with urllib.request.build_opener(*handlers).open(prepared, timeout=timeout) as reply:
        announced = reply.headers.get("Content-Length")
        received = bytearray()
        while chunk := reply.read1(1 << 16):
            received += chunk
            if len(received) > limit:
                raise RewardError(
                    f"the reward {name} at {url} sent a reply longer than the {limit} bytes expected; check that the "
                    "address is that of the reward"
                )
            if time.monotonic() > deadline:
                raise TimeoutError
        if announced is not None and len(received) != int(announced):
            raise http.client.IncompleteRead(bytes(received), int(announced) - len(received))
    return bytes(received)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Treats a redirect as the error that it is here."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _message_of(error: urllib.error.HTTPError) -> str:
    """The beginning of an error's body, on one line."""
    try:
        return " ".join(error.read(2000).decode("utf-8", "replace").split()) or "(no message)"
    except (OSError, http.client.HTTPException):
        return "(no message)"


def _timed_out(name: str, url: str, timeout: float) -> RewardError:
    return RewardError(
        f"the reward {name} at {url} gave no answer within {timeout:g} s; allow a longer timeout, or send fewer "
        "samples at a time"
    )


_CURES = {
    401: "give the token that the server was started with",
    403: "give a token that may use this server",
    404: "check the address",
    413: "send fewer or smaller samples, or start the server with higher limits",
    429: "the server limits your rate: send less at a time",
}
