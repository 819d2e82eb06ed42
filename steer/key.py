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
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CALLS_PER_BLOCK = 1 << 14  # small draws are made for several steps at once, up to this many Philox calls


@dataclass(frozen=True)
class Key:
    """The name of a draw.

    seed:    any int.
    stream:  path of names below the seed; streams are independent of one another.
    problem: slot of row 0 on axis 0 of what is drawn (shift it to draw a later batch of problems).
    slot:    slot of column 0 on axis 1 (shift it to draw a later chunk of particles).
    step:    step of a chain, 0 <= step < 2**32.
    """

    seed: int
    stream: tuple[str | int, ...] = ()
    problem: int = 0
    slot: int = 0
    step: int = 0

    def fold(self, *names: str | int) -> Key:
        """The independent key below this one with that name."""
        return Key(self.seed, (*self.stream, *names), self.problem, self.slot, self.step)

    def at(self, step: int) -> Key:
        """This key at a step of the chain."""
        return Key(self.seed, self.stream, self.problem, self.slot, step)

    def shifted(self, *, problem: int = 0, slot: int = 0) -> Key:
        """This key with the slots of row 0 and column 0 moved on, for drawing part of a larger tensor."""
        return Key(self.seed, self.stream, self.problem + problem, self.slot + slot, self.step)

    def normal(
        self, shape: Sequence[int], *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Standard normals of shape (B, N, *event). Entry (b, n) depends on its slots and on the event shape only."""
        return self._draw("normal", shape, dtype, device)

    def uniform(self, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
        """Uniforms in the open interval (0, 1), on a grid of 2**-32, float64, of shape (B, N, *event)."""
        return self._draw("uniform", shape, torch.float64, device)

    def gumbel(self, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
        """Standard Gumbel variables: argmax(logits + gumbel) is a categorical draw."""
        return self.uniform(shape, device=device).log_().neg_().log_().neg_()

    def _draw(self, kind: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        problems, particles, *event = shape
        size = math.prod(event)
        calls = problems * (particles * size // 4 + 2)
        steps = min(64, 1 << max(0, (_CALLS_PER_BLOCK // calls).bit_length() - 1)) if calls else 1
        first = self.step - self.step % steps
        draw = _block if steps > 1 else _block.__wrapped__
        words = _words(self.seed, self.stream)
        device = torch.device(device) if isinstance(device, str) else device
        block = draw(kind, words, first, steps, self.problem, problems, self.slot * size, particles * size, device)
        return block[self.step - first].to(dtype, copy=True).view(tuple(shape))


def as_key(key: Key | int) -> Key:
    """A Key from a Key or an integer seed."""
    return key if isinstance(key, Key) else Key(int(key))


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four int32 words of Philox-4x32-10 for four broadcastable int32 counter words and a 64-bit key.

    The bits are those of Random123's `philox4x32` (uint32 reinterpreted as int32).
    """
    shape = torch.broadcast_shapes(*(word.shape for word in counter))
    device = counter[0].device
    # Words 0 and 2 are multiplied, so they live zero-extended in int64; the halves of a product are then two strided
    # int32 views of it, and no shift or mask is needed. Views are taken once: taking them costs as much as a small xor.
    even = torch.zeros((2, *shape), dtype=torch.int64, device=device)
    (word0, word2), _ = _halves(even)
    word0.copy_(counter[0])
    word2.copy_(counter[2])
    multiplier = torch.tensor(_MULTIPLIERS, dtype=torch.int64, device=device).view(2, *(1 for _ in shape))
    products = torch.empty_like(even), torch.empty_like(even)
    halves = _halves(products[0]), _halves(products[1])
    word1, word3 = counter[1], counter[3]
    for turn in range(10):
        torch.mul(even, multiplier, out=products[turn % 2])
        (low0, low2), (high0, high2) = halves[turn % 2]
        torch.bitwise_xor(high2, word1, out=word0).bitwise_xor_(_signed(key[0] + turn * _WEYL[0]))
        torch.bitwise_xor(high0, word3, out=word2).bitwise_xor_(_signed(key[1] + turn * _WEYL[1]))
        word1, word3 = low2, low0
    return word0, word1, word2, word3


def _halves(wide: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Low and high int32 halves of the two rows of an int64 tensor."""
    pairs = wide.view(torch.int32).view(*wide.shape, 2)
    low, high = pairs.unbind(-1)
    return (low[0], low[1]), (high[0], high[1])


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
    device: torch.device,
) -> Tensor:
    """(steps, problems, count) numbers, float64: positions first..first+count of the line of each problem and step.

    A particle's numbers lie side by side on the line of its problem, four to a Philox call.
    """
    # Outside the caller's inference mode: a later call may need the same block under autograd.
    with torch.inference_mode(False), torch.no_grad():
        axis = {"dtype": torch.int32, "device": device}
        calls = torch.arange(first // 4, (first + count + 3) // 4, **axis)
        problem_word = torch.arange(problem, problem + problems, **axis)[:, None]
        step_word = torch.arange(step, step + steps, dtype=torch.int64, device=device).to(torch.int32)[:, None, None]
        bits = philox((calls, torch.zeros(1, **axis), problem_word, step_word), words)
        # (word + 2**31 + .5) * 2**-32 maps the signed word to the open unit interval; multiples of one turn need no
        # offset, because the cosine has that period.
        numbers = torch.stack(bits, dim=-1).double()
        if kind == "uniform":
            numbers = numbers.add_(2.0**31 + 0.5).mul_(2.0**-32)
        else:
            radius = numbers[..., 0::2].add(2.0**31 + 0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
            angle = numbers[..., 1::2].mul(2.0 * math.pi * 2.0**-32)
            numbers = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
        return numbers.reshape(steps, problems, -1)[..., first % 4 : first % 4 + count]
