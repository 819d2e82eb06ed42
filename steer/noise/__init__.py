"""Random numbers that are a function of their name: one generator, written for three kinds of machine.

`reference` is in torch operations, for every device that has float64; `numba_kernel` is one compiled loop for the CPU,
`triton_kernel` one kernel for CUDA. All give the same numbers to the last bit: words are exact integers, and normals
are made in float64 by additions, multiplications, divisions and square roots alone, which IEEE 754 fixes, in the same
order (`formulas`), with no library's logarithm or cosine. `backends` picks one, and compares some of what it makes
with the reference before it is used.
"""
