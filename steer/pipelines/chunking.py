"""Rows of (B problems, N particles) in batches of one fixed shape, smaller where memory runs out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("steer")


class Piece(NamedTuple):
    """Rows start to stop of a flat batch, as `per` rows of each of some problems; the last rows may be padding."""

    problems: tuple[int, ...]
    per: int
    start: int
    stop: int


def pieces(problems: int, particles: int, chunk: int, together: bool = True) -> Iterator[Piece]:
    """B * N rows, problem by problem, in pieces of at most `chunk` rows and all of the same shape.

    One shape serves compiled modules, and leaves few combinations of problems to encode. Pieces are as even as can be,
    so padding is at most one row per piece, or some problems of the last. together: whether a piece may hold several.
    """
    if particles >= chunk or problems == 1 or not together:
        count = math.ceil(particles / chunk)
        per = math.ceil(particles / count)
        for b in range(problems):
            for start in range(0, particles, per):
                offset = b * particles
                yield Piece((b,), per, offset + start, offset + min(start + per, particles))
        return
    size = math.ceil(problems / math.ceil(problems / (chunk // particles)))
    for first in range(0, problems, size):
        last = min(first + size, problems)
        group = (*range(first, last), *(last - 1 for _ in range(size - (last - first))))
        yield Piece(group, particles, first * particles, last * particles)


class Chunked:
    """Applies a function of (rows, problems, per) to flat rows, in chunks.

    name: what it does, for the log. chunk: most rows per call; halved, for good, whenever memory runs out, and one
    where the first call with several rows raises: many pipelines take an image, a video or lyrics for one row only.
    together: whether a call may hold rows of several problems.
    """

    def __init__(
        self, name: str, function: Callable[[Tensor, tuple[int, ...], int], Tensor], chunk: int, together: bool
    ):
        self.name, self.function, self.chunk, self.together = name, function, chunk, together
        self._several = False  # whether a call with several rows went through

    def __call__(self, flat: Tensor, problems: int) -> Tensor:
        """The function's rows for rows (problems * particles, ...). Raises what the function raises for single rows.

        Memory that runs out later, in a backward pass, is the caller's to handle: give a smaller chunk.
        """
        particles = len(flat) // problems
        while True:
            try:
                cut = pieces(problems, particles, self.chunk, self.together)
                rows = torch.cat([self._piece(flat, piece) for piece in cut])
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
            log.warning("out of memory in %s: going on with chunks of %d rows", self.name, self.chunk)

    def _singly(self, flat: Tensor, problems: int, error: Exception) -> Tensor:
        """Row by row after several raised, and from here on if single rows do not raise too."""
        cut = pieces(problems, len(flat) // problems, 1, self.together)
        rows = torch.cat([self._piece(flat, piece) for piece in cut])
        self.chunk = 1
        log.warning("%s take one row per call: several raised %s: %s", self.name, type(error).__name__, error)
        return rows

    def _piece(self, flat: Tensor, piece: Piece) -> Tensor:
        rows, size = flat[piece.start : piece.stop], len(piece.problems) * piece.per
        if len(rows) < size:
            rows = torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])
        return self.function(rows, piece.problems, piece.per)[: piece.stop - piece.start]
