"""What waits on a reward server: the queue of requests, and the memory that they may hold together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue

_Work = Callable[[], tuple[int, bytes]]
"""Gives the status and body of a reply, and never raises."""


class Memory:
    """The bytes that all requests of a server hold together, counted before they are taken.

    Bodies leave room for decoding one request of the largest size, so that a body which is in memory can always be
    decoded in the end.

    Args:
        total: bytes.
        reserve: of these, what decoding one request may take.
    """

    def __init__(self, total: int, reserve: int) -> None:
        self._for_bodies, self._free = total - reserve, total
        self._changed = threading.Condition()

    def body(self, size: int) -> Body | None:
        """Memory for the body of a request.

        Args:
            size: its bytes.

        Returns:
            An empty body; None where there is no room now.
        """
        with self._changed:
            if size > min(self._for_bodies, self._free):
                return None
            self._for_bodies -= size
            self._free -= size
        return Body(self, size)

    @contextmanager
    def decoding(self, size: int) -> Iterator[None]:
        """Takes memory for decoded samples, once there is room, and gives it back at the end.

        Args:
            size: bytes.

        Returns:
            A context manager.
        """
        with self._changed:
            self._changed.wait_for(lambda: size <= self._free)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()

    def give_back(self, size: int) -> None:
        """Returns the memory of a body.

        Args:
            size: its bytes.
        """
        with self._changed:
            self._for_bodies += size
            self._free += size
            self._changed.notify_all()


class Body:
    """The body of a request, and the memory that is counted for it. Made by `Memory.body`.

    Args:
        memory: where it is counted.
        size: its bytes.
    """

    def __init__(self, memory: Memory, size: int) -> None:
        self._memory, self._size = memory, size
        self.data = bytearray(size)

    def release(self) -> None:
        """Drops the data and gives the memory back; nothing where that was done before."""
        size, self._size, self.data = self._size, 0, bytearray()
        self._memory.give_back(size)


class ScoringQueue:
    """Threads that score requests in the order in which they came. A request that is cancelled before is not scored.

    The threads are daemons: a reward that hangs does not keep the process from ending.

    Args:
        threads: requests scored at once.
        places: requests that wait or are scored, at most.
    """

    def __init__(self, threads: int, places: int) -> None:
        self._waiting: SimpleQueue[tuple[Future[tuple[int, bytes]], _Work] | None] = SimpleQueue()
        self._places, self._threads = threading.BoundedSemaphore(places), threads
        for number in range(threads):
            threading.Thread(target=self._score, name=f"steer reward {number}", daemon=True).start()

    def submit(self, work: _Work) -> Future[tuple[int, bytes]] | None:
        """Appends a request.

        Args:
            work: what to do when its turn comes.

        Returns:
            Its reply to come, which can be cancelled until then; None where every place is taken.
        """
        if not self._places.acquire(blocking=False):
            return None
        future: Future[tuple[int, bytes]] = Future()
        future.add_done_callback(lambda _: self._places.release())
        self._waiting.put((future, work))
        return future

    def close(self) -> None:
        """Ends the threads once they are idle."""
        for _ in range(self._threads):
            self._waiting.put(None)

    def _score(self) -> None:
        while (job := self._waiting.get()) is not None:
            future, work = job
            if future.set_running_or_notify_cancel():
                future.set_result(work())
            del job, future, work  # nothing of a request stays while the next is waited for
