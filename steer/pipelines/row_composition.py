"""Whether a call for several problems gives its networks, row for row, what a call for each problem alone would.

Many pipelines order the rows of several prompts in one way and those of their masks in another, or pad a prompt to the
longest in the batch, so several problems share a call only where this says that nothing differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def composed_of(together: Any, alone: Sequence[Any], rows_each: int) -> bool:
    """Whether a call's inputs consist of the inputs of single problems.

    Rows are problem by problem, once or once per guidance branch; what has no rows must be the same for all problems.

    Args:
        together: Inputs of the call for several problems: tensors, numbers, texts, and lists and dictionaries of them.
        alone: Those of the calls for one problem each, in order.
        rows_each: Rows per problem.

    Returns:
        Whether they agree: numbers of the tensors up to rounding of their dtype, all else exactly.
    """
    if torch.is_tensor(together):
        if not all(torch.is_tensor(part) for part in alone):
            return False
        return all(_equal(part, together) for part in alone) or _rows_agree(together, alone, rows_each)
    if isinstance(together, dict):
        if not all(isinstance(part, dict) and part.keys() == together.keys() for part in alone):
            return False
        return all(composed_of(value, [part[name] for part in alone], rows_each) for name, value in together.items())
    if isinstance(together, (list, tuple)):
        if not all(isinstance(part, (list, tuple)) for part in alone):
            return False
        return _items_agree(together, alone, rows_each)
    if any(torch.is_tensor(part) for part in alone):
        return False
    return all(part is together or (type(part) is type(together) and bool(part == together)) for part in alone)


def _items_agree(together: Sequence[Any], alone: Sequence[Sequence[Any]], rows_each: int) -> bool:
    """As `composed_of`, for lists: of several inputs, or with an item for every row."""
    same_length = all(len(part) == len(together) for part in alone)
    if same_length and all(composed_of(v, [part[i] for part in alone], rows_each) for i, v in enumerate(together)):
        return True
    count, length = len(alone), len(alone[0])
    if any(len(part) != length for part in alone) or length % rows_each or len(together) != count * length:
        return False
    return all(
        composed_of(together[(branch * count + b) * rows_each + n], [alone[b][branch * rows_each + n]], 1)
        for branch in range(length // rows_each)
        for b in range(count)
        for n in range(rows_each)
    )


def _rows_agree(together: Tensor, alone: Sequence[Tensor], rows_each: int) -> bool:
    """As `composed_of`, for tensors with an axis of rows."""
    count, shape = len(alone), alone[0].shape
    if together.ndim == 0 or shape[0] % rows_each or any(part.shape != shape for part in alone):
        return False
    if together.shape[1:] != shape[1:] or len(together) != count * len(alone[0]):
        return False
    branches = together.unflatten(0, (-1, count, rows_each))
    return all(_equal(part.unflatten(0, (-1, rows_each)), branches[:, b]) for b, part in enumerate(alone))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are equal, up to how an encoder rounds in batches of another size."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other) or not one.is_floating_point():
        return torch.equal(one, other)
    tolerance = max(2e-5, 4.0 * torch.finfo(one.dtype).eps)
    one, other = one.float(), other.float()
    finite = one[one.isfinite()]
    scale = float(finite.abs().max()) if len(finite) else 0.0
    return bool(((one == other) | ((one - other).abs() <= tolerance * scale)).all())


def rows_of_pair(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """For each of two problems, its rows of what a loop carries, in all guidance branches."""
    for row in (0, 1):
        yield [tensor.detach().unflatten(0, (-1, 2))[:, row].double() for tensor in tensors]
