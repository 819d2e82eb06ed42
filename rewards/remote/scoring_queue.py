"""What waits on a reward server: the queue of requests, and the memory that they may hold together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Generic, TypeVar

Item = TypeVar("Item")
Reply = tuple[int, bytes]
"""Status and body."""


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


class ScoringQueue(Generic[Item]):
    """Threads that answer requests in the order in which they came. A request that is cancelled before is not answered.

    The threads are daemons: a reward that hangs does not keep the process from ending.

    Args:
        threads: calls at once.
        places: requests that wait or are answered, at most.
        answer: the replies to requests that are answered together; it never raises.
        joins: whether a request that waits is answered together with those.
    """

    def __init__(
        self,
        threads: int,
        places: int,
        answer: Callable[[list[Item]], list[Reply]],
        joins: Callable[[list[Item], Item], bool],
    ) -> None:
        self._answer, self._joins = answer, joins
        self._places, self._closed = threading.BoundedSemaphore(places), False
        self._waiting: deque[tuple[Future[Reply], Item]] = deque()
        self._changed = threading.Condition()
        for number in range(threads):
            threading.Thread(target=self._work, name=f"steer reward {number}", daemon=True).start()

    def submit(self, item: Item) -> Future[Reply] | None:
        """Appends a request.

        Args:
            item: the request.

        Returns:
            Its reply to come, which can be cancelled until its turn; None where every place is taken.
        """
        if not self._places.acquire(blocking=False):
            return None
        future: Future[Reply] = Future()
        future.add_done_callback(lambda _: self._places.release())
        with self._changed:
            self._waiting.append((future, item))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Ends the threads once they are idle."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while self._answer_next():
            pass

    def _answer_next(self) -> bool:
        """Answers the first request, and those that join it; nothing of them stays. False: there is no more to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return False
            taken = [self._waiting.popleft()]
            waiting = list(self._waiting)
        for each in waiting:
            if self._joins([item for _, item in taken], each[1]) and self._take(each):
                taken.append(each)
        taken = [each for each in taken if each[0].set_running_or_notify_cancel()]
        if taken:
            for (future, _), reply in zip(taken, self._answer([item for _, item in taken]), strict=True):
                future.set_result(reply)
        return True

    def _take(self, each: tuple[Future[Reply], Item]) -> bool:
        """Takes a request out of the queue; False where another thread has done so."""
        with self._changed:
            if each in self._waiting:
                self._waiting.remove(each)
                return True
        return False
