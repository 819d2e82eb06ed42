"""Counter-based random numbers: a draw is a function of its name, never of what was drawn before.

A `Key` names a draw by (seed, stream, step) and, inside the tensor drawn, by problem and particle slot. The name is
the counter of Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so results do not
depend on chunk size, on which problems share a batch, or on the order of the draws, and there is no generator state
to save. Normals are computed in float64 and rounded once. `steer.noise` makes the numbers, the same on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .errors import SteerError
from .noise import backends

_WORDS = 1 << 32
_MADE = (torch.float64, torch.float32)  # what backends write; other types are rounded from the first
_BELOW_ONE = 1.0 - 2.0**-53


@dataclass(frozen=True)
class Key:
    """The name of a draw.

    seed:    any int.
    stream:  path of names below the seed; streams are independent of one another.
    problem: slot of row 0 on axis 0 of what is drawn (shift it to draw a later batch of problems).
    slot:    slot of column 0 on axis 1 (shift it to draw a later chunk of particles).
    step:    step of a chain, 0 <= step < 2**32.
    noise:   "auto", the fastest backend that the device has, or "reference", torch operations. No part of the name:
             both give the same numbers to the last bit. `result.made_by.noise` says which it was.
    """

    seed: int
    stream: tuple[str | int, ...] = ()
    problem: int = 0
    slot: int = 0
    step: int = 0
    noise: str = field(default="auto", compare=False, repr=False)

    def __post_init__(self) -> None:
        backends.check_choice(self.noise)

    def fold(self, *names: str | int) -> Key:
        """The independent key below this one with that name."""
        return self._with(stream=(*self.stream, *names))

    def at(self, step: int) -> Key:
        """This key at a step of the chain."""
        if not 0 <= step < _WORDS:
            raise SteerError(f"a key's step is a 32-bit counter, 0 <= step < 2**32, got {step}; fold the rest in")
        return self._with(step=step)

    def shifted(self, *, problem: int = 0, slot: int = 0) -> Key:
        """This key with the slots of row 0 and column 0 moved on, for drawing part of a larger tensor."""
        return self._with(problem=self.problem + problem, slot=self.slot + slot)

    def _with(self, **changes: Any) -> Key:
        # dataclasses.replace, which sets a frozen value field by field, takes five times as long, at every draw.
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, **changes)
        return new

    def normal(
        self, shape: Sequence[int], *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Standard normals. Entry (b, n) depends on its slots and on the event shape only.

        Args:
            shape: [B, N, *event].
            dtype: of the result; draws are made in float64 and rounded once.
            device: of the result.
        """
        return self._draw("normal", shape, dtype, device)

    def uniform(self, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
        """Uniforms in the open interval (0, 1), on a grid of 2**-32, float64, of shape [B, N, *event]."""
        return self._draw("uniform", shape, torch.float64, device)

    def fine_uniform(self, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
        """Uniforms in the open interval (0, 1) as fine as float64 goes, of shape [B, N, *event]: two draws of 32 bits.

        For choices among many: on a grid of 2**-32 what is rarer could never be drawn.
        """
        coarse, fine = (key.uniform(shape, device=device) for key in (self, self.fold("fine")))
        return coarse.add_(fine.sub_(0.5).mul_(2.0**-32)).clamp_(max=_BELOW_ONE)

    def gumbel(self, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
        """Standard Gumbel variables: argmax(logits + gumbel) is a categorical draw."""
        return self.fine_uniform(shape, device=device).log_().neg_().log_().neg_()

    def _draw(self, kind: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        problems, size = shape[0], math.prod(shape[2:])
        if not 0 <= self.problem <= _WORDS - problems or self.slot < 0:
            raise SteerError(
                f"a key names problems by a 32-bit counter and slots from 0 on, got problems from {self.problem} to "
                f"{self.problem + problems - 1} and slot {self.slot}; fold the rest in"
            )
        out = torch.empty(shape, dtype=dtype if dtype in _MADE else torch.float64, device=device)
        if out.numel():
            line, words = out.view(problems, shape[1] * size), _words(self.seed, self.stream)
            backends.fill(kind, line, self.slot * size, self.problem, self.step, words, self.noise)
        return out if out.dtype == dtype else out.to(dtype)


def as_key(key: Key | int, seed: int | None = None) -> Key:
    """A Key from a Key or an integer seed.

    Args:
        key: a Key, or a seed.
        seed: another name for `key`; only one of them can be given.

    Raises:
        SteerError: both are given, or neither a Key nor a whole number.
    """
    if seed is not None:
        if key != 0:
            raise SteerError(f"seed= is another name for key=: give one of them, got key={key!r} and seed={seed!r}")
        key = seed
    if isinstance(key, Key):
        return key
    if isinstance(key, bool) or not hasattr(key, "__index__"):
        raise SteerError(f"a key is a steer.Key or a whole number, got {key!r}")
    return Key(int(key))


@lru_cache(maxsize=256)
def _words(seed: int, stream: tuple[str | int, ...]) -> tuple[int, int]:
    """The 64-bit Philox key: a hash of seed and stream, so that no two seeds share it by truncation."""
    digest = hashlib.blake2b(repr((seed, stream)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
