"""The constants of Philox and Box-Muller, and the operations that every backend carries out in this order.

Words: Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), the bits of Random123.

Numbers of a call, from its words w0, w1, w2, w3, in float64:

    uniforms    (w + 0.5) 2^-32 of each
    normals     r cos a, r sin a of (w0, w1), then of (w2, w3): r = sqrt(-2 log u), u the uniform of the first word, and
                a = w 2^-32 turns of the second (Box & Muller 1958)

    log u       v = w + 0.5 = m 2^e with m in [sqrt(1/2), sqrt(2)), read off the bits of v. With f = m - 1,
                s = f / (2 + f), z = s s, h = f f / 2, R = z (L0 + z (L1 + ... + z L6)) and n = e - 32:
                log u = n LN2_HIGH - ((h - (s (h + R) + n LN2_LOW)) - f)
    cos, sin    the nearest quarter turn q, and the angle x from there, |x| <= pi / 4, read off the bits of w. With
                z = x x, S = x + (x z) (S0 + z (S1 + ... )) and C = 1 - (z / 2 - (z z) (C0 + z (C1 + ...))):
                (cos, sin) = (C, S), (-S, C), (-C, -S), (S, -C) for q = 0, 1, 2, 3

Polynomials: Sun's fdlibm, e_log.c, k_sin.c and k_cos.c, below one unit in the last place each. A multiplication and an
addition must not be fused into one rounding.
"""

from __future__ import annotations

import math

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK = 0xFFFFFFFF

TO_UNIT = 2.0**-32
TO_ANGLE = 2.0 * math.pi * 2.0**-32
MANTISSA = 52
# What is subtracted from the bits of v, so that the bits above the mantissa are e + 1 >= 0 for m as above.
LEAST_MANTISSA = 0x3FE6A09E667F3BCD - (1 << MANTISSA)
ONE_EXPONENT = 1 << MANTISSA
EXPONENT_OF_ONE = 33.0  # e + 1 where u = m

LN2_HIGH = 6.93147180369123816490e-01
LN2_LOW = 1.90821492927058770002e-10
LOG = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
SIN = (
    -1.66666666666666324348e-01,
    8.33333333332248946124e-03,
    -1.98412698298579493134e-04,
    2.75573137070700676789e-06,
    -2.50507602534068634195e-08,
    1.58969099521155010221e-10,
)
COS = (
    4.16666666666666019037e-02,
    -1.38888888888741095749e-03,
    2.48015872894767294178e-05,
    -2.75573143513906633035e-07,
    2.08757232129817482790e-09,
    -1.13596475577881948265e-11,
)
