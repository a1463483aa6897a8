"""The screen's inner loops: what a product with a margin cannot rule out, listed row by row; ``screen`` has the bound.

Everything is float32, and marks are bytes that the next pass reads eight at a time: two passes, the first without a
branch. Rejected: appending at once (a branch an entry, which the compiler cannot vectorise).
"""

# As in ``compiled``, whose decorator this takes.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportCallIssue=false

import numpy as np

from .compiled import compiled


@compiled
def _extract(marks, words, found, count):
    """Appends the positions of set marks; ``words`` is the same memory, eight marks at a time."""
    for word in range(words.shape[0]):
        if words[word] != 0:
            for i in range(8 * word, 8 * word + 8):
                found[count] = i
                count += marks[i]
    return count


@compiled
def from_bfloat16(approx, bias, features, rows, n, marks, words, found, pointer):
    """Lists what the screen cannot rule out, from a bfloat16 product.

    Args:
        approx: (B, S) uint16, the product of bfloat16 copies, rounded to bfloat16.
        bias: (S,) encoder biases.
        features: (3, S) norms of encoder rows, of their copies and of the differences.
        rows: (3, B) the same of the encoder's inputs.
        n: d_in.
        marks: (S rounded up to 8,) uint8 scratch, zero beyond S.
        words: the same memory as uint64.
        found: (B S + 8,) int32 output, candidates of row t in found[pointer[t]:pointer[t + 1]].
        pointer: (B + 1,) int64 output.
    """
    loose, none = np.float32(1 + 2.0**-20), np.float32(0)
    count = 0
    pointer[0] = 0
    for t in range(approx.shape[0]):
        residual = rows[0, t] * loose
        copy = (rows[2, t] + np.float32(n * 2.0**-22) * rows[1, t]) * loose
        tiny = np.float32(n * 2.0**-100) * (np.float32(1) + rows[0, t])
        row = approx[t]
        for i in range(row.shape[0]):
            a = np.uint32(np.uint32(row[i]) << np.uint32(16)).view(np.float32)
            slack = np.float32(2.0**-8 + 2.0**-20) * abs(a) + np.float32(2.0**-20) * abs(bias[i])
            slack += residual * features[2, i] + copy * features[1, i] + tiny
            marks[i] = not (a + bias[i] + slack <= none)
        count = _extract(marks, words, found, count)
        pointer[t + 1] = count


@compiled
def from_float32(approx, bias, features, rows, n, marks, words, found, pointer):
    """The same from a float32 product, whose only error is that of summing n terms in some order."""
    none = np.float32(0)
    count = 0
    pointer[0] = 0
    for t in range(approx.shape[0]):
        sums = np.float32(n * 2.0**-22) * rows[0, t] * np.float32(1 + 2.0**-20)
        tiny = np.float32(n * 2.0**-100) * (np.float32(1) + rows[0, t])
        row = approx[t]
        for i in range(row.shape[0]):
            slack = np.float32(2.0**-20) * (abs(row[i]) + abs(bias[i])) + sums * features[0, i] + tiny
            marks[i] = not (row[i] + bias[i] + slack <= none)
        count = _extract(marks, words, found, count)
        pointer[t + 1] = count
