"""Models that visitors share, and whose turn it is to use them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import SteerError
from ..generation.generator import Generator
from ..types import ReverseProcess
from .options import Options


class Turns:
    """A lock that goes to whoever has waited longest.

    A loaded pipeline is not thread-safe, so one run at a time uses the networks. A run passes its turn on after every
    step: runs of several visitors advance together, and none waits for the end of another.
    """

    def __init__(self) -> None:
        self._changed, self._waiting = threading.Condition(), deque[object]()

    @contextmanager
    def held(self) -> Iterator[None]:
        """While open, it is this thread's turn."""
        self._take()
        try:
            yield
        finally:
            self._give()

    def pass_on(self) -> None:
        """Lets those who wait go first. Called by the thread whose turn it is."""
        if len(self._waiting) > 1:
            self._give()
            self._take()

    def _take(self) -> None:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(lambda: self._waiting[0] is ticket)

    def _give(self) -> None:
        with self._changed:
            self._waiting.popleft()
            self._changed.notify_all()


class Shelf:
    """Loaded models and rewards, by name: each is loaded once, for all visitors. To be used in one's turn."""

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.turns = device, Turns()
        self._models: dict[str, Generator] = {}
        self._rewards: dict[tuple[Any, ...], Any] = {}

    def model(self, name: str) -> Generator:
        """A model, loaded.

        Raises:
            ModelError: there is none of that name.
        """
        if name not in self._models:
            generator = Generator(name, reward=None, device=self.device)
            _ = generator.accepted  # loads it, or says what is wrong with its name
            self._models[name] = generator
        return self._models[name]

    def takes(self, name: str) -> set[str]:
        """Which of "prompt" and "label" a model takes."""
        return {"prompt", "label"}.intersection(self.model(name).accepted)

    def open(self, options: Options) -> tuple[ReverseProcess, Any]:
        """The process and the reward of a run.

        Raises:
            SteerError: there is no such model or reward, or the model takes no such prompt or label.
        """
        takes = self.takes(options.model)
        if options.label is not None and "label" not in takes:
            raise SteerError(f"{options.model} takes no label; leave it empty")
        if (options.prompt is None) == ("prompt" in takes):
            cure = "needs a prompt; write one" if options.prompt is None else "takes no prompt; leave it empty"
            raise SteerError(f"{options.model} {cure}")
        process = self.model(options.model).process(options.prompt, **options.call)
        return process, self._reward(options, process)

    def _reward(self, options: Options, process: ReverseProcess) -> Any:
        from .. import rewards

        named = (options.reward, options.model if process.text is not None else None)  # rewards of text read by it
        if named not in self._rewards:
            self._rewards[named] = rewards.from_specs(options.reward, process.text)
        return self._rewards[named]
