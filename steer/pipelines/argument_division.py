"""How the value of a call argument is divided among problems, where it may hold an entry for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Division = Literal["whole", "entries", "inside", "blocks"]
"""How a value is divided among B problems.

whole: every problem gets all of it. entries: a list, tensor or array of B, one entry each. inside: a list or dictionary
of such, as with one image per prompt for each of several control networks. blocks: a tensor of several blocks of B
entries, as embeddings for guidance and without are.
"""


def possible_divisions(value: Any, problems: int) -> list[Division]:
    """The ways in which a value may hold an entry for each problem; none where it can only be shared.

    Args:
        value: The argument's value.
        problems: B.

    Returns:
        Divisions other than "whole", the likelier first.
    """
    if problems < 2:
        return []
    found: list[Division] = []
    if isinstance(value, (list, tuple)) or _is_array(value):
        if len(value) == problems:
            found.append("entries")
        elif _is_array(value) and len(value) == 2 * problems:
            found.append("blocks")
    if isinstance(value, (list, tuple)) and value and all(_of_one(part, problems) for part in value):
        found.append("inside")
    if isinstance(value, dict) and any(_of_one(part, problems) for part in value.values()):
        found.append("inside")
    return found


def divided(value: Any, division: Division, chosen: Sequence[int], problems: int) -> Any:
    """The part of a value that belongs to the chosen problems, in the form of the whole.

    Args:
        value: The argument's value.
        division: How it is divided.
        chosen: Problems, in order; one may come several times.
        problems: B.

    Returns:
        A value of the same type.
    """
    if division == "whole":
        return value
    if division == "inside" and isinstance(value, dict):
        return {name: _of_part(part, chosen, problems) for name, part in value.items()}
    if division == "inside":
        return type(value)(_of_part(part, chosen, problems) for part in value)
    if division == "blocks":
        return value[[block * problems + b for block in range(len(value) // problems) for b in chosen]]
    if _is_array(value):
        return value[list(chosen)]
    return type(value)(value[b] for b in chosen)


def first_other_problem(value: Any, division: Division, problems: int) -> int | None:
    """The first problem whose part of a value differs from that of problem 0; None where all are equal."""
    parts = [divided(value, division, [b], problems) for b in range(problems)]
    return next((b for b in range(1, problems) if not same_value(parts[b], parts[0])), None)


def blanked(value: Any, division: Division) -> Any:
    """A value of the same form in which the first entry is black, zero or another text; None where it has no such."""
    if division == "inside":
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        new = {
            name: blanked(part, "entries") if isinstance(part, list) or _is_array(part) else part
            for name, part in parts
        }
        if any(part is None for part in new.values()):
            return None
        return new if isinstance(value, dict) else type(value)(new.values())
    if _is_array(value):
        other = value.clone() if torch.is_tensor(value) else value.copy()
        other[0] = 0 if bool((value[0] != 0).any()) else 1
        return other
    entry = _blank(value[0])
    return None if entry is None else type(value)((entry, *value[1:]))


def same_value(one: Any, other: Any) -> bool:
    """Whether two values are equal, tensors and arrays by their entries."""
    if torch.is_tensor(one) and torch.is_tensor(other):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if _is_array(one) and _is_array(other):
        return one.shape == other.shape and bool((one == other).all())
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(same_value, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_value(one[name], other[name]) for name in one)
    return one is other or (type(one) is type(other) and not _is_array(one) and bool(one == other))


def _is_array(value: Any) -> bool:
    """Whether a value is a tensor or a numpy array with an axis for problems and another."""
    import numpy as np

    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 1


def _of_one(part: Any, problems: int) -> bool:
    """Whether a part of a list or dictionary may itself hold an entry for each problem."""
    return (_is_array(part) and len(part) in (problems, 2 * problems)) or (
        isinstance(part, list) and len(part) == problems
    )


def _of_part(part: Any, chosen: Sequence[int], problems: int) -> Any:
    """The chosen problems' entries of a part of a list or dictionary; all of it where it has none for each."""
    if not _of_one(part, problems):
        return part
    return divided(part, "entries" if len(part) == problems else "blocks", chosen, problems)


def _blank(entry: Any) -> Any:
    """Another entry of the same form; None for numbers and what is not known."""
    import numpy as np

    if isinstance(entry, (Tensor, np.ndarray)):
        return entry * 0 if bool((entry != 0).any()) else entry + 1
    if isinstance(entry, str):
        return f"{entry} something else"
    if isinstance(entry, list):
        parts = [_blank(part) for part in entry]
        return None if any(part is None for part in parts) else parts
    if hasattr(entry, "getextrema") and hasattr(entry, "point"):  # a PIL image
        return entry.point(lambda level: 255 - level)
    return None
