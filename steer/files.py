"""Files: written atomically, sealed by a digest of all their bytes, as strict JSON, with the versions of a run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import secrets
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ModelError, SteerError
from .version import __version__

DIGESTS = "SHA256SUMS"
"""Beside the files of a model: their digests, as `sha256sum` writes and checks them."""
_ASIDE = ("metrics.json",)  # what is said of a model, which opening it does not read
_BLANK = b"0" * 64
_SEAL = re.compile(rb'"sha256\\?": \\?"([0-9a-f]{64})')
_SEAL_WITHIN = 160  # bytes: the seal is the first thing in a file


def write_atomically(path: Path, blob: bytes) -> Path:
    """The path, now holding the bytes: a reader or a crash finds the old file or the new, never a part.

    Args:
        path: the file; its directory is made.
        blob: all of it.

    Raises:
        SteerError: it cannot be written; an earlier file of that name is as it was.
    """
    try:
        _replace(path, blob)
    except (OSError, ValueError) as error:
        raise SteerError(
            f"cannot write {str(path)!r} ({type(error).__name__}: {error}); give a directory that you may write to, on "
            "a disk with room"
        ) from error
    return path


def _replace(path: Path, blob: bytes) -> None:
    """Writes a draft, makes sure that it is on the disk, and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for every draft: threads share a process number, and so do containers on one disk.
    draft = path.with_name(f".{path.name[:180]}.{secrets.token_hex(8)}.part")
    try:
        with open(draft, "xb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself survives a power cut only once the directory is on disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_writable(directory: Path) -> Path:
    """The directory, made where it is missing. SteerError where files cannot be written in it: before a run, not after.

    Args:
        directory: where a run is going to be saved.
    """
    try:
        write_atomically(directory / ".steer-probe", b"a run is going to be saved here\n").unlink(missing_ok=True)
    except SteerError as error:
        raise SteerError(f"nothing was run, since it could not be saved: {error}") from error
    return directory


def to_json(value: Any, *, indent: int | None = 1) -> bytes:
    """Strict JSON in UTF-8, readable or (indent=None) on one line; NaN and infinities, which JSON lacks, are null."""
    return (_as_text(value, indent) + "\n").encode()


def _as_text(value: Any, indent: int | None = None) -> str:
    """Strict JSON. Where a text holds half a surrogate pair, which UTF-8 lacks, all that is not ASCII is escaped."""
    text = json.dumps(plain(value), indent=indent, allow_nan=False, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(plain(value), indent=indent, allow_nan=False)
    return text


def plain(value: Any) -> Any:
    """The value in JSON's own types.

    Tensors and numpy arrays become lists, and their scalars numbers; what is no number becomes null; paths become text,
    and anything else its repr.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, os.PathLike) else repr(value)


# -- sealed files


def sealed(facts: Mapping[str, Any]) -> bytes:
    """Facts as a file of readable JSON that begins with the digest of all its bytes."""
    return _seal(to_json({"sha256": _BLANK.decode(), **facts}))


def to_archive(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """Tensors and facts as one safetensors file: facts as JSON in its header, with the digest of all its bytes.

    Args:
        tensors: by name.
        facts: of JSON's types, without what JSON lacks; numbers to be kept to the bit belong in a tensor.
    """
    from safetensors.torch import save

    held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    return _seal(save(held, metadata={"steer": _as_text({"sha256": _BLANK.decode(), **facts})}))


def from_archive(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and facts of a file that `to_archive` made.

    Args:
        path: the file.

    Raises:
        SteerError: there is no such file, or not all of its bytes are those that were written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    blob = read_sealed(path)
    try:
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        facts = json.loads(header["__metadata__"]["steer"])
        return load(blob), facts
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SteerError(
            f"{path} must be a safetensors file with the facts of a run in its header, and cannot be read as one "
            f"({type(error).__name__}: {error}); restore it from a copy, or run again"
        ) from error


def read_sealed(path: Path) -> bytes:
    """The bytes of a sealed file. SteerError where it cannot be read, or where a bit of it has changed."""
    try:
        blob = path.read_bytes()
    except (OSError, ValueError) as error:
        raise SteerError(
            f"cannot read {str(path)!r} ({type(error).__name__}: {error}); give the directory that Result.save or "
            "`steer generate` wrote"
        ) from error
    found = _SEAL.search(blob, 0, _SEAL_WITHIN)
    if found is None:
        raise SteerError(
            f"{path} must begin with the SHA-256 of its contents, and has none: it is damaged, or not a file that this "
            "version of steer wrote; restore it from a copy, or run again"
        )
    wanted, got = found[1].decode(), _digest(blob, found.start(1))
    if got != wanted:
        raise SteerError(
            f"{path} is not the file that was saved: its SHA-256 must be {wanted[:12]}..., got {got[:12]}...; restore "
            "it from a copy, or run again"
        )
    return blob


def _seal(blob: bytes) -> bytes:
    """The bytes with their digest in its place, which was left blank."""
    found = _SEAL.search(blob, 0, _SEAL_WITHIN)
    assert found is not None
    return b"".join((blob[: found.start(1)], _digest(blob, found.start(1)).encode(), blob[found.end(1) :]))


def _digest(blob: bytes, place: int) -> str:
    """SHA-256 of the bytes with zeros in the place of the digest itself."""
    view, found = memoryview(blob), hashlib.sha256()
    for part in (view[:place], _BLANK, view[place + len(_BLANK) :]):
        found.update(part)
    return found.hexdigest()


# -- what a run depends on


def check_digests(folder: Any) -> None:
    """Checks the files of a model against the digests that stand beside them.

    Args:
        folder: a directory, or one inside a package (`importlib.resources`), with a file SHA256SUMS.

    Raises:
        ModelError: a file is missing or is not the one that was packed.
    """
    cure = "restore the folder from where it came from (for a model that ships with steer: install steer again)"
    try:
        listed = [line.split(maxsplit=1) for line in (folder / DIGESTS).read_text(encoding="utf-8").splitlines()]
        changed = [name for wanted, name in listed if _sha256_of(folder.joinpath(*name.split("/"))) != wanted]
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder / DIGESTS} must list the model's files with their SHA-256, and they cannot be checked "
            f"({type(error).__name__}: {error}); {cure}"
        ) from error
    if changed or not listed:
        what = ", ".join(changed) if changed else "nothing"
        raise ModelError(f"{folder / DIGESTS} lists other contents for {what}: damaged or edited; {cure}")


def write_digests(folder: Path) -> Path:
    """Writes SHA256SUMS for the files of a model that are read to open it: safetensors, configuration, vocabularies."""
    read = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".safetensors", ".txt")]
    lines = [f"{_sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in read if path.name not in _ASIDE]
    return write_atomically(folder / DIGESTS, "".join(lines).encode())


def _sha256_of(path: Any) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions() -> dict[str, str | None]:
    """Versions that a run depends on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "steer": __version__}
    for name in ("torch", "numpy", "numba", "diffusers", "transformers", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """What the last bits of a run's numbers depend on beside versions: the processor, and the threads that add up."""
    return {"processor": platform.machine(), "system": platform.system(), "threads": torch.get_num_threads()}
