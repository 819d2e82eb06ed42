"""Files of prompts: .txt, .jsonl, .csv and .parquet, one row each, with the pipeline's call arguments beside."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import PromptError

OWNED = {
    "num_images_per_prompt": "particles or a budget (--particles, --budget)",
    "num_inference_steps": "steps (--steps)",
    "generator": "the seed (--seed)",
    "latents": "start=steer.from_latents(...)",
    "output_type": "nothing: pictures are decoded as the pipeline does",
    "return_dict": "nothing",
    "eta": "transition=steer.ddim(eta)",
    "callback_on_step_end": "on_step=",
    "callback": "on_step=",
}
"""Arguments of a pipeline's call that steer decides, and what to set instead."""


@dataclass(frozen=True)
class Row:
    """One row of a file of prompts.

    index:  its number in the whole file, from 0: it names the row's noise, its files and its claim.
    prompt: None for models that take none.
    call:   arguments of the pipeline's call for this row.
    notes:  the other columns, which go into the metadata.
    """

    index: int
    prompt: str | None
    call: dict[str, Any]
    notes: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON types."""
        return {"index": self.index, "prompt": self.prompt, "call": self.call, "notes": self.notes}


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file as mappings with an entry "prompt" and whatever other columns there are.

    Args:
        path: .txt (one prompt a line; blank lines are skipped and not counted), .jsonl (objects), .csv (with a header;
            cells are JSON values where they read as such, and text otherwise) or .parquet (needs pyarrow).

    Raises:
        PromptError: there is no such file, it is of another kind, or a line cannot be read; says which.
    """
    path = Path(path)
    readers = {".txt": _text, ".jsonl": _json_lines, ".csv": _table, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise PromptError(f"prompts come from .txt, .jsonl, .csv or .parquet files, got {path.name!r}")
    try:
        entries = readers[path.suffix.lower()](path)
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read the prompts of {path}: {error}") from error
    if not entries:
        raise PromptError(f"{path} holds no prompts")
    return entries


def rows_of(entries: Iterable[Mapping[str, Any]], accepted: Collection[str]) -> list[Row]:
    """Rows from mappings: columns that the model's call takes are its arguments, the rest are notes.

    Args:
        entries: with "prompt" where the model takes one.
        accepted: names of the arguments of the model's call; "prompt" among them where it takes a prompt.

    Raises:
        PromptError: a row without a prompt, or with one that the model does not take; a column that steer decides
            (num_inference_steps, say), or one that is a letter away from an argument and would waste the run as a note.
    """
    rows, known = [], sorted(set(accepted) - {"prompt"} - set(OWNED))
    for index, entry in enumerate(entries):
        prompt = entry.get("prompt")
        if "prompt" in accepted and not isinstance(prompt, str):
            raise PromptError(f"row {index} has no prompt (a text under the name prompt), got {prompt!r}")
        if "prompt" not in accepted and prompt is not None:
            raise PromptError(f"row {index} has a prompt, and this model takes none; it takes {', '.join(known)}")
        call, notes = {}, {}
        for name, value in entry.items():
            if name == "prompt":
                continue
            if name in OWNED:
                raise PromptError(f"the column {name} is for steer to decide; set {OWNED[name]} instead")
            if name in known:
                call[name] = value
                continue
            near = get_close_matches(name, known, n=1, cutoff=0.85)
            if near:
                raise PromptError(f"the column {name} is no argument of the model; did you mean {near[0]}?")
            notes[name] = value
        rows.append(Row(index, prompt, call, notes))
    return rows


def _text(path: Path) -> list[dict[str, Any]]:
    return [{"prompt": line.strip()} for line in path.read_text("utf-8").splitlines() if line.strip()]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    entries = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise PromptError(f"line {number} of {path} is no JSON object: {error}") from error
        if not isinstance(entry, dict):
            raise PromptError(f'line {number} of {path} must be an object such as {{"prompt": ...}}, got {line[:60]}')
        entries.append(entry)
    return entries


def _table(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        entries = []
        for number, cells in enumerate(reader, 2):
            if None in cells or None in cells.values():
                raise PromptError(f"line {number} of {path} has another number of cells than the header")
            entries.append({name: text if name == "prompt" else _value(text) for name, text in cells.items()})
    return entries


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise PromptError('reading .parquet needs pyarrow: pip install "steer-diffusion[data]"') from error
    return parquet.read_table(path).to_pylist()


def _value(text: str) -> Any:
    """A cell as a number, true, false, null or a list, where it reads as one; else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def call_arguments(settings: Sequence[str]) -> dict[str, Any]:
    """Arguments of the model's call from NAME=VALUE texts."""
    given = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip().isidentifier():
            raise PromptError(f"an argument of the model's call must be NAME=VALUE, as in height=768; got {setting!r}")
        if name.strip() in OWNED:
            raise PromptError(f"{name.strip()} is for steer to decide; set {OWNED[name.strip()]} instead")
        given[name.strip()] = _value(text.strip())
    return given
