"""Files: written atomically, as strict JSON, with the versions that a run depends on."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from .version import __version__


def write_atomically(path: Path, blob: bytes) -> Path:
    """The path, now holding the bytes: a reader or a crash finds the old file or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(draft, "wb") as file:
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
    return path


def to_json(value: Any) -> bytes:
    """Readable, strict JSON: NaN and infinities, which JSON lacks, become null."""
    return (json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def plain(value: Any) -> Any:
    """The value in JSON's own types: tensors as lists, what is no number as null, anything else by its repr."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(entry) for entry in value]
    return repr(value)


def versions() -> dict[str, str | None]:
    """Versions that a run depends on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "steer": __version__}
    for name in ("torch", "diffusers", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
