"""float32 rows -> halves at their places in a window's images, and the rows' sums, in one pass; compiled by numba.

A harvest's rows are read from memory once instead of five times: for the cast, the minimum, the maximum, the sum and
the copy. A float32 becomes a half by integer arithmetic that rounds to nearest even, as numpy and torch do, and that
every compiler turns into vector instructions; below 2^-14, adding 0.5 leaves the half's bits at the end of the sum.
What a half cannot hold comes out wrong here: the caller looks at the sums, and takes the plain path.
"""

# numba compiles these from the types that it is called with: annotations would be read by nobody, checked by nothing.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportCallIssue=false

import numba
import numpy as np


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _half_bits(value):
    bits = np.float32(value).view(np.uint32)  # numba widens each result to 64 bits: it is narrowed again at once
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(magnitude + np.uint32(0xFFF) + odd - np.uint32(112 << 23)) >> np.uint32(13))
    small = np.uint32(np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000))
    half = normal if magnitude >= np.uint32(0x38800000) else small
    return np.uint16(half | np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000)))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def scatter_float16(rows, places, memory, low, high, total):
    """Encodes rows, puts them in their places, and takes them into running sums.

    Args:
        rows: float32 (n, d), contiguous.
        places: int64 (n,): where in ``memory`` each row begins.
        memory: uint16, contiguous: bits of halves.
        low: float32 (d,), so far.
        high: float32 (d,), so far.
        total: float64 (d,), so far; not finite if a value is not.
    """
    d = rows.shape[1]
    for i in range(rows.shape[0]):
        source, place = rows[i], memory[places[i] : places[i] + d]
        for j in range(d):
            place[j] = _half_bits(source[j])
        for j in range(d):
            value = source[j]
            low[j] = min(low[j], value)
            high[j] = max(high[j], value)
            total[j] += value
