"""The directory of a run of many prompts: what is asked, what is done, and what failed, row by row.

    runs/foxes/
      run.yaml                 the options, made once
      prompts.jsonl            the rows as read
      rows/000/000012/         result.json and result.safetensors; or error.json; and journal/ while under way
      images/000/000012-00.png pictures, and no others below the directory; videos are 000012-00.webp
      metadata.jsonl           of the pictures, in the form of Hugging Face's ImageFolder; made again from the rows
      claims/000012            who makes the row now

A row is finished when its result.json is there, which is written last. So any process may look at any time, and the
same row made twice is the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import PromptError, RunDirectoryError
from ..files import to_json, versions, write_atomically
from ..results.saving import save_partial
from .prompts import Row

if TYPE_CHECKING:
    from ..results.result import Result

RESULT, ERROR, PER_FOLDER = "result.json", "error.json", 1000
State = Literal["finished", "failed", "missing"]
WRITTEN = frozenset(
    {"index", "prompt", "particle", "file_name", "image", "text", "score", "weight", "nfe", "method", "budget", "seed"}
)
"""What the metadata says of a sample, beside rewards by name ("reward.clip"): no other column can be called so."""


class RunDirectory:
    """A run of many prompts on disk.

    Args:
        path: of the directory.

    Attributes:
        options: what the run was asked for, as `run.yaml` has it.
        how:     how it is made, which makes no other run: `checkpoint`, as it was given.
        rows:    its rows.
    """

    def __init__(self, path: str | Path) -> None:
        import yaml

        self.path = Path(path)
        try:
            written = yaml.safe_load((self.path / "run.yaml").read_text())
            self.options: dict[str, Any] = written["options"]
            self.how: dict[str, Any] = written.get("how") or {}
            lines = (self.path / "prompts.jsonl").read_text("utf-8").splitlines()
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise RunDirectoryError(
                f"{self.path} is no run of many prompts: it needs run.yaml and prompts.jsonl, as `steer generate "
                f"--prompts FILE --out DIR` writes them ({error})"
            ) from error
        self.rows = [Row(**json.loads(line)) for line in lines]

    @classmethod
    def open(
        cls,
        path: str | Path,
        options: Mapping[str, Any],
        rows: Sequence[Row],
        how: Mapping[str, Any] | None = None,
    ) -> RunDirectory:
        """The directory of this run, made if it is not there; several processes may do so at once.

        how: how it is made, which is written once and may differ later.

        Raises:
            RunDirectoryError: it is the directory of another run; says which options, or rows, differ.
            PromptError: the rows have a column that the metadata would write over.
        """
        import yaml

        taken = sorted({name for row in rows for name in row.notes if name in WRITTEN or name.startswith("reward.")})
        if taken:
            raise PromptError(
                f"{', '.join(taken)} is what metadata.jsonl says of a sample, and a column of the prompts cannot have "
                f"that name; call it {taken[0]}_given, say"
            )
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows)
        written = {"options": dict(options), "how": dict(how or {}), "rows": len(rows), "versions": versions()}
        _create(path / "prompts.jsonl", lines.encode())
        _create(path / "run.yaml", yaml.safe_dump(written, sort_keys=False, allow_unicode=True).encode())
        found = cls(path)
        other = sorted(
            name for name in {*options, *found.options} if options.get(name, ...) != found.options.get(name, ...)
        )
        if other:
            told = ", ".join(f"{name}={found.options.get(name)!r} (now {options.get(name)!r})" for name in other)
            raise RunDirectoryError(f"{path} is of another run: {told}; use the same options, or another directory")
        if [row.to_dict() for row in found.rows] != json.loads(json.dumps([row.to_dict() for row in rows])):
            raise RunDirectoryError(f"{path} is of a run of other prompts; use the same file, or another directory")
        return found

    def folder(self, index: int) -> Path:
        """Of a row."""
        return self.path / "rows" / f"{index // PER_FOLDER:03d}" / f"{index:06d}"

    def save_picture(self, index: int, number: int, suffix: str, blob: bytes) -> str:
        """Writes a picture of a row, and returns its name below the directory, as metadata.jsonl has it."""
        path = self._pictures(index) / f"{index:06d}-{number:02d}{suffix}"
        return str(write_atomically(path, blob).relative_to(self.path))

    def save(self, row: Row, result: Result, pictures: Sequence[Mapping[str, Any]]) -> None:
        """Writes a row's result, by which it is finished, and clears away what was of use until then."""
        folder = self.folder(row.index)
        result.save(folder, pictures=list(pictures), **row.to_dict())
        (folder / ERROR).unlink(missing_ok=True)
        shutil.rmtree(folder / "journal", ignore_errors=True)
        shutil.rmtree(folder / "partial", ignore_errors=True)

    def _pictures(self, index: int) -> Path:
        return self.path / "images" / f"{index // PER_FOLDER:03d}"

    def claim(self, index: int) -> Path:
        """The file by which a process claims a row."""
        return self.path / "claims" / f"{index:06d}"

    def state(self, index: int) -> State:
        """Of a row."""
        folder = self.folder(index)
        if (folder / RESULT).exists():
            return "finished"
        return "failed" if (folder / ERROR).exists() else "missing"

    def states(self) -> dict[State, list[int]]:
        """The rows by state."""
        found: dict[State, list[int]] = {"finished": [], "failed": [], "missing": []}
        for row in self.rows:
            found[self.state(row.index)].append(row.index)
        return found

    def forget(self, index: int) -> None:
        """Deletes what there is of a row."""
        (self.folder(index) / RESULT).unlink(missing_ok=True)  # first, so that no half of a row looks finished
        shutil.rmtree(self.folder(index), ignore_errors=True)
        for path in self._pictures(index).glob(f"{index:06d}-*"):
            path.unlink()

    def failed(self, index: int, error: BaseException) -> None:
        """Writes the record of a row that could not be made, with what it had paid for where the error has it."""
        folder, partial = self.folder(index), getattr(error, "partial", None)
        record = {
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
            "attempts": self.attempts(index) + 1,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": socket.gethostname(),
            "partial": save_partial(partial, folder / "partial") is not None,
        }
        write_atomically(folder / ERROR, to_json(record))

    def error(self, index: int) -> dict[str, Any]:
        """The record of a failed row; empty where there is none."""
        try:
            return json.loads((self.folder(index) / ERROR).read_text())
        except FileNotFoundError:
            return {}

    def attempts(self, index: int) -> int:
        """How often a row has failed."""
        return self.error(index).get("attempts", 0)

    def entries(self, index: int) -> list[dict[str, Any]] | None:
        """What the metadata says of a row's samples, the best first; None where it is not finished."""
        path = self.folder(index) / RESULT
        return json.loads(path.read_text())["run"]["pictures"] if path.exists() else None

    def metadata(self) -> Iterator[dict[str, Any]]:
        """One entry per picture of the finished rows, in order."""
        for row in self.rows:
            yield from self.entries(row.index) or ()

    def gather(self) -> Path:
        """Writes metadata.jsonl from the finished rows."""
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.metadata())
        return write_atomically(self.path / "metadata.jsonl", lines.encode())


def run_of_row(folder: Path) -> RunDirectory | None:
    """The run of many prompts that a row's folder is in, RUN/rows/000/000012; None for other folders."""
    parents = folder.absolute().parents
    if len(parents) < 3 or parents[1].name != "rows" or not (parents[2] / "run.yaml").exists():
        return None
    return RunDirectory(parents[2])


def _create(path: Path, blob: bytes) -> None:
    """Writes a file that is not there, whole or not at all; of several processes one does."""
    if path.exists():
        return
    draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    draft.write_bytes(blob)
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
