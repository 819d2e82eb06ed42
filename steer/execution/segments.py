"""The files of a journal: numbered segments `000012-<digest>.safetensors`, each written at once and never changed.

The digest is of the whole file, and a segment names the digest of the one before it. A segment holds calls with their
answers, or a snapshot: the whole state of a run at the end of a step, which can stand in for all segments from the one
that the run began with. Once these are deleted, it does; until then it is passed over.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..calls import Answer
from ..errors import JournalError
from ..files import write_atomically
from ..version import __version__

SEGMENTS = "[0-9]*-*.safetensors"


class Entry(NamedTuple):
    """A call that was paid for. counts: network rows, gradients, rewards and decodes it cost."""

    call: dict[str, Any]
    counts: list[int]
    answer: Answer


class Snapshot(NamedTuple):
    """The whole state of a run at the end of a step.

    about:   the run, as texts by name.
    facts:   its state beside the tensors, of JSON's types.
    kinds:   of the calls that led there.
    calls:   how many the journal had before the run began, and at this place.
    first:   number of the segment that the run began with; before: digest of the one before that.
    tensors: its state, by name.
    """

    about: dict[str, str]
    facts: dict[str, Any]
    kinds: list[str]
    calls: tuple[int, int]
    first: int
    before: str
    tensors: Mapping[str, Tensor]


class Stored(NamedTuple):
    """What is on disk, in order. first: whether it is the first of its segment, whose number this is."""

    item: Entry | Snapshot
    number: int
    first: bool


class Segments:
    """The segments of a directory, which no other process has until they are closed.

    Raises JournalError where another process has them, or one is missing, cut or altered.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self._lock = directory, _locked(directory)
        try:
            for draft in directory.glob(".*.part"):  # of a writer that was killed
                draft.unlink()
            self.paths, replaced = _sound(directory)
        except BaseException:
            self._lock.close()
            raise
        for path in replaced:  # by a writer that was killed when it had begun to delete them
            path.unlink()

    def close(self) -> None:
        """Lets other processes in."""
        self._lock.close()

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def next(self) -> int:
        """Number of the segment that is written next."""
        return _number(self.paths[-1]) + 1 if self.paths else 0

    @property
    def last(self) -> str:
        """Digest of the last segment; "" where there is none."""
        return _digest_in(self.paths[-1]) if self.paths else ""

    def before(self, number: int) -> str:
        """Digest of the segment before the one of that number."""
        earlier = [path for path in self.paths if _number(path) < number]
        return _digest_in(earlier[-1]) if earlier else ""

    def write_calls(self, entries: Sequence[Entry]) -> None:
        """Appends calls as a segment."""
        calls = [{**entry.call, "counts": entry.counts, "names": list(entry.answer)} for entry in entries]
        tensors = {f"{i}.{name}": t for i, entry in enumerate(entries) for name, t in entry.answer.items()}
        self._write(tensors, {"calls": json.dumps(calls)})

    def write_snapshot(self, snapshot: Snapshot) -> None:
        """Appends a snapshot, which is passed over until `cut_before` deletes what it stands in for."""
        about = {name: value for name, value in snapshot._asdict().items() if name != "tensors"}
        self._write(snapshot.tensors, {"snapshot": json.dumps(about)})

    def cut_before(self, number: int) -> None:
        """Deletes what the snapshot of that number stands in for."""
        at = [_number(path) for path in self.paths].index(number)
        begins = _snapshot_in(_header(self.paths[at]))["first"]
        replaced = [path for path in self.paths[:at] if _number(path) >= begins]
        for path in reversed(replaced):  # killed on the way, this leaves no gap
            path.unlink()
        self.paths = [path for path in self.paths if path not in replaced]

    def cut_after(self, calls: int) -> list[Entry]:
        """Deletes all but the first calls. Those of a segment that is cut through are given back."""
        made = 0
        for at, path in enumerate(self.paths):
            header = _header(path)
            more = len(json.loads(header["calls"])) if "calls" in header else self._stands_for(at)
            if made + more > calls:
                kept = list(itertools.islice(_entries(path), calls - made)) if "calls" in header else []
                self._delete_from(at)
                return kept
            made += more
        return []

    def clear(self) -> None:
        """Deletes all."""
        self._delete_from(0)

    def stored(self) -> Iterator[Stored]:
        """Calls and snapshots in order, one segment in memory at a time."""
        for at, path in enumerate(self.paths):
            if "calls" in _header(path):
                for i, entry in enumerate(_entries(path)):
                    yield Stored(entry, _number(path), i == 0)
            elif self._stands_for(at):
                yield Stored(_snapshot(path), _number(path), True)

    @property
    def calls(self) -> int:
        """How many the segments hold or stand in for."""
        headers = enumerate(map(_header, self.paths))
        return sum(len(json.loads(h["calls"])) if "calls" in h else self._stands_for(at) for at, h in headers)

    @property
    def cut(self) -> int:
        """How many calls there were at the last snapshot that stands in for others; 0 without one."""
        ends = (_snapshot_in(_header(p))["calls"][1] for at, p in enumerate(self.paths) if self._stands_for(at))
        return max(ends, default=0)

    def cut_at(self, calls: int) -> None:
        """Has the snapshot of that many calls stand in for the ones before it, where there is one."""
        for path in self.paths:
            header = _header(path)
            if "snapshot" in header and _snapshot_in(header)["calls"][1] == calls:
                self.cut_before(_number(path))
                return

    def _stands_for(self, at: int) -> int:
        """How many calls a segment stands in for: those of a snapshot, where they have been deleted."""
        header = _header(self.paths[at])
        if "calls" in header:
            return 0
        about, earlier = _snapshot_in(header), _number(self.paths[at - 1]) if at else -1
        return about["calls"][1] - about["calls"][0] if earlier < about["first"] else 0

    def _delete_from(self, at: int) -> None:
        for path in reversed(self.paths[at:]):  # killed on the way, this leaves no gap
            path.unlink()
        self.paths = self.paths[:at]

    def _write(self, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
        from safetensors.torch import save

        blob = save(dict(tensors), {"steer": __version__, "previous": self.last, **header})
        self.paths.append(write_atomically(self.directory / _name(self.next, blob), blob))


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


def _sound(directory: Path) -> tuple[list[Path], list[Path]]:
    """The segments in order, each read and checked; and those that a snapshot stands in for, of a cut half made."""
    kept: list[Path] = []
    replaced: list[Path] = []
    for path in sorted(directory.glob(SEGMENTS)):
        if path.name != _name(_number(path), path.read_bytes()):
            raise _unsound(directory, f"is damaged: the contents of {path.name} do not match their digest")
        header = _header(path)
        if header["steer"] != __version__:
            raise JournalError(
                f"the journal in {directory} was written by steer {header['steer']}, and this is {__version__}: "
                "its calls may be others; go on with that version, or start a new directory"
            )
        if "snapshot" in header and not _follows(kept, _number(path), header["previous"]):
            about = _snapshot_in(header)
            while kept and _number(kept[-1]) >= about["first"]:
                replaced.append(kept.pop())
            follows = _follows(kept, about["first"], about["before"])
        else:
            follows = _follows(kept, _number(path), header["previous"])
        if not follows:
            raise _unsound(directory, f"has a gap before {path.name}" if kept else f"begins with segment {path.name}")
        kept.append(path)
    return kept, replaced


def _follows(kept: list[Path], number: int, previous: str) -> bool:
    """Whether a segment of that number, which names the digest of the one before, comes after these."""
    return number == (_number(kept[-1]) + 1 if kept else 0) and previous == (_digest_in(kept[-1]) if kept else "")


def _unsound(directory: Path, fault: str) -> JournalError:
    return JournalError(
        f"the journal in {directory} {fault}; restore the file, or delete it and those after it: the run then "
        "goes on from the segment before"
    )


def _header(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def _snapshot_in(header: Mapping[str, str]) -> dict[str, Any]:
    return json.loads(header["snapshot"])


def _snapshot(path: Path) -> Snapshot:
    """The snapshot that a segment holds."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return Snapshot(**_snapshot_in(file.metadata()), tensors={name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def _entries(path: Path) -> Iterator[Entry]:
    """The calls of a segment with their answers."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for i, call in enumerate(json.loads(file.metadata()["calls"])):
            names = call.pop("names")
            yield Entry(call, call.pop("counts"), {name: file.get_tensor(f"{i}.{name}") for name in names})


def _name(number: int, blob: bytes) -> str:
    return f"{number:06d}-{hashlib.sha256(blob).hexdigest()[:32]}.safetensors"


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _digest_in(path: Path) -> str:
    return path.stem.partition("-")[2]
