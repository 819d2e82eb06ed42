"""One HTTP request with a deadline, a size limit and retries: what rewards across a network are made of."""

from __future__ import annotations

import http.client
import ipaddress
import random
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from steer.errors import RewardError

FIRST_WAIT, LONGEST_WAIT = 0.05, 2.0
"""Seconds before the first and the last retries; doubled in between, and jittered so that clients do not march."""


def request(
    url: str,
    body: bytes | None,
    headers: Mapping[str, str],
    *,
    name: str,
    timeout: float,
    retries: int,
    limit: int,
    again: Collection[int] = (503,),
) -> bytes:
    """The body of the reply to a GET (body None) or POST.

    name: of the reward, for messages. timeout: seconds for one attempt. limit: bytes that a reply may have.
    retries: further attempts, only where the connection failed or the status is in `again`; nothing else is repeated.
    Redirects are not followed, as they would carry the token elsewhere, and a loopback host is reached without proxy.
    Raises RewardError for every failure, naming reward, address, what came and the cure.
    """
    if not all(value.isascii() and value.isprintable() for value in headers.values()):
        raise RewardError(f"the reward {name} was given a token that is not printable ASCII; look for a stray newline")
    failure, trouble = "", None
    for attempt in range(retries + 1):
        if attempt:
            pause = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
            time.sleep(pause * random.Random().uniform(0.5, 1.0))
        try:
            return _once(url, body, headers, timeout, limit, name)
        except urllib.error.HTTPError as error:
            trouble = error
            with error:
                said = _said(error)
            failure = f"the reward {name} at {url} answered {error.code} {error.reason}: {said}"
            if error.code not in again:
                raise RewardError(f"{failure}; {_CURES.get(error.code, 'look at the log of the server')}") from error
        except TimeoutError as error:
            raise _late(name, url, timeout) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            trouble = error
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _late(name, url, timeout) from error
            failure = f"the reward {name} cannot be reached at {url}: {type(reason).__name__}: {reason}"
    raise RewardError(
        f"{failure} (tried {retries + 1} times); see that the server runs and keeps up, or allow more retries"
    ) from trouble


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine and no other can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _once(url: str, body: bytes | None, headers: Mapping[str, str], timeout: float, limit: int, name: str) -> bytes:
    deadline = time.monotonic() + timeout
    asked = urllib.request.Request(url, data=body, headers=dict(headers))
    handlers: list[Any] = [_NoRedirect()]
    if is_loopback(urlsplit(url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))
    with urllib.request.build_opener(*handlers).open(asked, timeout=timeout) as reply:
        promised = reply.headers.get("Content-Length")
        came = bytearray()
        while chunk := reply.read1(1 << 16):
            came += chunk
            if len(came) > limit:
                raise RewardError(f"the reward {name} at {url} sent a reply longer than the {limit} bytes expected")
            if time.monotonic() > deadline:
                raise TimeoutError
        if promised is not None and len(came) != int(promised):
            raise http.client.IncompleteRead(bytes(came), int(promised) - len(came))
    return bytes(came)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _said(error: urllib.error.HTTPError) -> str:
    """The beginning of an error's body, on one line."""
    try:
        return " ".join(error.read(2000).decode("utf-8", "replace").split()) or "(no message)"
    except (OSError, http.client.HTTPException):
        return "(no message)"


def _late(name: str, url: str, timeout: float) -> RewardError:
    return RewardError(
        f"the reward {name} at {url} gave no answer within {timeout:g} s; allow a longer timeout, or send fewer "
        "samples at a time"
    )


_CURES = {
    401: "give the token that the server was started with",
    403: "give a token that may use this server",
    404: "look at the address",
    413: "send fewer or smaller samples, or start the server with higher limits",
    429: "the server limits your rate: send less at a time",
}
