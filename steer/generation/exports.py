"""A finished run of many prompts in the forms that other tools read: parquet, WebDataset shards, GenEval's folders.

The run directory stays the source: an export is made from its finished rows, in their order, whoever made them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import RunDirectoryError, SteerError
from .prompts import Row
from .run_directory import PER_FOLDER, RunDirectory

Entries = list[dict[str, Any]]
"""What metadata.jsonl says of the samples of one row, the best first."""

ROWS_AT_ONCE = 64  # whose pictures are in memory while a parquet file is written


def write_parquet(directory: RunDirectory, out: str | Path) -> list[Path]:
    """Writes metadata.parquet: a line per sample, as metadata.jsonl has it, and its picture in the column `image`.

    `datasets.load_dataset("parquet", data_files=...)` reads the pictures as such.

    Args:
        directory: The run.
        out: Where to write; a new or an empty directory.

    Returns:
        The file's path, in a list.

    Raises:
        RunDirectoryError: No row is finished, `out` holds files, or a column has values of several types.
        SteerError: pyarrow is not installed.

    Cost: what metadata.jsonl says of all samples, and the pictures of 64 rows, are in memory.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise SteerError('writing parquet needs pyarrow: pip install "steer-diffusion[data]"') from error
    rows, path = list(_finished(directory)), _empty(out) / "metadata.parquet"
    names = list(dict.fromkeys(name for _, entries in rows for entry in entries for name in entry))
    fields = []
    for name in names:
        values = [entry.get(name) for _, entries in rows for entry in entries]
        try:
            fields.append((name, pyarrow.array(values).type))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            kinds = sorted({type(value).__name__ for value in values})
            raise RunDirectoryError(
                f"a column of parquet has one type, and {name} has {', '.join(kinds)}; make its values alike in the "
                "prompts, or export as webdataset"
            ) from error
    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    told = {"info": {"features": {"image": {"_type": "Image"}}}}  # how datasets knows a picture
    schema = pyarrow.schema([*fields, ("image", picture)], metadata={"huggingface": json.dumps(told)})
    with _draft(path) as draft, parquet.ParquetWriter(draft, schema) as writer:
        for first in range(0, len(rows), ROWS_AT_ONCE):
            entries = [entry for _, some in rows[first : first + ROWS_AT_ONCE] for entry in some]
            columns = {name: [entry.get(name) for entry in entries] for name in names}
            columns["image"] = [_embedded(directory, entry) for entry in entries]
            writer.write_table(pyarrow.Table.from_pydict(columns, schema))
    return [path]


def write_webdataset(directory: RunDirectory, out: str | Path, *, rows_per_shard: int = PER_FOLDER) -> list[Path]:
    """Writes shards as WebDataset reads them: 000000.tar with 000012-00.png and 000012-00.json for each sample.

    A row is in the shard of its index, so the shards are the same bytes whoever made the rows.

    Args:
        directory: The run.
        out: Where to write; a new or an empty directory.
        rows_per_shard: Rows of the run per shard.

    Returns:
        The paths of the shards. One of which no row is finished is left out.

    Raises:
        RunDirectoryError: No row is finished, or `out` holds files.
    """
    shards: dict[int, list[tuple[Row, Entries]]] = {}
    for row, entries in _finished(directory):
        shards.setdefault(row.index // rows_per_shard, []).append((row, entries))
    folder, paths = _empty(out), []
    for number, rows in shards.items():
        paths.append(folder / f"{number:06d}.tar")
        with _draft(paths[-1]) as draft, tarfile.open(draft, "w") as tar:
            for row, entries in rows:
                for place, entry in enumerate(entries):
                    key = f"{row.index:06d}-{place:02d}"
                    if "file_name" in entry:
                        source = directory.path / entry["file_name"]
                        _add(tar, f"{key}{source.suffix}", source.read_bytes())
                    _add(tar, f"{key}.json", json.dumps(entry, ensure_ascii=False).encode())
    return paths


def write_geneval(directory: RunDirectory, out: str | Path) -> list[Path]:
    """Writes the folders that GenEval's evaluate_images.py reads: 00012/metadata.jsonl and 00012/samples/0000.png.

    A row's metadata.jsonl is its prompt and its other columns: where the prompts were GenEval's own
    evaluation_metadata.jsonl, what it needs to judge them.

    Args:
        directory: The run.
        out: Where to write; a new or an empty directory.

    Returns:
        The folders of the rows.

    Raises:
        RunDirectoryError: No row is finished, `out` holds files, or rows have no prompts or pictures.
    """
    rows = list(_finished(directory))
    for row, entries in rows:
        if row.prompt is None or not all(entry.get("file_name", "").endswith(".png") for entry in entries):
            raise RunDirectoryError(
                f"GenEval's layout is of images with prompts, and row {row.index} has none; export as webdataset"
            )
    folder, folders = _empty(out), []
    for row, entries in rows:
        folders.append(folder / f"{row.index:05d}")
        (folders[-1] / "samples").mkdir(parents=True)
        said = {**row.notes, "prompt": row.prompt}
        (folders[-1] / "metadata.jsonl").write_text(json.dumps(said, ensure_ascii=False) + "\n", "utf-8")
        for place, entry in enumerate(entries):
            shutil.copyfile(directory.path / entry["file_name"], folders[-1] / "samples" / f"{place:04d}.png")
    return folders


FORMS: dict[str, Callable[[RunDirectory, Path], list[Path]]] = {
    "parquet": write_parquet,
    "webdataset": write_webdataset,
    "geneval": write_geneval,
}
"""By name, what writes a run in that form."""


def _finished(directory: RunDirectory) -> Iterator[tuple[Row, Entries]]:
    """The finished rows with what metadata.jsonl says of their samples."""
    none = True
    for row in directory.rows:
        entries = directory.entries(row.index)
        if entries is not None:
            none = False
            yield row, entries
    if none:
        raise RunDirectoryError(f"{directory.path} has no finished row to export; `steer status` says what failed")


def _empty(out: str | Path) -> Path:
    """The directory, made where it is missing; what an earlier export left could not be told from this one's."""
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunDirectoryError(f"an export goes to a new or an empty directory, and {out} holds files; name another")
    out.mkdir(parents=True, exist_ok=True)
    return out


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` once it is written."""
    draft = path.with_name(f".{path.name}.part")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, name: str, blob: bytes) -> None:
    """A member without owner or time, so that the same samples are the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(blob)
    tar.addfile(member, io.BytesIO(blob))


def _embedded(directory: RunDirectory, entry: dict[str, Any]) -> dict[str, Any] | None:
    """A sample's picture as a parquet file holds it; None where it has none."""
    name = entry.get("file_name")
    return None if name is None else {"bytes": (directory.path / name).read_bytes(), "path": name}
