"""Batches of B problems x N particles cut into chunks of one fixed shape, smaller where memory runs out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("steer")


class RowChunk(NamedTuple):
    """Rows start to stop of a flat batch: `rows_each` rows of each of `problems`, of which the last may be padding."""

    problems: tuple[int, ...]
    rows_each: int
    start: int
    stop: int


def row_chunks(problems: int, particles: int, chunk: int, together: bool = True) -> Iterator[RowChunk]:
    """Cut B * N rows, problem by problem, into chunks of at most `chunk` rows, all of the same shape.

    One shape suits compiled modules, and leaves few combinations of problems to encode. Chunks are as even as possible,
    so padding is at most one row per chunk, or some problems of the last.

    Args:
        problems: B.
        particles: N.
        chunk: Most rows per chunk.
        together: Whether a chunk may hold several problems.

    Returns:
        The chunks, which cover every row once.
    """
    if particles >= chunk or problems == 1 or not together:
        count = math.ceil(particles / chunk)
        rows_each = math.ceil(particles / count)
        for b in range(problems):
            for start in range(0, particles, rows_each):
                offset = b * particles
                yield RowChunk((b,), rows_each, offset + start, offset + min(start + rows_each, particles))
        return
    size = math.ceil(problems / math.ceil(problems / (chunk // particles)))
    for first in range(0, problems, size):
        last = min(first + size, problems)
        group = (*range(first, last), *(last - 1 for _ in range(size - (last - first))))
        yield RowChunk(group, particles, first * particles, last * particles)


class Chunked:
    """Applies a function to flat rows in chunks, with smaller chunks where memory runs out.

    Args:
        name: What the function is, for the log.
        function: Function of (rows [M, *event], problems, rows_each) to one output per row.
        chunk: Most rows per call. Halved permanently whenever memory runs out, and set to one where the first call
            with several rows raises: many pipelines take an image, a video or lyrics for one row only.
        may_share: Whether some problems, with so many rows each, can share a call; None: no problems can.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Tensor, tuple[int, ...], int], Tensor],
        chunk: int,
        may_share: Callable[[tuple[int, ...], int], bool] | None = None,
    ):
        self.name, self.function, self.chunk, self.may_share = name, function, chunk, may_share
        self._several = False  # whether a call with several rows went through

    def __call__(self, flat: Tensor, problems: int) -> Tensor:
        """Apply the function to all rows.

        Args:
            flat: Rows [B * N, *event], problem by problem.
            problems: B.

        Returns:
            The function's outputs, one per row, in the same order.

        Raises:
            Exception: What the function raises for single rows. Memory that runs out later, in a backward pass, is
                not handled here: give a smaller chunk.
        """
        particles = len(flat) // problems
        while True:
            try:
                cut = row_chunks(problems, particles, self.chunk, self.may_share is not None)
                rows = torch.cat([self._apply(flat, part) for part in cut])
                self._several = self._several or min(self.chunk, len(flat)) > 1
                return rows
            except torch.OutOfMemoryError:
                if min(self.chunk, len(flat)) == 1:
                    raise
            except Exception as error:
                if self._several or min(self.chunk, len(flat)) == 1:
                    raise
                return self._singly(flat, problems, error)
            # Outside the handler, where the failed call's frames, and the memory that they hold, are gone.
            self.chunk = min(self.chunk, len(flat)) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            log.warning("out of memory in %s: continuing with chunks of %d rows", self.name, self.chunk)

    def _singly(self, flat: Tensor, problems: int, error: Exception) -> Tensor:
        """Apply the function row by row after several raised, and permanently if no single row raises."""
        cut = row_chunks(problems, len(flat) // problems, 1, False)
        rows = torch.cat([self._apply(flat, part) for part in cut])
        self.chunk = 1
        log.warning(
            "%s: one row per call from now on, as several raised %s: %s", self.name, type(error).__name__, error
        )
        return rows

    def _apply(self, flat: Tensor, part: RowChunk) -> Tensor:
        """The function's outputs for one chunk of rows, padded to the fixed shape by repeating the last row."""
        rows, size = flat[part.start : part.stop], len(part.problems) * part.rows_each
        if len(part.problems) > 1 and self.may_share and not self.may_share(part.problems, part.rows_each):
            alone = zip(part.problems, rows.split(part.rows_each), strict=False)  # without the padding
            return torch.cat([self.function(own, (b,), part.rows_each) for b, own in alone])
        if len(rows) < size:
            rows = torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])
        return self.function(rows, part.problems, part.rows_each)[: part.stop - part.start]
