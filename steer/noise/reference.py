"""Draws in torch operations, on any device that has float64: what the kernels are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .formulas import (
    COS,
    EXPONENT_OF_ONE,
    LEAST_MANTISSA,
    LN2_HIGH,
    LN2_LOW,
    LOG,
    MANTISSA,
    MASK,
    MULTIPLIERS,
    ONE_EXPONENT,
    ROUNDS,
    SIN,
    TO_ANGLE,
    TO_UNIT,
    WEYL,
)

EIGHTH, QUARTER = 1 << 29, 1 << 30  # of a turn, in words


def fill(kind: str, out: Tensor, first: int, problem: int, step: int, words: tuple[int, int]) -> None:
    """Writes the numbers at positions first, first + 1, ... of the lines of problems problem, problem + 1, ...

    Args:
        kind: "normal" or "uniform".
        out: [problems, count], float64 or float32; draws are made in float64 and rounded once.
        first: position on the line of a problem; a call of Philox makes four numbers.
        problem: of row 0.
        step: third name of a call.
        words: the 64-bit Philox key.
    """
    problems, count = out.shape
    with torch.no_grad():
        axis = {"dtype": torch.int64, "device": out.device}
        call, skip = divmod(first, 4)
        low = torch.arange((skip + count + 3) // 4, **axis).add_(call & MASK)
        high = (low >> 32).add_(call >> 32).bitwise_and_(MASK)
        lines = torch.arange(problem, problem + problems, **axis)[:, None]
        counter = (low & MASK, high, lines, torch.full((1, 1), step, **axis))
        drawn = torch.stack(_NUMBERS[kind](*philox(counter, words)), 2)
        out.copy_(drawn.view(problems, -1)[:, skip : skip + count])


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
        even.bitwise_xor_(round_key).bitwise_and_(MASK)
        odd0, odd1 = product1, product0
    return even0, odd0 & MASK, even1, odd1 & MASK


@lru_cache(maxsize=64)
def _constants(key: tuple[int, int], ndim: int, device: torch.device) -> tuple[Tensor, ...]:
    """Philox's multipliers and the keys of its rounds, for counters of some dimensions."""
    # What a key carries above 32 bits falls to the mask of its round.
    keys = [[word + turn * weyl for word, weyl in zip(key, WEYL, strict=True)] for turn in range(ROUNDS)]
    with torch.inference_mode(False):
        table = torch.tensor([MULTIPLIERS, *keys], dtype=torch.int64, device=device)
        return table.view(ROUNDS + 1, 2, *(1 for _ in range(ndim))).unbind(0)


def _uniforms(*words: Tensor) -> tuple[Tensor, ...]:
    return tuple(word.double().add_(0.5).mul_(TO_UNIT) for word in words)


def _normals(word0: Tensor, word1: Tensor, word2: Tensor, word3: Tensor) -> tuple[Tensor, ...]:
    radius = _radius(torch.stack([word0, word2]))
    cosine, sine = _cosine_and_sine(torch.stack([word1, word3]))
    (first, third), (second, fourth) = cosine.mul_(radius), sine.mul_(radius)
    return first, second, third, fourth


_NUMBERS = {"uniform": _uniforms, "normal": _normals}


def _radius(word: Tensor) -> Tensor:
    """sqrt(-2 log u) of words, float64."""
    bits = word.double().add_(0.5).view(torch.int64)
    exponent = torch.sub(bits, LEAST_MANTISSA).bitwise_right_shift_(MANTISSA)
    bits = bits.sub_(exponent << MANTISSA).add_(ONE_EXPONENT)
    n = exponent.double().sub_(EXPONENT_OF_ONE)
    f = bits.view(torch.float64).sub_(1.0)
    s = f / (f + 2.0)
    z = s * s
    h = (f * f).mul_(0.5)
    inner = _polynomial(LOG, z).mul_(z).add_(h).mul_(s).add_(n * LN2_LOW)
    return _sqrt_((n * LN2_HIGH).sub_(h.sub_(inner).sub_(f)).mul_(-2.0))


def _cosine_and_sine(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of words as shares of a turn, float64."""
    turned = (word + EIGHTH).bitwise_and_(MASK)
    quarter = turned >> 30
    x = turned.bitwise_and_(QUARTER - 1).sub_(EIGHTH).double().mul_(TO_ANGLE)
    z = x * x
    sine = _polynomial(SIN, z).mul_(x * z).add_(x)
    cosine = _polynomial(COS, z).mul_(z * z)
    cosine = (z * 0.5).sub_(cosine).neg_().add_(1.0)
    swapped, left, below = (quarter & 1).bool(), ((quarter + 1) & 2).bool(), (quarter & 2).bool()
    across, up = torch.where(swapped, sine, cosine), torch.where(swapped, cosine, sine)
    return torch.where(left, -across, across), torch.where(below, -up, up)


def _sqrt_(x: Tensor) -> Tensor:
    """The square root, in place, rounded to nearest as IEEE 754 has it; torch's own on a CPU (of MKL) is not always."""
    if x.device.type != "cpu":
        return x.sqrt_()
    import numpy as np

    np.sqrt(x.numpy(), out=x.numpy())
    return x


def _polynomial(coefficients: tuple[float, ...], z: Tensor) -> Tensor:
    """c0 + z (c1 + z (c2 + ...)), each multiplication and addition rounded by itself."""
    total = torch.full_like(z, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total.mul_(z).add_(coefficient)
    return total
