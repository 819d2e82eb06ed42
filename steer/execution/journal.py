"""Runs that survive being killed: a journal of what the network and the reward answered, replayed on the next start.

A run is a function of its key and of the answers to its paid calls (`steer.calls`). The journal writes these down in
order; the same lines run again are told them, as long as they last, and go on from there, bit for bit. No sampler has
a state to save for it.

Where a method offers its whole state at the ends of its steps (`core.checkpoints`), the journal writes that down from
time to time, and deletes the calls that led there. The next start is then told the calls before the run, is handed the
state, and is told the calls after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..calls import Answer, Parts, fingerprint, through
from ..cost import Meter
from ..errors import JournalError, SteerError
from .distributed import Ranks, current
from .segments import Entry, Segments, Snapshot, Stored

CHECKPOINT = 60.0
"""Seconds between two snapshots of a run, where nothing else is said: few enough to lose little room, and each takes
the time of copying one population."""
CLOSE = 1e-3  # of the largest entry: rows of another batch, or another device, round differently; other weights differ
_RARELY = 20.0  # times what the last snapshot took, at least, until the next: a large tree takes long to write
_ANY_LEVEL = ("score", "groupwise")  # kinds of calls that are the same function at every level


@contextmanager
def resumable(
    directory: str | Path,
    *,
    every: float = 30.0,
    memory: int = 64 << 20,
    checkpoint: float | None = CHECKPOINT,
    check: bool = True,
) -> Iterator[Journal]:
    """Runs inside the block can be killed anywhere: the same lines run again go on from where the journal ends.

        with steer.resumable("runs/x/journal"):
            result = search.rbf(process, reward, budget=4000, key=0)

    Args:
        directory: where the journal is, or will be. One block, run again, per directory; several runs in it are fine.
            Inside `steer.distributed.together` each rank has a journal of its own below it.
        every: seconds between two writes, which is what a kill can cost.
        memory: bytes of answers that are held before they are written.
        checkpoint: seconds between two snapshots of the whole state of a run, each of which takes the place of the
            calls before it; more where writing one takes long (a twentieth of the time at most); 0: one every step.
            None: never, and the journal keeps all calls. Of the methods whose state is one population, or trees:
            docs/scale.md lists them. `on_step` is called for the steps after a snapshot alone; what objects of yours
            remember by themselves, such as a proposal that counts, is in no snapshot.
        check: whether the first recorded call of each kind is made again, for one sample per problem, so that another
            model or reward is noticed. Not in the ledger.

    Yields:
        The Journal: `replayed` and `recorded` calls, `snapshots` written, `bytes` on disk; `discard()` deletes it.

    Raises:
        JournalError: it is damaged, in use by another process, or of another run, model or reward.

    Cost: the answers on disk: a state per prediction and, where gradients are taken, two more; with snapshots, those
    since the last one, and one state of the run. Hashing and copying took 3 to 4 % of a run of small networks;
    predictions that the caller itself differentiates through are not recorded, and are paid again.
    """
    ranks, directory = current(), Path(directory)
    if ranks is not None:
        directory = directory / f"{ranks.rank}-of-{ranks.world}"
    journal = Journal(directory, every=every, memory=memory, checkpoint=checkpoint, check=check, ranks=ranks)
    try:
        with through(journal):
            yield journal
    finally:
        journal.close()


class Journal:
    """The calls of a run in order; those that an earlier start has paid for are answered from disk.

    calls: on disk when it was opened, with those that snapshots stand in for.
    replayed: calls answered so far.      recorded: calls made and noted so far.
    snapshots: written so far.            bytes: on disk.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every: float = 30.0,
        memory: int = 64 << 20,
        checkpoint: float | None = CHECKPOINT,
        check: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        if not every >= 0.0 or not memory > 0 or not (checkpoint is None or checkpoint >= 0.0):
            raise SteerError(
                f"every and checkpoint are in seconds, memory in bytes, none of them negative, got {every}, "
                f"{checkpoint} and {memory}"
            )
        self.directory, self.every, self.memory, self.check = Path(directory), every, memory, check
        self.checkpoint, self.ranks = checkpoint, ranks
        self.replayed = self.recorded = self.snapshots = 0
        self._segments = Segments(self.directory)
        try:
            self._agree_on_beginning()
        except BaseException:
            self._segments.close()
            raise
        self.calls = self._segments.calls
        self._told = self._segments.stored()
        self._ahead = next(self._told, None)
        self._held: list[Entry] = []
        self._since, self._size, self._checked = time.monotonic(), 0, set[str]()
        self._position = 0  # calls so far, told, made or stood in for by a snapshot
        self._last: WeakKeyDictionary[Meter, dict[str, int]] = WeakKeyDictionary()  # call of each kind of a run
        # The first samples of a run that were scored, one of each problem, with their scores: of this start, and told.
        self._scored: WeakKeyDictionary[Meter, tuple[Tensor, Tensor]] = WeakKeyDictionary()
        self._to_check: WeakKeyDictionary[Meter, tuple[Tensor, Tensor]] = WeakKeyDictionary()
        self._snapshot_at, self._took, self._at_snapshot = time.monotonic(), 0.0, 0  # when; seconds; calls made then

    @property
    def bytes(self) -> int:
        return self._segments.bytes

    def __call__(
        self, meter: Meter, kind: str, k: int, function: Callable[..., Answer], *tensors: Tensor, named: str = ""
    ) -> Answer:
        """The answer: from disk while the journal lasts, then from the call itself, which is noted."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return function(*tensors)  # the caller goes on to differentiate, which no record can answer
        of = [[str(tensor.dtype), list(tensor.shape), fingerprint(tensor)] for tensor in tensors]
        call = {"kind": kind, "level": k, "of": of, "named": named}
        if kind == "score":
            self._check_reward(call, meter, function, tensors[0])
        stored = self._next()
        if stored is not None:
            answer = self._replay(stored.item, call, meter, function, tensors)
        else:
            answer = self._record(call, meter, function, tensors)
        if kind == "score" and (meter not in self._scored or len(tensors[0]) > len(self._scored[meter][0])):
            self._scored[meter] = _on_host(tensors[0][:, :1]), _on_host(answer["score"][:, :1])
        # Of a point, its name says whether the reward is in it.
        self._last.setdefault(meter, {})[f"{kind} {named}" if kind == "point" else kind] = self._position
        self._position += 1
        return answer

    def begin(self, meter: Meter, about: dict[str, str], problems: int | None) -> Place:
        """The place of a run that begins its steps, with the state to go on from, where there is a snapshot of it."""
        place = Place(self, meter, about, problems, self._position)
        stored = self._ahead
        if stored is None:
            self.flush()  # what comes next begins a segment
            place.first, place.before = self._segments.next, self._segments.last
        elif not stored.first:
            raise self._another(f"{about['run']} begins", "another began, or none")
        elif isinstance(stored.item, Snapshot):
            self._next()
            self._resume(place, stored.item)
        else:
            place.first, place.before = stored.number, self._segments.before(stored.number)
        return place

    def flush(self) -> None:
        """Writes what is held as the next segment."""
        if self._held:
            self._segments.write_calls(self._held)
            self._held, self._size = [], 0
        self._since = time.monotonic()

    def close(self) -> None:
        """Writes what is held, and lets other processes in."""
        try:
            self.flush()
        finally:
            self._segments.close()

    def discard(self) -> None:
        """Deletes the journal, once its result is safe."""
        self._held, self._size = [], 0
        self._segments.clear()

    def _next(self) -> Stored | None:
        """What is on disk next, taken."""
        found, self._ahead = self._ahead, None
        if found is not None:
            self._ahead = next(self._told, None)
        return found

    def _record(self, call: dict[str, Any], meter: Meter, function: Callable[..., Answer], tensors: Any) -> Answer:
        """The answer of a call that is made, and held to be written."""
        before = meter.counts
        answer = function(*tensors)
        spent = [now - then for now, then in zip(meter.counts, before, strict=True)]
        held = {name: _on_host(tensor) for name, tensor in answer.items()}
        self._held.append(Entry(call, spent, held))
        self.recorded += 1
        self._size += sum(tensor.nbytes for tensor in held.values())
        if self._size > self.memory or time.monotonic() - self._since > self.every:
            self.flush()
        return answer

    def _replay(
        self,
        stored: Entry | Snapshot,
        call: dict[str, Any],
        meter: Meter,
        function: Callable[..., Answer],
        tensors: Any,
    ) -> Answer:
        """The answer of a call that is on disk."""
        if isinstance(stored, Snapshot):
            raise self._another(f"call {self._position} is {_in_words(call)}", f"{stored.about['run']} began")
        if stored.call != call:
            raise self._another(
                f"call {self._position} is {_in_words(call)}", f"call {self._position} was {_in_words(stored.call)}"
            )
        answer = {name: tensor.to(tensors[0].device) for name, tensor in stored.answer.items()}
        if self.check and call["kind"] not in self._checked | {"groupwise"}:
            self._checked.add(call["kind"])
            self._compare(answer, call, meter, function, tensors)
        meter.counts = [now + more for now, more in zip(meter.counts, stored.counts, strict=True)]
        self.replayed += 1
        return answer

    def _resume(self, place: Place, snapshot: Snapshot) -> None:
        """Has a run go on from a snapshot, once that is one of it."""
        for name in {**snapshot.about, **place.about}:
            then, now = snapshot.about.get(name, ""), place.about.get(name, "")
            if then != now:
                raise self._another(f"{place.about['run']} has {name} {_short(now)}", f"{name} was {_short(then)}")
        place.start, self._position = snapshot.calls
        place.first, place.before = snapshot.first, snapshot.before
        self._last[place.meter] = dict.fromkeys(snapshot.kinds, self._position - 1)
        tensors = dict(snapshot.tensors)
        scored = tensors.pop(_SAMPLES, None), tensors.pop(_SCORES, None)
        if scored[0] is not None and scored[1] is not None:
            self._scored[place.meter] = self._to_check[place.meter] = scored[0], scored[1]
        place.found = Parts(tensors, snapshot.facts)

    def _check_reward(self, call: dict[str, Any], meter: Meter, function: Callable[..., Answer], x: Tensor) -> None:
        """Raises where samples that were scored before a snapshot have other scores now."""
        samples, scores = self._to_check.get(meter, (None, None))
        if samples is None or scores is None or (call["kind"] in self._checked) or not self.check:
            return
        if len(samples) in (1, len(x)):
            del self._to_check[meter]
            self._checked.add(call["kind"])
            self._compare({"score": scores.to(x.device)}, call, meter, function, (samples.to(x.device),))

    def _another(self, now: str, then: str) -> JournalError:
        return JournalError(
            f"the journal in {self.directory} is of another run: there {then}, and now {now} instead; run it with the "
            "options, key, model and reward of then, or start a new directory"
        )

    # -- snapshots

    def offered(self, place: Place, parts: Callable[[], Parts]) -> None:
        """The end of a step: a snapshot is written where it is time, and stands in for the calls before it later."""
        if self.checkpoint is None or self._ahead is not None:
            return
        if place.written is not None and self._checkable(place):
            self.flush()  # on all ranks, before one of them deletes what others may have to go back to
            self._least(1)
            self._segments.cut_before(place.written[0])
            place.written = None
        due = time.monotonic() - self._snapshot_at >= (self.checkpoint and max(self.checkpoint, _RARELY * self._took))
        new = self.recorded > self._at_snapshot
        if place.written is None and new and self._least(int(due)):
            began = time.monotonic()
            self.flush()
            place.written = self._segments.next, self._position
            self._segments.write_snapshot(self._snapshot(place, parts()))
            self.snapshots, self._at_snapshot = self.snapshots + 1, self.recorded
            self._snapshot_at = time.monotonic()
            self._took = self._snapshot_at - began

    def _checkable(self, place: Place) -> bool:
        """Whether every kind of call that led to a snapshot has been made after it, by which a model is known again."""
        assert place.written is not None
        kinds = self._kinds(place)
        return all(kinds[kind] >= place.written[1] for kind in kinds if kind not in _ANY_LEVEL) and (
            self._position > place.written[1]
        )

    def _kinds(self, place: Place) -> dict[str, int]:
        """The last call of each kind that the run made in its steps."""
        return {kind: last for kind, last in self._last.get(place.meter, {}).items() if last >= place.start}

    def _snapshot(self, place: Place, parts: Parts) -> Snapshot:
        tensors = {name: _on_host(tensor) for name, tensor in parts.tensors.items()}
        scored = self._scored.get(place.meter)
        if scored is not None and place.problems in (None, len(scored[0])):  # by which the reward is known again
            tensors |= dict(zip((_SAMPLES, _SCORES), scored, strict=True))
        return Snapshot(
            about=place.about,
            facts=parts.facts,
            kinds=sorted(self._kinds(place)),
            calls=(place.start, self._position),
            first=place.first,
            before=place.before,
            tensors=tensors,
        )

    # -- ranks

    def _least(self, number: int) -> int:
        """The smallest of the ranks' numbers; the number itself where there is one process."""
        return number if self.ranks is None else self.ranks.least(number)

    def _agree_on_beginning(self) -> None:
        """Ranks of a group go on from the same snapshot, and from what each of them has after it."""
        if self.ranks is None:
            return
        self._segments.cut_at(-self.ranks.least(-self._segments.cut))  # where one has cut, all have the snapshot
        self.cut(self.ranks.least(self._segments.calls))

    def cut(self, calls: int) -> None:
        """Forgets all but the first calls."""
        kept = self._segments.cut_after(calls)
        if kept:
            self._segments.write_calls(kept)

    def _compare(
        self, told: Answer, call: dict[str, Any], meter: Meter, function: Callable[..., Answer], tensors: Any
    ) -> None:
        """Raises where the call, made again for the first sample of every problem, has another answer."""
        before, seconds = meter.counts, dict(meter.seconds)
        made = function(*(tensor[:, :1] for tensor in tensors))
        meter.counts = before
        meter.seconds.update(seconds)
        for name, tensor in made.items():
            if tensor.ndim < 2:
                continue
            then, now = told[name][:, :1].double(), tensor.detach().double()
            scale = max(1e-6, float(then[then.isfinite()].abs().max())) if bool(then.isfinite().any()) else 1.0
            if not torch.allclose(now, then, rtol=0.0, atol=CLOSE * scale, equal_nan=True):
                raise JournalError(
                    f"the journal in {self.directory} is of another model or reward: {name} of {_in_words(call)} was "
                    f"written down as something else than it is now (they differ by up to "
                    f"{float((now - then).abs().nan_to_num(torch.inf).max()):.3g}); use those of then, or start a new "
                    "directory"
                )


class Place:
    """Where a run began its steps.

    start:   calls before it.
    first, before: number of its first segment, and digest of the one before.
    found:   the state to go on from.
    written: number of a snapshot that stands in for nothing yet, and calls then.
    """

    def __init__(self, journal: Journal, meter: Meter, about: dict[str, str], problems: int | None, start: int) -> None:
        self.journal, self.meter, self.about, self.problems, self.start = journal, meter, about, problems, start
        self.first, self.before = 0, ""
        self.found: Parts | None = None
        self.written: tuple[int, int] | None = None

    def offer(self, parts: Callable[[], Parts]) -> None:
        """The end of a step, whose state may be written."""
        self.journal.offered(self, parts)


_SAMPLES, _SCORES = "scored.samples", "scored.scores"


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in the memory of the process, of its own."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _in_words(call: dict[str, Any]) -> str:
    """A call in words."""
    at = f" at level {call['level']}" if call["level"] >= 0 else ""
    named = f", {call['named']}" if call["named"] else ""
    of = " and ".join(f"{dtype} {shape} ({mark})" for dtype, shape, mark in call["of"])
    return f"{call['kind']}{at} of {of}{named}"


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
