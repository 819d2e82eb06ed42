"""What a pipeline prepares before its loop (embeddings, encoded images), kept between calls within a bound.

Conditions of several rows of one prompt are that prompt's, repeated: only one of each is kept, so that a process holds
about what its prompts' embeddings take, whatever the number of particles. Beyond the bound, the conditions used least
recently are dropped, and prepared again when they are needed.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("steer")

LIMIT_BYTES = 2**30
"""Most bytes of conditions that a process keeps. The last one prepared is kept whatever it takes."""


class _Repeated(NamedTuple):
    """Rows that are repeated: rows [P, ...] of P problems, and the shape to expand them to, with an axis of 1 first."""

    rows: Tensor
    expanded: tuple[int, ...]


def recall(kept: dict[Any, Any], key: Any) -> Any:
    """What is kept under a key, which becomes the last used; None where nothing is."""
    if key not in kept:
        return None
    kept[key] = kept.pop(key)
    return _map(kept[key], _expand)


def remember(kept: dict[Any, Any], key: Any, value: Any, problems: int, rows_each: int) -> None:
    """Keep a value, dropping those used least recently while all take more than `LIMIT_BYTES`.

    Args:
        kept: What is kept, oldest use first.
        key: What the value is kept under.
        value: Tensors in tuples, lists and dictionaries, or anything else.
        problems: Problems in the batch that it was prepared for.
        rows_each: Rows of each.
    """
    kept[key] = _map(value, lambda tensor: _without_repeats(tensor, problems, rows_each))
    sizes = {name: _bytes(entry) for name, entry in kept.items()}
    total, dropped = sum(sizes.values()), 0
    while total > LIMIT_BYTES and len(kept) > 1:
        oldest = next(iter(kept))
        del kept[oldest]
        total, dropped = total - sizes[oldest], dropped + 1
    if dropped:
        log.info("conditions take more than %d MB: %d dropped, to be prepared again", LIMIT_BYTES >> 20, dropped)


def _without_repeats(tensor: Tensor, problems: int, rows_each: int) -> Tensor | _Repeated:
    """A tensor of problems * rows_each rows as one row per problem, where the others repeat it, in either order."""
    if rows_each == 1 or tensor.ndim < 2 or len(tensor) != problems * rows_each:
        return tensor
    for axis, shape in ((1, (problems, rows_each)), (0, (rows_each, problems))):
        parts = tensor.unflatten(0, shape)
        rows = parts.narrow(axis, 0, 1)
        if torch.equal(rows.expand_as(parts), parts):
            return _Repeated(rows.clone(), tuple(parts.shape))
    return tensor


def _expand(kept: Tensor | _Repeated) -> Tensor:
    """The tensor that was kept; a new one where its rows repeat, as some loops write into their conditions."""
    return kept.rows.expand(kept.expanded).flatten(0, 1) if isinstance(kept, _Repeated) else kept


def _map(value: Any, function: Any) -> Any:
    """A value with a function applied to its tensors."""
    if torch.is_tensor(value) or isinstance(value, _Repeated):
        return function(value)
    if isinstance(value, dict) and type(value) is dict:
        return {name: _map(part, function) for name, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map(part, function) for part in value)
    return value


def _bytes(value: Any) -> int:
    """Bytes of the tensors in a value."""
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0
