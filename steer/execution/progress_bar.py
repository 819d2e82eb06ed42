"""How far runs are, while they run: network rows, the level, the best score, and the time that is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..calls import Answer, through
from ..cost import Meter

DUE = 0.2  # seconds between two looks at what is on a device


@contextmanager
def progress(total: int | None = None, *, name: str = "steer") -> Iterator[Progress]:
    """Shows a bar on stderr, or below a notebook's cell, for the runs in the block.

        with steer.progress(total=4000):
            result = steer.smc(process, reward, budget=4000)

    Args:
        total: network rows that the block will spend; None where that is not known, and rows are only counted.
        name: shown beside the bar.

    Yields:
        The Progress: `rows` and `best`, the best finite score so far.

    Cost: scores are read from the device five times a second, and nothing else is.
    """
    shown = Progress(total, name)
    with through(shown):
        try:
            shown.bar.start()
            yield shown
        finally:
            shown.show()
            shown.bar.stop()


class Progress:
    """A bar that is told of every paid call. Where stderr is neither a terminal nor a notebook, lines a tenth apart."""

    def __init__(self, total: int | None = None, name: str = "steer") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.total, self.name, self.best = total, name, -math.inf
        self.console = Console(stderr=True)
        self.lines = not (self.console.is_terminal or self.console.is_jupyter)
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        columns = (*columns, TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, console=self.console, transient=True, disable=self.lines)
        self.task = self.bar.add_task(name, total=total, note="")
        self._before, self._meter, self._tenth, self._seen = 0, None, 0, -math.inf

    def __call__(
        self, meter: Meter, kind: str, k: int, function: Callable[..., Answer], *tensors: Tensor, named: str = ""
    ) -> Answer:
        """The call itself; what it cost and scored is shown."""
        answer = function(*tensors)
        if meter is not self._meter:
            self._before, self._meter = self.rows, meter
        if time.monotonic() - self._seen > DUE:
            self._seen = time.monotonic()
            if "score" in answer:
                self.best = max(self.best, float(answer["score"].detach().max()))
            self.show()
        return answer

    @property
    def rows(self) -> int:
        """Network rows so far, over all runs of the block."""
        return self._before + (0 if self._meter is None else self._meter.nfe)

    def show(self) -> None:
        """Brings the bar up to date."""
        note = f"{self.rows:,}" + (f" of {self.total:,}" if self.total else "") + " rows"
        note += f", best {self.best:.3g}" if math.isfinite(self.best) else ""
        self.bar.update(self.task, completed=self.rows, note=note)
        if self.lines and self.total and self.rows * 10 // self.total > self._tenth:
            self._tenth = self.rows * 10 // self.total
            self.console.print(f"{self.name}: {note}", highlight=False)


def rows_of(process: Any, options: dict[str, Any]) -> int | None:
    """Network rows that a run with these options will spend, where they say."""
    problems = getattr(process, "problems", None) or options.get("batch", 1)
    if options.get("budget") is not None:
        return problems * options["budget"]
    if options.get("particles") is not None:
        return problems * options["particles"] * process.steps * process.rows
    return None
