"""Counter-based random numbers: a draw is a function of its name, never of what was drawn before.

A `Key` names a draw by (seed, stream, step) and, inside the tensor drawn, by problem and particle slot. The name is
the counter of Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so results do not
depend on chunk size, on which problems share a batch, or on the order of the draws, and there is no generator state
to save. Words are exact integers on every device; normals are computed in float64 and rounded once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .errors import SteerError

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_CALLS_PER_BLOCK = 1 << 14  # small draws are made for several steps at once, up to this many Philox calls


@dataclass(frozen=True)
class Key:
    """The name of a draw.

    seed:    any int.
    stream:  path of names below the seed; streams are independent of one another.
    problem: slot of row 0 on axis 0 of what is drawn (shift it to draw a later batch of problems).
    slot:    slot of column 0 on axis 1 (shift it to draw a later chunk of particles).
    step:    step of a chain, 0 <= step < 2**32.
    columns: a hint to `peek`, no part of the name: how wide a population may be of which a part is drawn for.
    """

    seed: int
    stream: tuple[str | int, ...] = ()
    problem: int = 0
    slot: int = 0
    step: int = 0
    columns: int = field(default=0, compare=False, repr=False)

    def fold(self, *names: str | int) -> Key:
        """The independent key below this one with that name."""
        return type(self)(self.seed, (*self.stream, *names), self.problem, self.slot, self.step, self.columns)

    def at(self, step: int) -> Key:
        """This key at a step of the chain."""
        if not 0 <= step <= _MASK:
            raise SteerError(f"a key's step is a 32-bit counter, 0 <= step < 2**32, got {step}; fold the rest in")
        return type(self)(self.seed, self.stream, self.problem, self.slot, step, self.columns)

    def shifted(self, *, problem: int = 0, slot: int = 0) -> Key:
        """This key with the slots of row 0 and column 0 moved on, for drawing part of a larger tensor."""
        return type(self)(self.seed, self.stream, self.problem + problem, self.slot + slot, self.step, self.columns)

    def wide(self, columns: int) -> Key:
        """This key, for chains of which up to that many columns are under way at a time, and not always as many."""
        return type(self)(self.seed, self.stream, self.problem, self.slot, self.step, columns)

    def normal(
        self, shape: Sequence[int], *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Standard normals. Entry (b, n) depends on its slots and on the event shape only.

        Args:
            shape: [B, N, *event].
            dtype: of the result; draws are made in float64 and rounded once.
            device: of the result.
        """
        return self._draw("normal", shape, dtype, device, steps=1)

    def uniform(self, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
        """Uniforms in the open interval (0, 1), on a grid of 2**-32, float64, of shape [B, N, *event]."""
        return self._draw("uniform", shape, torch.float64, device, steps=1)

    def gumbel(self, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
        """Standard Gumbel variables: argmax(logits + gumbel) is a categorical draw."""
        return self.uniform(shape, device=device).log_().neg_().log_().neg_()

    def peek(self, kind: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """What `normal` or `uniform` returns, made together with the draws of the next steps: for chains.

        Args:
            kind: "normal" or "uniform".
            shape: [B, N, *event].
        """
        steps, width, size = 1, shape[1], math.prod(shape[2:])
        for width in (max(shape[1], self.columns), shape[1]):
            calls = shape[0] * (width * size // 4 + 2)
            steps = min(64, 1 << max(0, (_CALLS_PER_BLOCK // calls).bit_length() - 1))
            if steps > 1:
                break
        drawn = self._draw(kind, (shape[0], width, *shape[2:]), dtype, device, steps)[:, : shape[1]]
        return drawn if steps == 1 else drawn.clone()  # the block is kept, and what is handed out may be written to

    def _draw(
        self, kind: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, steps: int
    ) -> Tensor:
        size = math.prod(shape[2:])
        first = self.step - self.step % steps
        draw = _block if steps > 1 else _block.__wrapped__
        block = draw(
            kind, _words(self.seed, self.stream), first, steps, self.problem, shape[0], self.slot * size,
            shape[1] * size, dtype, torch.device(device) if isinstance(device, str) else device,
        )  # fmt: skip
        return block[self.step - first].view(shape)


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


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of Philox-4x32-10, int64 in [0, 2**32), for four broadcastable int64 counter words and a 64-bit key.

    The bits are those of Random123's `philox4x32`.
    """
    counter = torch.broadcast_tensors(*counter)
    multiplier, *round_keys = _constants(key, counter[0].ndim, counter[0].device)
    even = torch.stack([counter[0], counter[2]])
    even0, even1 = even
    odd0, odd1 = counter[1], counter[3]
    high = torch.empty_like(even)
    high0, high1 = high
    products = [(whole, *whole) for whole in (torch.empty_like(even), torch.empty_like(even))]
    for turn, round_key in enumerate(round_keys):
        # 32 x 32 -> 64 bits. The sign of a product and what stands above 32 bits in odd words fall to the mask. Views
        # are taken once, because taking one costs as much as a small xor.
        product, product0, product1 = products[turn % 2]
        torch.mul(even, multiplier, out=product)
        torch.bitwise_right_shift(product, 32, out=high)
        torch.bitwise_xor(high1, odd0, out=even0)
        torch.bitwise_xor(high0, odd1, out=even1)
        even.bitwise_xor_(round_key).bitwise_and_(_MASK)
        odd0, odd1 = product1, product0
    return even0, odd0 & _MASK, even1, odd1 & _MASK


@lru_cache(maxsize=64)
def _constants(key: tuple[int, int], ndim: int, device: torch.device) -> tuple[Tensor, ...]:
    """Philox's multipliers and the keys of its ten rounds, for counters of some dimensions."""
    # What a key carries above 32 bits falls to the mask of its round.
    keys = [[word + turn * weyl for word, weyl in zip(key, _WEYL, strict=True)] for turn in range(10)]
    table = torch.tensor([_MULTIPLIERS, *keys], dtype=torch.int64, device=device)
    return table.view(11, 2, *(1 for _ in range(ndim))).unbind(0)


@lru_cache(maxsize=256)
def _words(seed: int, stream: tuple[str | int, ...]) -> tuple[int, int]:
    """The 64-bit Philox key: a hash of seed and stream, so that no two seeds share it by truncation."""
    digest = hashlib.blake2b(repr((seed, stream)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


@lru_cache(maxsize=8)
def _block(
    kind: str,
    words: tuple[int, int],
    step: int,
    steps: int,
    problem: int,
    problems: int,
    first: int,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """(steps, problems, count) numbers: positions first..first+count of the line of each problem and step.

    A particle's numbers lie side by side on the line of its problem, four to a Philox call.
    """
    # Outside the caller's inference mode: a later call may need the same block under autograd.
    with torch.inference_mode(False), torch.no_grad():
        axis = {"dtype": torch.int64, "device": device}
        calls = torch.arange(first // 4, (first + count + 3) // 4, **axis)
        problem_word = torch.arange(problem, problem + problems, **axis)[:, None]
        step_word = torch.arange(step, step + steps, **axis)[:, None, None]
        word0, word1, word2, word3 = philox((calls, torch.zeros_like(calls[:1]), problem_word, step_word), words)
        out = torch.empty((*word0.shape, 4), dtype=dtype, device=device)
        if kind == "uniform":
            for i, word in enumerate((word0, word1, word2, word3)):
                out[..., i] = word
            out.add_(0.5).mul_(2.0**-32)
        else:  # Box-Muller; the angle, a multiple of one turn, needs no offset
            radius = torch.empty((2, *word0.shape), dtype=torch.float64, device=device)
            angle = torch.empty_like(radius)
            for half, along, around in ((0, word0, word1), (1, word2, word3)):
                radius[half], angle[half] = along, around
            radius.add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
            angle.mul_(2.0 * math.pi * 2.0**-32)
            pairs = out.view(*word0.shape, 2, 2).movedim(-2, 0)
            torch.mul(radius, angle.cos(), out=pairs[..., 0])
            torch.mul(radius, angle.sin_(), out=pairs[..., 1])
        return out.view(steps, problems, -1)[..., first % 4 : first % 4 + count].contiguous()
