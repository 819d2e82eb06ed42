"""Progress of a run on stderr, and Ctrl-C or SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import inspect
import math
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.event import Event
    from ..cost import Meter


class Interrupt:
    """While open, a first Ctrl-C stops the run after the current step; a second raises KeyboardInterrupt at once.

    SIGTERM, which job schedulers send before they kill, does the same. The first is noted, and `check`, which an
    `on_step` callback calls, raises `Stop`. Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.asked, self._before = False, dict[signal.Signals, Any]()

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def check(self) -> None:
        """Raises `Stop` if Ctrl-C was pressed."""
        from ..types import Stop

        if self.asked:
            raise Stop

    def _note(self, *_: Any) -> None:
        self.asked = True
        for each in self._before:
            signal.signal(each, signal.default_int_handler)


class Watch:
    """Progress on stderr, an `on_step` callback: a bar on a terminal, elsewhere a line every tenth of the budget.

    Args:
        rows: NFE that the whole run will take, in network rows.
        name: What is shown beside the progress.
        show: Whether to print anything.
        interrupt: Checked after every step.
    """

    def __init__(self, rows: int, name: str, show: bool, interrupt: Interrupt):
        self.rows, self.name, self.interrupt = rows, name, interrupt
        self.best, self._done, self._tenth = -math.inf, 0, 0
        self._meter: Meter | None = None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._shown, self._lines = show, show and not console.is_terminal
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not show or self._lines,
        )
        self._task = self._bar.add_task(name, total=rows, note="")
        self._console = console

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        if self._meter is not None and event.meter is not self._meter:
            self._done += self._meter.nfe  # the next run of several has begun
        self._meter, done = event.meter, (self._done + event.meter.nfe)
        steps = event.process.steps
        note = f"step {event.level} of {steps}, ESS {event.ess.mean().item():.0f}"
        note += f", best {self.best:.3g}" if math.isfinite(self.best) else ""
        self._bar.update(self._task, completed=done, note=note)
        if self._lines and done * 10 // self.rows > self._tenth:
            self._tenth = done * 10 // self.rows
            self._console.print(f"{self.name}: {done:,} of {self.rows:,} network rows, {note}", highlight=False)
        self.interrupt.check()

    def hook(self, method: Callable[..., Any]) -> dict[str, Any]:
        """Keyword arguments that make a method call this after every step; none where it takes no `on_step`."""
        return {"on_step": self} if "on_step" in inspect.signature(method).parameters else {}

    def watching(self, reward: Callable[..., Any]) -> Callable[..., Any]:
        """The reward, its best score recorded; unchanged where nothing is shown, as reading scores costs a sync."""
        from functools import wraps

        import torch

        if not self._shown:
            return reward

        @wraps(reward)  # also keeps the signature, by which rewards ask for prompts
        def watched(samples: Tensor, **prompts: Any) -> Any:
            scores = reward(samples, **prompts)
            if isinstance(scores, torch.Tensor) and scores.numel():
                self.best = max(self.best, scores.detach().max().item())
            return scores

        spec = getattr(reward, "spec", None)  # of its class, which `wraps` does not copy
        watched.__dict__.update({} if spec is None else {"spec": spec})
        return watched
