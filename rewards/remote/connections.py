"""The HTTP server (uvicorn) with a deadline for whatever a connection may be slow at before its request is read."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

HEADER_SECONDS = 10.0
"""From the start of a connection to the end of its request's header."""

UNREAD_SECONDS = 30.0
"""That a reply waits for a client which does not read it."""


def http_server(app: Any) -> Any:
    """A uvicorn server, for `run(sockets=[...])` in a thread.

    A connection carries one request. One whose header is not there in time is closed, and so is the oldest of these
    where there are too many connections: whoever has no token can hold neither threads nor files.

    Args:
        app: of ASGI.

    Returns:
        The server; `should_exit = True` ends it.
    """
    import logging

    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    silent: dict[Any, None] = {}  # connections whose request has not been heard, from the oldest
    most = most_connections()
    log = logging.getLogger("steer.serve")
    log.addHandler(logging.NullHandler())  # whoever sends garbage cannot fill a log

    class Protocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.logger = log
            self.slow = self.loop.call_later(HEADER_SECONDS, transport.abort)
            silent[self] = None
            if len(self.connections) > most:
                oldest = next(iter(silent))
                oldest.heard()
                oldest.transport.abort()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None:
                self.heard()

        def connection_lost(self, exc: Exception | None) -> None:
            self.heard()
            super().connection_lost(exc)

        def heard(self) -> None:
            silent.pop(self, None)
            self.slow.cancel()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.slow = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self.slow.cancel()

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for connection in list(self.server_state.connections):
                transport: Any = connection.transport
                transport.abort()
            await asyncio.sleep(0)
            await super().shutdown(sockets)

    return Server(
        uvicorn.Config(
            app,
            http=Protocol,
            loop="asyncio",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            headers=[("Connection", "close"), ("Server", "steer")],
            backlog=64,
            timeout_graceful_shutdown=1,
        )
    )


def most_connections() -> int:
    """Connections at once: 256, or an eighth of the files that this process may open where that is less.

    Returns:
        At least 8. As many again may be waiting to be closed.
    """
    try:
        import resource
    except ImportError:  # not on Windows
        return 256
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 256 if files == resource.RLIM_INFINITY else max(8, min(256, files // 8))


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections.

    Args:
        host: a name, or an address of IPv4 or IPv6; "" and "::" are all addresses of both kinds.
        port: 0 picks a free one.

    Returns:
        The socket. Connections wait in it until a server takes them.

    Raises:
        OSError: where the port is taken, or there is no such host.
    """
    both = host in ("", "::") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    return socket.create_server(("::" if both else host, port), family=family, dualstack_ipv6=both)
