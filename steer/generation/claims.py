"""Who makes a row: a file that only one process can create. It saves time; results do not rest on it."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TOUCH, STALE = 20.0, 120.0  # seconds


class Claim:
    """One row, ours until we leave it or die: a live claim is touched, and one that is not goes stale.

    Made by O_CREAT | O_EXCL, which is atomic on local disks and on NFS from version 3. Age is by the file system's own
    clock, against a file just touched, for the clocks of machines differ. A claim of this machine whose process is no
    more is free at once.
    """

    def __init__(self, path: Path, *, stale: float = STALE) -> None:
        self.path, self.stale = path, stale
        self.name = f"{socket.gethostname()}.{os.getpid()}.{random.getrandbits(48):012x}"

    def take(self) -> bool:
        """Whether the row is ours now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return self._dead(self.path) and self._replace()
        except FileNotFoundError:  # the folder of claims was cleared away, as it is when all rows are made
            return False
        with os.fdopen(handle, "w") as file:
            file.write(self.name)
        return True

    def leave(self) -> None:
        """Gives the row up, where it is still ours."""
        try:
            if self.path.read_text() == self.name:
                self.path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass

    @contextmanager
    def held(self, every: float = TOUCH) -> Iterator[None]:
        """Keeps it alive by a thread while the row is made, and gives it up then."""
        done = threading.Event()

        def touch() -> None:
            while not done.wait(every):
                try:
                    os.utime(self.path)
                except FileNotFoundError:  # gone stale, and taken by another: the row is made twice, to the same bytes
                    return

        thread = threading.Thread(target=touch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.leave()

    def _replace(self) -> bool:
        """Takes a stale claim over. Of several that try, one succeeds in renaming it away."""
        aside = self.path.with_name(f".{self.path.name}.{self.name}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return self.take()
        if not self._dead(aside):  # renewed between the look and the renaming: give it back
            with suppress(FileExistsError):
                os.link(aside, self.path)
            aside.unlink()
            return False
        aside.unlink()
        return self.take()

    def _dead(self, path: Path) -> bool:
        return _ended(path) or self._age(path) > self.stale

    def _age(self, path: Path) -> float:
        clock = self.path.with_name(f".clock.{self.name}")
        try:
            clock.touch()
            return clock.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            clock.unlink(missing_ok=True)


def _ended(path: Path) -> bool:
    """Whether a claim was made by a process of this machine that has ended."""
    try:
        host, pid, _ = path.read_text().rsplit(".", 2)
    except (FileNotFoundError, ValueError):  # given up, or not yet written
        return False
    if os.name != "posix" or host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
