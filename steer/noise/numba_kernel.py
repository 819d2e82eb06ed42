"""Draws on the CPU: one loop that numba compiles, over blocks that stay in the cache of a core."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from torch import Tensor

from . import formulas

_U64, _U32 = np.uint64, np.uint32
_ROUNDS = formulas.ROUNDS
_MASK, _WORD = _U64(formulas.MASK), _U64(32)
_MULTIPLIER0, _MULTIPLIER1 = (_U64(m) for m in formulas.MULTIPLIERS)
_WEYL0, _WEYL1 = (_U64(w) for w in formulas.WEYL)
_TO_UNIT, _TO_ANGLE = formulas.TO_UNIT, formulas.TO_ANGLE
_LEAST_MANTISSA, _ONE_EXPONENT = _U64(formulas.LEAST_MANTISSA), _U64(formulas.ONE_EXPONENT)
_MANTISSA, _EXPONENT_OF_ONE = _U64(formulas.MANTISSA), formulas.EXPONENT_OF_ONE
_LN2_HIGH, _LN2_LOW = formulas.LN2_HIGH, formulas.LN2_LOW
_L0, _L1, _L2, _L3, _L4, _L5, _L6 = formulas.LOG
_S0, _S1, _S2, _S3, _S4, _S5 = formulas.SIN
_C0, _C1, _C2, _C3, _C4, _C5 = formulas.COS
_EIGHTH, _BELOW_QUARTER, _TO_QUARTER = _U32(1 << 29), _U32((1 << 30) - 1), _U32(30)
_ONE, _TWO = _U32(1), _U32(2)
_BLOCK = 256  # calls of Philox at a time


def compiled(cache: bool) -> Callable[..., None]:
    """`reference.fill` for tensors on the CPU. Compiles nothing yet: numba does at the first call for a dtype.

    Args:
        cache: whether machine code is kept on disk for later processes.

    Raises:
        RuntimeError: numba finds no place where it may keep it.
    """
    # No fast-math: additions and multiplications are rounded one by one, as in every other backend.
    jit: Any = numba.njit(nogil=True, error_model="numpy", cache=cache)
    # numba resolves what a function calls when it compiles it; an inlined one need not be kept by itself.
    kernels = {"normal": jit(_fill_normals), "uniform": jit(_fill_uniforms)}

    def fill(kind: str, out: Tensor, first: int, problem: int, step: int, words: tuple[int, int]) -> None:
        call, skip = divmod(first, 4)
        kernels[kind](out.numpy(), call & formulas.MASK, call >> 32, skip, problem, step, *words)

    return fill


_inlined: Any = numba.njit(inline="always", error_model="numpy")


@_inlined
def _philox(words, call, calls, problem, step, key0, key1):
    """Writes the words [4, block] of `calls` calls from `call` on. uint64 but for `words`, which are uint32."""
    for i in range(calls):
        at = call + _U64(i)
        w0, w1, w2, w3 = at & _MASK, at >> _WORD, problem, step
        k0, k1 = key0, key1
        for _ in range(_ROUNDS):
            product0, product1 = w0 * _MULTIPLIER0, w2 * _MULTIPLIER1
            w0, w1 = (product1 >> _WORD) ^ w1 ^ k0, product1 & _MASK
            w2, w3 = (product0 >> _WORD) ^ w3 ^ k1, product0 & _MASK
            k0, k1 = (k0 + _WEYL0) & _MASK, (k1 + _WEYL1) & _MASK
        words[0, i], words[1, i], words[2, i], words[3, i] = _U32(w0), _U32(w1), _U32(w2), _U32(w3)


@_inlined
def _write_radii(word, v, bits, radius, calls):
    """Writes sqrt(-2 log u) of words. v and bits are one block of memory, as float64 and as uint64."""
    for i in range(calls):
        v[i] = np.float64(word[i]) + 0.5
    for i in range(calls):
        exponent = (bits[i] - _LEAST_MANTISSA) >> _MANTISSA
        bits[i] = bits[i] - (exponent << _MANTISSA) + _ONE_EXPONENT
        radius[i] = np.float64(_U32(exponent)) - _EXPONENT_OF_ONE
    for i in range(calls):
        n, f = radius[i], v[i] - 1.0
        s = f / (f + 2.0)
        z = s * s
        h = f * f * 0.5
        r = z * (_L0 + z * (_L1 + z * (_L2 + z * (_L3 + z * (_L4 + z * (_L5 + z * _L6))))))
        radius[i] = math.sqrt(-2.0 * (n * _LN2_HIGH - ((h - (s * (h + r) + n * _LN2_LOW)) - f)))


@_inlined
def _write_angles(word, cosine, sine, calls):
    """Writes cosine and sine of words as shares of a turn."""
    for i in range(calls):
        turned = _U32(word[i] + _EIGHTH)
        quarter = _U32(turned >> _TO_QUARTER)
        x = np.float64(np.int32(turned & _BELOW_QUARTER) - np.int32(_EIGHTH)) * _TO_ANGLE
        z = x * x
        s = x + (x * z) * (_S0 + z * (_S1 + z * (_S2 + z * (_S3 + z * (_S4 + z * _S5)))))
        c = 1.0 - (z * 0.5 - (z * z) * (_C0 + z * (_C1 + z * (_C2 + z * (_C3 + z * (_C4 + z * _C5))))))
        swapped = (quarter & _ONE) == _ONE
        across, up = (s, c) if swapped else (c, s)
        left = _U32(quarter + _ONE) & _TWO
        cosine[i] = -across if left == _TWO else across
        sine[i] = -up if quarter >= _TWO else up


@_inlined
def _copy(source, out):
    """Rounds one line to the type of another of its length."""
    for i in range(len(out)):
        out[i] = source[i]


def _fill_normals(out, low, high, skip, problem, step, key0, key1):
    """Normals on the lines of `out` [problems, count], from number `skip` of call (low, high) on."""
    words, drawn = np.empty((4, _BLOCK), np.uint32), np.empty((_BLOCK, 4))
    v, radius, cosine, sine = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK)
    bits, line = v.view(np.uint64), drawn.reshape(-1)
    problems, count = out.shape
    for row in range(problems):
        done, left_out, call = 0, skip, (_U64(high) << _WORD) + _U64(low)
        while done < count:
            calls = min(_BLOCK, (count - done + left_out + 3) // 4)
            _philox(words, call, calls, _U64(problem + row), _U64(step), _U64(key0), _U64(key1))
            for half in range(2):
                _write_radii(words[2 * half], v, bits, radius, calls)
                _write_angles(words[2 * half + 1], cosine, sine, calls)
                for i in range(calls):
                    drawn[i, 2 * half], drawn[i, 2 * half + 1] = radius[i] * cosine[i], radius[i] * sine[i]
            many = min(4 * calls - left_out, count - done)
            _copy(line[left_out : left_out + many], out[row, done : done + many])
            done, call, left_out = done + many, call + _U64(calls), 0


def _fill_uniforms(out, low, high, skip, problem, step, key0, key1):
    """Uniforms on the lines of `out` [problems, count]; arguments as of `_fill_normals`."""
    words, drawn = np.empty((4, _BLOCK), np.uint32), np.empty((_BLOCK, 4))
    line = drawn.reshape(-1)
    problems, count = out.shape
    for row in range(problems):
        done, left_out, call = 0, skip, (_U64(high) << _WORD) + _U64(low)
        while done < count:
            calls = min(_BLOCK, (count - done + left_out + 3) // 4)
            _philox(words, call, calls, _U64(problem + row), _U64(step), _U64(key0), _U64(key1))
            for i in range(calls):
                for j in range(4):
                    drawn[i, j] = (np.float64(words[j, i]) + 0.5) * _TO_UNIT
            many = min(4 * calls - left_out, count - done)
            _copy(line[left_out : left_out + many], out[row, done : done + many])
            done, call, left_out = done + many, call + _U64(calls), 0
