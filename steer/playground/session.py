"""A visitor's runs, one at a time: each in a thread, seen from outside moment by moment, and stopped on request."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.event import Event
from ..core.population import gather
from ..cost import Meter
from ..errors import SteerError
from ..evaluation.methods import sample
from ..report.pictures import is_pictures, thumbnail, to_pictures
from ..report.run_report import shown, write_report
from ..report.verdict import verdict
from ..results.result import Result
from ..types import ReverseProcess, Stop
from .lineage import Lineage
from .options import KEEP, Options
from .shelf import Shelf

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..report.pictures import Video

DUE = 0.25  # seconds between two looks at a run: each decodes a few predictions
_PREVIEWS = 8


@dataclass(frozen=True)
class Sample:
    """A sample to look at: a picture, or a text, or neither where it is an array of another kind."""

    picture: Image | Video | None
    text: str | None
    reward: float | None


@dataclass(frozen=True)
class Moment:
    """A run while it goes on.

    best, mean: rewards: the best so far, and the mean of this step; None where nothing was scored yet.
    left:       seconds to the end, at the pace so far.
    samples:    the best predictions of this step, best first.
    """

    level: int
    steps: int
    nfe: int
    budget: int
    left: float
    ess: float
    best: float | None
    mean: float | None
    samples: tuple[Sample, ...]
    lineage: Lineage


@dataclass(frozen=True)
class Ended:
    """A run that is over.

    result:  what it made; where it was stopped, what there was then. None where there is nothing.
    verdict: what the run did, in a sentence.
    error:   what went wrong, for people; "" where nothing did.
    report:  report.html; archive: the saved run and its report, as a zip file.
    """

    options: Options
    result: Result | None = None
    verdict: str = ""
    samples: tuple[Sample, ...] = ()
    lineage: Lineage | None = None
    error: str = ""
    report: Path | None = None
    archive: Path | None = None


class Session:
    """What belongs to one visitor: the run under way, and the files of runs that ended."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf, self._run, self._opening = shelf, None, threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="steer-play-", ignore_cleanup_errors=True)

    def run(self, options: Options) -> Iterator[Moment | Ended]:
        """Runs it: moments, of which the newest is given, and at last an Ended. Closed early, it stops the run.

        Raises:
            SteerError: a run of this visitor goes on.
        """
        with self._opening:
            if self._run is not None and self._run.alive:
                raise SteerError("a run of yours goes on; stop it first, or wait for its end")
            run = self._run = _Run(self.shelf, options, Path(self._folder.name))
            run.thread.start()
        try:
            yield from run.moments()
        finally:
            run.stop()

    def stop(self) -> None:
        """Ends the run under way after its present step; what it has is kept."""
        if self._run is not None:
            self._run.stop()

    def close(self) -> None:
        """The visitor has left: ends the run and forgets its files."""
        self.stop()
        self._folder.cleanup()


class _Run:
    """A run in a thread of its own."""

    def __init__(self, shelf: Shelf, options: Options, folder: Path) -> None:
        self.shelf, self.options, self.folder = shelf, options, folder
        self.thread = threading.Thread(target=self._work, name="steer-play", daemon=True)
        self._asked, self._changed = threading.Event(), threading.Condition()
        self._newest: Moment | Ended | None = None
        self._looked, self._best = -math.inf, -math.inf

    @property
    def alive(self) -> bool:
        return not isinstance(self._newest, Ended)

    def stop(self) -> None:
        self._asked.set()

    def moments(self) -> Iterator[Moment | Ended]:
        """What is new, until the end."""
        last: Moment | Ended | None = None
        while not isinstance(last, Ended):
            with self._changed:
                self._changed.wait_for(lambda seen=last: self._newest is not seen)
                last = self._newest
            assert last is not None
            yield last

    def _tell(self, news: Moment | Ended) -> None:
        with self._changed:
            self._newest = news
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            with self.shelf.turns.held():
                ended = self._made()
        except Exception as error:
            ended = Ended(self.options, error=_readable(error))
        self._tell(ended)

    def _made(self) -> Ended:
        """Opens the model, runs the method, and looks at what it made."""
        if self._asked.is_set():
            return Ended(self.options, error="stopped before the first step: there is nothing to keep")
        given = self.options
        process, reward = self.shelf.open(given)
        options = {**given.own, "budget": given.budget, "temperature": given.temperature, "key": given.seed}
        error = ""
        try:
            result = sample(process, reward, method=given.method, on_step=self._see, **options)
        except Exception as raised:
            result, error = getattr(raised, "partial", None), _readable(raised)
            if not isinstance(result, Result):
                return Ended(given, error=error)
        return self._looked_at(result, error)

    def _see(self, event: Event) -> None:
        """Called after every step."""
        scores = event.live_scores
        if scores is not None and bool(scores.isfinite().any()):
            self._best = max(self._best, float(scores[scores.isfinite()].max()))
        if time.monotonic() - self._looked > DUE:
            self._tell(self._moment(event))
            self._looked = time.monotonic()
        if self._asked.is_set():
            raise Stop
        self.shelf.turns.pass_on()

    def _moment(self, event: Event) -> Moment:
        scores = event.live_scores
        finite = None if scores is None else scores[scores.isfinite()]
        return Moment(
            level=event.level,
            steps=event.process.steps,
            nfe=event.cost.nfe,
            budget=self.options.budget,
            left=event.cost.seconds_left(self.options.budget),
            ess=float(event.ess.mean()),
            best=self._best if math.isfinite(self._best) else None,
            mean=float(finite.mean()) if finite is not None and finite.numel() else None,
            samples=_predictions(event),
            lineage=Lineage.of(event.live_state),
        )

    def _looked_at(self, result: Result, error: str) -> Ended:
        """A result with its pictures, and its files written."""
        count = min(KEEP, result.reward.shape[1])
        chosen = result.take(shown(result, count))
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        given = self.options
        about = {"model": given.model, "prompt": given.prompt, "label": given.label, "budget": given.budget}
        about |= {"reward": " + ".join(given.reward), "command": given.command()}
        saved = folder / "run"
        result.save(saved, **{name: value for name, value in about.items() if value is not None})
        report = write_report(result, saved, title=f"{about['reward']} on {given.model}", about=about)
        return Ended(
            given,
            result,
            verdict(result),
            _samples(chosen.process, chosen.x, chosen.reward),
            None if result.trajectory is None else Lineage.of(result.trajectory),
            error,
            report,
            Path(shutil.make_archive(str(folder / "run"), "zip", saved)),
        )


def _predictions(event: Event) -> tuple[Sample, ...]:
    """The best predictions of a step; those of highest weight where nothing was scored."""
    clean = event.clean
    if clean is None:
        return ()
    value = event.live_state.log_weight if event.live_scores is None else event.live_scores
    order = value[:1].argsort(dim=1, descending=True, stable=True)[:, :_PREVIEWS].to(clean.device)
    scores = None if event.live_scores is None else event.live_scores[:1].to(clean.device).gather(1, order)
    return _samples(event.process.metered(Meter()), gather(clean[:1], order), scores)


def _samples(process: ReverseProcess, x: Tensor, reward: Tensor | None) -> tuple[Sample, ...]:
    """Clean states [1, N, *event] as samples to look at."""
    count = x.shape[1]
    pictures: list[Any] = [None] * count
    texts: list[Any] = [None] * count
    with torch.no_grad():
        if process.text is not None:
            texts = list(process.text(x.flatten(0, 1)))
        elif is_pictures(decoded := process.decode(x)):
            pictures = [thumbnail(picture) for picture in to_pictures(decoded)]
    rewards = [None] * count if reward is None else reward.flatten().tolist()
    return tuple(Sample(*each) for each in zip(pictures, texts, rewards, strict=True))


def _readable(error: Exception) -> str:
    """An error as a sentence for people. One that is not of steer's making is logged with its traceback too."""
    if isinstance(error, Stop):
        return "stopped before there was anything to keep"
    text = " ".join(str(error).split())
    if isinstance(error, SteerError):
        return text
    if not isinstance(error, OSError | torch.OutOfMemoryError):
        logging.getLogger(__name__).error("a run of the playground failed", exc_info=error)
    return f"{type(error).__name__}: {text}"
