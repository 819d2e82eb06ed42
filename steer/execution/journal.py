"""Runs that survive being killed: a journal of what the network and the reward answered, replayed on the next start.

A run is a function of its key and of the answers to its paid calls (`steer.calls`). The journal writes these down in
order; the same lines run again are told them, as long as they last, and go on from there, bit for bit. No sampler has
a state to save for it.

On disk: numbered segments `000012-<digest>.safetensors`, each written at once, synced, and never changed. The digest is
of the whole file, and a segment names the digest of the one before it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calls import Answer, fingerprint, through
from ..cost import Meter
from ..errors import JournalError, SteerError
from ..files import write_atomically
from ..version import __version__
from .distributed import current

SEGMENTS = "[0-9]*-*.safetensors"
CLOSE = 1e-3  # of the largest entry: rows of another batch, or another device, round differently; other weights differ


class Entry(NamedTuple):
    """A call that was paid for. counts: network rows, gradients, rewards and decodes it cost."""

    call: dict[str, Any]
    counts: list[int]
    answer: Answer


@contextmanager
def resumable(
    directory: str | Path, *, every: float = 30.0, memory: int = 64 << 20, check: bool = True
) -> Iterator[Journal]:
    """Runs inside the block can be killed anywhere: the same lines run again go on from where the journal ends.

        with steer.resumable("runs/x/journal"):
            result = search.rbf(process, reward, budget=4000, key=0)

    Args:
        directory: where the journal is, or will be. One block, run again, per directory; several runs in it are fine.
            Inside `steer.distributed.together` each rank has a journal of its own below it.
        every: seconds between two writes, which is what a kill can cost.
        memory: bytes of answers that are held before they are written.
        check: whether the first recorded call of each kind is made again, for one sample per problem, so that another
            model or reward is noticed. Not in the ledger.

    Yields:
        The Journal: `replayed` and `recorded` calls, `bytes` on disk; `discard()` deletes it.

    Raises:
        JournalError: it is damaged, in use by another process, or of another run, model or reward.

    Cost: the answers on disk: a state per prediction and, where gradients are taken, two more. Hashing and copying took
    3 to 4 % of a run of small networks; predictions that the caller itself differentiates through are not recorded, and
    are paid again.
    """
    ranks, directory = current(), Path(directory)
    if ranks is not None:
        directory = directory / f"{ranks.rank}-of-{ranks.world}"
    journal = Journal(directory, every=every, memory=memory, check=check)
    if ranks is not None:
        journal.cut(ranks.least(journal.calls))
    try:
        with through(journal):
            yield journal
    finally:
        journal.close()


class Journal:
    """The calls of a run in order; those that an earlier start has paid for are answered from disk.

    calls: on disk when it was opened.    replayed: calls answered so far.
    recorded: calls made and noted so far.      bytes: on disk.
    """

    def __init__(self, directory: str | Path, *, every: float, memory: int, check: bool) -> None:
        if not every >= 0.0 or not memory > 0:
            raise SteerError(f"every is in seconds and memory in bytes, both positive, got {every} and {memory}")
        self.directory, self.every, self.memory, self.check = Path(directory), every, memory, check
        self.directory.mkdir(parents=True, exist_ok=True)
        self.replayed = self.recorded = self.bytes = 0
        self._lock = _locked(self.directory)
        for draft in self.directory.glob(".*.part"):  # of a writer that was killed
            draft.unlink()
        self._segments = _sound(self.directory)
        self.bytes = sum(path.stat().st_size for path in self._segments)
        self._written, self._digest = len(self._segments), _digest_of(self._segments[-1]) if self._segments else ""
        self._told = self._stored()
        self.calls = sum(len(_calls(path)) for path in self._segments)
        self._held: list[Entry] = []
        self._since, self._size, self._checked = time.monotonic(), 0, set[str]()

    def __call__(
        self, meter: Meter, kind: str, k: int, function: Callable[..., Answer], *tensors: Tensor, named: str = ""
    ) -> Answer:
        """The answer: from disk while the journal lasts, then from the call itself, which is noted."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return function(*tensors)  # the caller goes on to differentiate, which no record can answer
        of = [[str(tensor.dtype), list(tensor.shape), fingerprint(tensor)] for tensor in tensors]
        call = {"kind": kind, "level": k, "of": of, "named": named}
        entry = next(self._told, None)
        if entry is not None:
            return self._replay(entry, call, meter, function, tensors)
        before = meter.counts
        answer = function(*tensors)
        spent = [now - then for now, then in zip(meter.counts, before, strict=True)]
        held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in answer.items()}
        self._held.append(Entry(call, spent, held))
        self.recorded += 1
        self._size += sum(tensor.nbytes for tensor in held.values())
        if self._size > self.memory or time.monotonic() - self._since > self.every:
            self.flush()
        return answer

    def cut(self, calls: int) -> None:
        """Forgets all but the first calls: ranks of a group go on from what each of them has."""
        kept = 0
        for number, path in enumerate(self._segments):
            more = len(_calls(path))
            if kept + more > calls:
                self._held = list(itertools.islice(_entries(path), calls - kept))
                for later in reversed(self._segments[number:]):  # killed on the way, it leaves no gap
                    self.bytes -= later.stat().st_size
                    later.unlink()
                self._segments, self._written = self._segments[:number], number
                self._digest = _digest_of(self._segments[-1]) if self._segments else ""
                self._segments += self.flush()
                break
            kept += more
        self.calls, self._told = min(self.calls, calls), self._stored()

    def flush(self) -> list[Path]:
        """Writes what is held as the next segment: its path, or none where nothing is held."""
        written = []
        if self._held:
            from safetensors.torch import save

            calls = [{**entry.call, "counts": entry.counts, "names": list(entry.answer)} for entry in self._held]
            header = {"steer": __version__, "previous": self._digest, "calls": json.dumps(calls)}
            tensors = {f"{i}.{name}": t for i, entry in enumerate(self._held) for name, t in entry.answer.items()}
            blob = save(tensors, header)
            self._digest = _digest(blob)
            written = [write_atomically(self.directory / f"{self._written:06d}-{self._digest}.safetensors", blob)]
            self._written, self.bytes, self._held, self._size = self._written + 1, self.bytes + len(blob), [], 0
        self._since = time.monotonic()
        return written

    def close(self) -> None:
        """Writes what is held, and lets other processes in."""
        try:
            self.flush()
        finally:
            self._lock.close()

    def discard(self) -> None:
        """Deletes the journal, once its result is safe."""
        self._held, self._size = [], 0
        for path in self.directory.glob(SEGMENTS):
            path.unlink()
        self._segments, self._written, self._digest, self.bytes = [], 0, "", 0

    def _stored(self) -> Iterator[Entry]:
        """The calls on disk in order, one segment in memory at a time."""
        for path in self._segments:
            yield from _entries(path)

    def _replay(
        self, entry: Entry, call: dict[str, Any], meter: Meter, function: Callable[..., Answer], tensors: Any
    ) -> Answer:
        if entry.call != call:
            raise JournalError(
                f"the journal in {self.directory} is of another run: its call {self.replayed} was "
                f"{_in_words(entry.call)}, and this run makes {_in_words(call)} instead; run it with the options, key, "
                "model and reward of then, or start a new directory"
            )
        answer = {name: tensor.to(tensors[0].device) for name, tensor in entry.answer.items()}
        if self.check and call["kind"] not in self._checked | {"groupwise"}:
            self._checked.add(call["kind"])
            self._compare(answer, call, meter, function, tensors)
        meter.counts = [now + more for now, more in zip(meter.counts, entry.counts, strict=True)]
        self.replayed += 1
        return answer

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


def _locked(directory: Path) -> Any:
    """An open file that no other process holds; JournalError where one does. A killed process lets go of it."""
    lock = open(directory / "lock", "w")  # noqa: SIM115  (held until the journal is closed)
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: not guarded
        pass
    except OSError as error:
        lock.close()
        raise JournalError(
            f"the journal in {directory} is in use by another process; wait for it to end, or give this run a "
            "directory of its own"
        ) from error
    return lock


def _sound(directory: Path) -> list[Path]:
    """The segments in order, each read and checked; JournalError where one is missing, cut or altered."""
    from safetensors import safe_open

    paths, previous = sorted(directory.glob(SEGMENTS)), ""
    for number, path in enumerate(paths):
        blob = path.read_bytes()
        fault = f"begins with segment {path.name}" if not number else f"has a gap before {path.name}"
        if path.name == f"{number:06d}-{_digest(blob)}.safetensors":
            del blob
            with safe_open(path, "pt") as file:
                header = file.metadata()
            if header["steer"] != __version__:
                raise JournalError(
                    f"the journal in {directory} was written by steer {header['steer']}, and this is {__version__}: "
                    "its calls may be others; go on with that version, or start a new directory"
                )
            if header["previous"] == previous:
                previous = _digest_of(path)
                continue
        elif path.name.startswith(f"{number:06d}-"):
            fault = f"is damaged: the contents of {path.name} do not match their digest"
        raise JournalError(
            f"the journal in {directory} {fault}; restore the file, or delete it and those after it: the run then "
            "goes on from the segment before"
        )
    return paths


def _calls(path: Path) -> list[dict[str, Any]]:
    """The calls of a segment, without their answers."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["calls"])


def _entries(path: Path) -> Iterator[Entry]:
    """The calls of a segment with their answers."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for i, call in enumerate(_calls(path)):
            names = call.pop("names")
            yield Entry(call, call.pop("counts"), {name: file.get_tensor(f"{i}.{name}") for name in names})


def _digest(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()[:32]


def _digest_of(path: Path) -> str:
    return path.stem.partition("-")[2]


def _in_words(call: dict[str, Any]) -> str:
    """A call in words."""
    at = f" at level {call['level']}" if call["level"] >= 0 else ""
    named = f", {call['named']}" if call["named"] else ""
    of = " and ".join(f"{dtype} {shape} ({mark})" for dtype, shape, mark in call["of"])
    return f"{call['kind']}{at} of {of}{named}"
