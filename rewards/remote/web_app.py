"""The requests that a reward server answers (Starlette): who may ask, what is read, and when it is scored."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ..scoring import Scorer, name_of, spec_of
from .answers import Asked
from .scoring_queue import Body, Memory, Reply, ScoringQueue
from .wire_format import Limits, encode_spec

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

BODY_SECONDS = 60.0
"""For the body of a request, as a whole."""

BLANK_SECONDS = 0.5
"""Between the blanks that a client gets while its request waits for its turn."""

_TRY_SOON = {"Retry-After": "0"}
"""Of a 503: it comes from the queue of this server, and from no proxy without a server behind it."""


def web_app(
    rewards: Mapping[str, Scorer], *, token: str | None, queue: ScoringQueue[Asked], memory: Memory, limits: Limits
) -> Starlette:
    """GET /spec and POST /score of one reward, or GET /NAME/spec and POST /NAME/score of each of several.

    Args:
        rewards: by name; the name of a single one is "".
        token: that clients must send, or None.
        queue: of requests.
        memory: of requests.
        limits: of one request.

    Returns:
        The application.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def found(request: Request) -> Scorer:
        name = request.path_params.get("name", "")
        if name not in rewards:
            there = f"the rewards {', '.join(sorted(rewards))}" if "" not in rewards else "GET /spec and POST /score"
            raise HTTPException(404, f"there is no reward {name!r} here; there are {there}")
        return rewards[name]

    async def spec(request: Request) -> Response:
        reward = found(request)
        return Response(encode_spec(spec_of(reward), name_of(reward), limits), media_type="application/json")

    async def scores(request: Request) -> Response:
        reward = found(request)
        body = await _body(request, memory, limits)
        future = queue.submit(Asked(reward, body, limits.pixels))
        if future is None:
            body.release()
            raise HTTPException(503, "every place in the queue is taken; try again", _TRY_SOON)
        future.add_done_callback(lambda _: body.release())
        answer = asyncio.wrap_future(future)
        await asyncio.wait([answer], timeout=BLANK_SECONDS)
        if answer.done():
            status, reply = answer.result()
            return Response(reply, status, media_type="application/json")
        return _waiting_response(future, answer)

    async def refused(request: Request, error: Any) -> Response:  # async: others get a thread each
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    ends = [Route("/spec", spec), Route("/score", scores, methods=["POST"])]
    ends += [Route("/{name}/spec", spec), Route("/{name}/score", scores, methods=["POST"])]
    guard = [Middleware(_TokenCheck, token=token)] if token else []  # pyright: ignore[reportArgumentType]
    app = Starlette(routes=ends, middleware=guard, exception_handlers={HTTPException: refused})
    app.state.queue = queue
    return app


class _TokenCheck:
    """Answers 401 to a request without the token, before anything else of it is looked at."""

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        if scope["type"] == "lifespan":  # no request: the server begins, or ends
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        right = hmac.compare_digest(given, self.expected)
        await (self.app if right else JSONResponse({"error": "wrong or missing token"}, 401))(scope, receive, send)


async def _body(request: Request, memory: Memory, limits: Limits) -> Body:
    """The body of a request, read in time into memory that was counted before; HTTPException where that fails."""
    import anyio
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    size = await _content_length(request, limits)
    body = memory.body(size)
    if body is None:
        await _discard(request, size)
        raise HTTPException(503, "the memory for requests is full; try again", _TRY_SOON)
    at = 0
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for chunk in request.stream():
                if at + len(chunk) > size:
                    break
                body.data[at : at + len(chunk)] = chunk
                at += len(chunk)
        if at != size:
            raise HTTPException(400, f"expected {size} bytes, as Content-Length says, got {at} or more")
    except TimeoutError:
        body.release()
        raise HTTPException(408, f"the request was not there within {BODY_SECONDS:g} s; send it faster") from None
    except ClientDisconnect:
        body.release()
        raise HTTPException(400, "the request was broken off") from None
    except BaseException:
        body.release()
        raise
    return body


async def _content_length(request: Request, limits: Limits) -> int:
    """The announced length of the body; HTTPException 411 without one, 413 where it is over the limit."""
    from starlette.exceptions import HTTPException

    given = request.headers.get("Content-Length", "")
    if not (given.isascii() and given.isdigit()) or "Transfer-Encoding" in request.headers:
        raise HTTPException(411, "a request needs a Content-Length")
    if len(given) > 15 or int(given) > limits.bytes:
        await _discard(request, limits.bytes)
        raise HTTPException(413, f"expected at most {limits.bytes} bytes, got {given[:20]}")
    return int(given)


async def _discard(request: Request, most: int) -> None:
    """Reads a body and keeps nothing, so that a client still sending gets the answer and no broken connection."""
    import anyio
    from starlette.requests import ClientDisconnect

    with anyio.move_on_after(1.0):
        try:
            async for chunk in request.stream():
                most -= len(chunk)
                if most < 0:
                    return
        except ClientDisconnect:
            return


def _waiting_response(future: Future[Reply], answer: asyncio.Future[Reply]) -> Any:
    """A reply that sends blanks while its request waits; a client that leaves takes its request out of the queue."""
    from starlette.responses import StreamingResponse

    async def stream() -> AsyncIterator[bytes]:
        while not answer.done():
            if not future.running():
                yield b" "
            elif not started:
                started.append(True)
                yield b"\n"
            await asyncio.wait([answer], timeout=BLANK_SECONDS)
        yield answer.result()[1]

    started: list[bool] = []

    class Waiting(StreamingResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                future.cancel()  # of no effect where the request is scored already

    return Waiting(stream(), media_type="application/json")
