"""Decoding's inner loops, compiled by numba to code that runs without Python's lock; compiled code is cached on disk.

numpy casts float16 one value at a time, at 1 GB/s a core; here the exponent is moved by integer arithmetic, which every
compiler turns into vector instructions of any machine, five times as fast. Every bit pattern gives what numpy gives,
subnormal numbers, infinities and NaNs included, whatever the thread's rounding of subnormals. Rejected: the processor's
own conversion through an LLVM intrinsic (as fast, memory being the bound, and missing on some virtual machines).
"""

# numba compiles these from the types that it is called with: annotations would be read by nobody, checked by nothing.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportCallIssue=false

import numba
import numpy as np

compiled = numba.njit(cache=True, nogil=True, error_model="numpy")


@compiled
def _float16_value(half):
    bits = (np.uint32(half) & np.uint32(0x7FFF)) << np.uint32(13)
    exponent = bits & np.uint32(0x0F800000)
    bits += np.uint32(112 << 23)  # float32's exponents are greater by 112
    if exponent == np.uint32(0x0F800000):  # infinity, NaN: the greatest exponent stays the greatest
        bits += np.uint32(112 << 23)
    if exponent == np.uint32(0):  # subnormal: as if there were a leading 1, which is then taken away
        whole = np.uint32(bits + np.uint32(1 << 23)).view(np.float32)
        bits = np.float32(whole - np.float32(2.0**-14)).view(np.uint32)
    return np.uint32(bits | ((np.uint32(half) & np.uint32(0x8000)) << np.uint32(16))).view(np.float32)


@compiled
def decode_float16(bits, out):
    """Writes the float32 values of the float16 whose bits are given; both 1-d."""
    for i in range(bits.shape[0]):
        out[i] = _float16_value(bits[i])


@compiled
def decode_bfloat16(bits, out):
    """Writes the float32 values of the bfloat16 whose bits are given; both 1-d."""
    for i in range(bits.shape[0]):
        out[i] = np.uint32(np.uint32(bits[i]) << np.uint32(16)).view(np.float32)


@compiled
def decode_uint8(codes, scale, out):
    """Writes the float32 values of companded rows, each by its step and zero code; all 2-d."""
    for i in range(codes.shape[0]):
        step, zero = scale[i, 0], scale[i, 1]
        for j in range(codes.shape[1]):
            root = (np.float32(codes[i, j]) - zero) * step
            out[i, j] = root * abs(root)
