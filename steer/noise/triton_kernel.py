"""Draws on CUDA devices: one kernel. In Triton's interpreter (TRITON_INTERPRET=1) it runs on the CPU."""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import formulas

BLOCK = 256  # calls of Philox in one program
if TYPE_CHECKING:
    Number = Any
else:
    Number = tl.int64

_TO_UNIT = tl.constexpr(formulas.TO_UNIT)
_TO_ANGLE = tl.constexpr(formulas.TO_ANGLE)
_LEAST_MANTISSA = tl.constexpr(formulas.LEAST_MANTISSA)
_ONE_EXPONENT = tl.constexpr(formulas.ONE_EXPONENT)
_MANTISSA = tl.constexpr(formulas.MANTISSA)
_EXPONENT_OF_ONE = tl.constexpr(formulas.EXPONENT_OF_ONE)
_LN2_HIGH, _LN2_LOW = tl.constexpr(formulas.LN2_HIGH), tl.constexpr(formulas.LN2_LOW)
_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (tl.constexpr(c) for c in formulas.LOG)
_S0, _S1, _S2, _S3, _S4, _S5 = (tl.constexpr(c) for c in formulas.SIN)
_C0, _C1, _C2, _C3, _C4, _C5 = (tl.constexpr(c) for c in formulas.COS)


def fill(kind: str, out: Tensor, first: int, problem: int, step: int, words: tuple[int, int]) -> None:
    """As `reference.fill`, on a CUDA device."""
    problems, count = out.shape
    blocks = triton.cdiv(first % 4 + count, 4 * BLOCK)
    call, key = _signed(first // 4), _signed(words[0] | words[1] << 32)
    launch: Any = _kernel[(problems * blocks,)]
    # On the tensor's device, which need not be the current one. A multiplication and an addition are two roundings.
    with torch.cuda.device_of(out):
        launch(out, count, blocks, call, first % 4, problem, step, key, kind == "normal", BLOCK, enable_fp_fusion=False)


def _signed(word: int) -> int:
    """64 bits as the signed number that they are."""
    return word - (word >> 63 << 64)


@triton.jit
def _radius(word):
    """sqrt(-2 log u) of words."""
    bits = (word.to(tl.float64) + 0.5).to(tl.int64, bitcast=True)
    exponent = (bits - _LEAST_MANTISSA) >> _MANTISSA
    bits = bits - (exponent << _MANTISSA) + _ONE_EXPONENT
    n = exponent.to(tl.float64) - _EXPONENT_OF_ONE
    f = bits.to(tl.float64, bitcast=True) - 1.0
    s = f / (f + 2.0)
    z = s * s
    h = f * f * 0.5
    r = z * (_L0 + z * (_L1 + z * (_L2 + z * (_L3 + z * (_L4 + z * (_L5 + z * _L6))))))
    return tl.sqrt(-2.0 * (n * _LN2_HIGH - ((h - (s * (h + r) + n * _LN2_LOW)) - f)))


@triton.jit
def _cosine_and_sine(word):
    """Cosine and sine of words as shares of a turn."""
    turned = (word.to(tl.int64) + (1 << 29)) & 0xFFFFFFFF
    quarter = turned >> 30
    x = ((turned & ((1 << 30) - 1)) - (1 << 29)).to(tl.float64) * _TO_ANGLE
    z = x * x
    s = x + (x * z) * (_S0 + z * (_S1 + z * (_S2 + z * (_S3 + z * (_S4 + z * _S5)))))
    c = 1.0 - (z * 0.5 - (z * z) * (_C0 + z * (_C1 + z * (_C2 + z * (_C3 + z * (_C4 + z * _C5))))))
    swapped = (quarter & 1) == 1
    across, up = tl.where(swapped, s, c), tl.where(swapped, c, s)
    return tl.where(((quarter + 1) & 2) == 2, -across, across), tl.where(quarter >= 2, -up, up)


@triton.jit
def _store(out, number, position, count):
    tl.store(out + position, number.to(out.dtype.element_ty), mask=(position >= 0) & (position < count))


# Their types are fixed, so that one compiled kernel serves every number.
@triton.jit(do_not_specialize=["count", "blocks", "call", "skip", "problem", "step", "key"])
def _kernel(
    out,
    count: Number,
    blocks: Number,
    call: Number,
    skip: Number,
    problem: Number,
    step: Number,
    key: Number,
    normal: tl.constexpr,
    block: tl.constexpr,
):
    """The numbers of `block` calls on the line of one problem, of which there are `blocks` on each line."""
    program = tl.program_id(0).to(tl.int64)
    row, at = program // blocks, program % blocks * block + tl.arange(0, block)
    call += at
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), ((call >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, (at * 0 + problem + row).to(tl.uint32), (at * 0 + step).to(tl.uint32))
    line, position = out + row * count, at * 4 - skip
    if normal:
        radius, (cosine, sine) = _radius(w0), _cosine_and_sine(w1)
        _store(line, radius * cosine, position, count)
        _store(line, radius * sine, position + 1, count)
        radius, (cosine, sine) = _radius(w2), _cosine_and_sine(w3)
        _store(line, radius * cosine, position + 2, count)
        _store(line, radius * sine, position + 3, count)
    else:
        _store(line, (w0.to(tl.float64) + 0.5) * _TO_UNIT, position, count)
        _store(line, (w1.to(tl.float64) + 0.5) * _TO_UNIT, position + 1, count)
        _store(line, (w2.to(tl.float64) + 0.5) * _TO_UNIT, position + 2, count)
        _store(line, (w3.to(tl.float64) + 0.5) * _TO_UNIT, position + 3, count)
