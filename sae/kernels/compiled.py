"""The sparse step's inner loops, compiled by numba to native code that runs without Python's lock.

Every function works on one block of rows or of features and writes only what belongs to that block, so blocks may run
on any thread in any order with the same result: no atomics. Sums inside a block run in an order fixed at compile time
(``reassoc`` lets the compiler vectorise them; not-a-number and infinity keep their meaning). Compiled code is cached
on disk, by the date of a function's own file: what calls each other shares a file. Rejected: numba's
``parallel=True``, whose thread pool other threads of the process must not enter at the same time, which takes several
times longer to compile, and which would keep the encoder product from running inside a worker.
"""

# numba compiles these from the types that it is called with: annotations would be read by nobody, checked by nothing.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportCallIssue=false

from typing import Final

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

FIXED: Final = 0
AS_PUBLISHED: Final = 1
RENORMALISE_BEFORE: Final = 2
FREE: Final = 3

compiled = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")


@intrinsic
def _prefetch(_typing, rows, row):  # noqa: ARG001 (the compiler calls it with the types of both)
    """Asks for the first 2 KiB of a row of a 2-d float32 array: gathers are bound by the latency of its first lines.

    Of what follows them the processor thinks itself; asking for all of a long row takes longer than not asking.
    """

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        stride = cgutils.unpack_tuple(builder, array.strides, 2)[0]
        columns = cgutils.unpack_tuple(builder, array.shape, 2)[1]
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        hint = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, hint, "llvm.prefetch.p0i8")
        start = builder.gep(builder.bitcast(array.data, byte), [builder.mul(arguments[1], stride)])
        end, most = builder.mul(columns, ir.Constant(columns.type, 4)), ir.Constant(columns.type, 2048)
        end = builder.select(builder.icmp_signed("<", end, most), end, most)
        read, near, data = (ir.Constant(word, value) for value in (0, 2, 1))
        lines = cgutils.for_range_slice(builder, ir.Constant(end.type, 0), end, ir.Constant(end.type, 64))
        with lines as (offset, _):
            builder.call(function, [builder.gep(start, [offset]), read, near, data])
        return context.get_dummy_value()

    return types.void(rows, types.int64), generate


@compiled
def _bfloat16_bits(value):
    """Rounds a float32 to the nearest bfloat16, ties to even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def _bfloat16_value(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@compiled
def _screen_row(row, rounded):
    """Writes a row's bfloat16 copy; returns the norms of row, of copy and of their difference, rounded up."""
    whole, copied, lost = 0.0, 0.0, 0.0
    for j in range(row.shape[0]):
        bits = _bfloat16_bits(row[j])
        rounded[j] = bits
        a, b = np.float64(row[j]), np.float64(_bfloat16_value(bits))
        whole += a * a
        copied += b * b
        lost += (b - a) * (b - a)
    up = 1 + 2.0**-22
    return np.float32(np.sqrt(whole) * up), np.float32(np.sqrt(copied) * up), np.float32(np.sqrt(lost) * up)


@compiled
def screen_rows(first, last, rows, rounded, norms):
    """Fills the screen's view of rows first..last - 1: bfloat16 copies, and in norms[0..2] those of ``_screen_row``."""
    for i in range(first, last):
        norms[0, i], norms[1, i], norms[2, i] = _screen_row(rows[i], rounded[i])


@compiled
def row_norms(first, last, rows, norms):
    """Euclidean norms of rows first..last - 1."""
    for i in range(first, last):
        norms[i] = np.sqrt(_dot(rows[i], rows[i]))


@compiled
def centre_rows(rows, b_dec, mean, centred, deviation):
    """Writes rows - b_dec, and each row's squared distance from the dataset mean."""
    for t in range(rows.shape[0]):
        total = np.float32(0)
        for j in range(rows.shape[1]):
            value = rows[t, j]
            centred[t, j] = value - b_dec[j]
            away = value - mean[j]
            total += away * away
        deviation[t] = total


@compiled
def _dot(a, b):
    total = np.float32(0)
    for j in range(a.shape[0]):
        total += a[j] * b[j]
    return total


@compiled
def _add_scaled(target, scale, row):
    for j in range(target.shape[0]):
        target[j] += scale * row[j]


@compiled
def _four(items, first, end):
    """Items first..first + 3; from end on, the last one before it again."""
    last = end - 1
    return items[first], items[min(first + 1, last)], items[min(first + 2, last)], items[min(first + 3, last)]


@compiled
def _linear(count, four, scale, shift):
    """Each of the first count of four numbers times scale, plus shift; zero for the others."""
    none = np.float32(0)
    return (
        scale * four[0] + shift,
        scale * four[1] + shift if count > 1 else none,
        scale * four[2] + shift if count > 2 else none,
        scale * four[3] + shift if count > 3 else none,
    )


@compiled
def _dot_four(row, rows, four):
    """Dot products of a row with four others: none depends on which of the four it is, nor on the other three."""
    a, b, c, d = rows[four[0]], rows[four[1]], rows[four[2]], rows[four[3]]
    p = q = r = s = np.float32(0)
    for j in range(row.shape[0]):
        value = row[j]
        p += value * a[j]
        q += value * b[j]
        r += value * c[j]
        s += value * d[j]
    return p, q, r, s


@compiled
def _add_four(target, scales, rows, four):
    a, b, c, d = rows[four[0]], rows[four[1]], rows[four[2]], rows[four[3]]
    p, q, r, s = scales
    for j in range(target.shape[0]):
        target[j] += p * a[j] + q * b[j] + r * c[j] + s * d[j]


@compiled
def _decide(row, enc, b_enc, found, values, begin, end, count, last):
    """Decides one row's candidates found[begin:end] in float32, four at a time.

    Those active are written from count on, to found and, with their activations, to values; last is the place of the
    last candidate of all rows. Returns the new count.
    """
    for k in range(begin, end, 4):
        for ahead in range(k + 4, k + 8):
            _prefetch(enc, np.int64(found[min(ahead, last)]))
        four = _four(found, k, end)
        dots = _dot_four(row, enc, four)
        for m in range(min(4, end - k)):
            value = dots[m] + b_enc[four[m]]
            if not (value <= 0):
                found[count], values[count] = four[m], value
                count += 1
    return count


@compiled
def activate(rows, sae_in, enc, b_enc, dec, b_dec, l1_weight, found, pointer, values, error, sums, fired, error_total):
    """Decides candidates in float32, decodes what is active, and measures each row.

    Args:
        rows: (B, d_in) activations.
        sae_in: (B, d_in) encoder inputs.
        enc: (S, d_in) encoder rows; b_enc, dec, b_dec likewise.
        b_enc: (S,).
        dec: (S, d_in).
        b_dec: (d_in,).
        l1_weight: (S,) what each feature's L1 is multiplied by.
        found: candidates; overwritten with the active features, compacted.
        pointer: (B + 1,) bounds of the candidates; overwritten with those of the active features.
        values: (as found) float32 output, activations.
        error: (B, d_in) output, reconstruction minus row.
        sums: (B, 3) output: squared error, L1, L0.
        fired: (S,) int32, rows on which each feature is active are added.
        error_total: (d_in,) output, sum of errors over the block.
    """
    count, begin, last = 0, pointer[0], pointer[rows.shape[0]] - 1
    error_total[:] = 0
    for t in range(rows.shape[0]):
        first, end = count, pointer[t + 1]
        count = _decide(sae_in[t], enc, b_enc, found, values, begin, end, count, last)
        begin, pointer[t + 1] = end, count
        l1 = np.float32(0)
        residual = error[t]
        for j in range(rows.shape[1]):
            residual[j] = b_dec[j] - rows[t, j]
        for k in range(first, count, 4):
            for ahead in range(k + 4, k + 8):
                _prefetch(dec, np.int64(found[min(ahead, count - 1)]))
            scales = _linear(count - k, _four(values, k, count), np.float32(1), np.float32(0))
            _add_four(residual, scales, dec, _four(found, k, count))
        for k in range(first, count):
            fired[found[k]] += 1
            l1 += values[k] * l1_weight[found[k]]
        sums[t, 0], sums[t, 1], sums[t, 2] = _dot(residual, residual), l1, count - first
        _add_scaled(error_total, np.float32(1), residual)


@compiled
def encode(sae_in, enc, b_enc, found, pointer, values):
    """Decides candidates in float32: ``activate`` without the decoder.

    Args:
        sae_in: (B, d_in) encoder inputs.
        enc: (S, d_in) encoder rows.
        b_enc: (S,) biases.
        found: candidates; overwritten with the active features, compacted.
        pointer: (B + 1,) bounds of the candidates; overwritten with those of the active features.
        values: (as found) float32 output, activations.
    """
    count, begin, last = 0, pointer[0], pointer[sae_in.shape[0]] - 1
    for t in range(sae_in.shape[0]):
        end = pointer[t + 1]
        count = _decide(sae_in[t], enc, b_enc, found, values, begin, end, count, last)
        begin, pointer[t + 1] = end, count


@compiled
def scatter(found, values, pointer, first_row, cursor, tokens, acts):
    """Moves a block's active entries to their places in feature-major order.

    Args:
        found: active features, row by row.
        values: their activations.
        pointer: (B + 1,) bounds of rows.
        first_row: number of the block's first row.
        cursor: (S,) int64, next place of each feature for this block; advanced.
        tokens: (nnz,) int32 output, row numbers.
        acts: (nnz,) float32 output.
    """
    for t in range(pointer.shape[0] - 1):
        for k in range(pointer[t], pointer[t + 1]):
            place = cursor[found[k]]
            cursor[found[k]] = place + 1
            tokens[place], acts[place] = first_row + t, values[k]


@compiled
def _feature_gradient(i, data, weights, scalars, grad_enc, grad_dec):
    """Fills one feature's gradient rows and returns its bias gradient.

    Every active entry reads the row's error once for both its uses: the activation's gradient and the decoder's. Four
    entries are added at a time, so that the gradient rows are read and written a quarter as often.
    """
    column, tokens, acts, error, sae_in, norms = data
    enc, dec = weights
    scale, l1_coeff, by_norm, penalty_l1, penalty_l2 = scalars
    weight = norms[i] if by_norm else np.float32(1)
    grad_enc[:] = 0
    grad_dec[:] = 0
    grad_bias, total = np.float32(0), np.float32(0)
    end = column[i + 1]
    for k in range(column[i], end, 4):
        four, values = _four(tokens, k, end), _four(acts, k, end)
        slopes = _linear(end - k, _dot_four(dec[i], error, four), scale, l1_coeff * weight)
        _add_four(grad_dec, _linear(end - k, values, scale, np.float32(0)), error, four)
        _add_four(grad_enc, slopes, sae_in, four)
        grad_bias += slopes[0] + slopes[1] + slopes[2] + slopes[3]
    if by_norm and norms[i] > 0:
        for k in range(column[i], end):
            total += acts[k]
        _add_scaled(grad_dec, l1_coeff * total / norms[i], dec[i])
    if penalty_l1 != 0 or penalty_l2 != 0:
        for j in range(grad_enc.shape[0]):
            w = enc[i, j]
            grad_enc[j] += np.float32(2) * penalty_l2 * w
            if w != 0:
                grad_enc[j] += penalty_l1 if w > 0 else -penalty_l1
    return grad_bias


@compiled
def write_gradients(first, last, data, weights, scalars, grad_enc, grad_bias, grad_dec):
    """Writes the gradients of features first..last - 1."""
    for i in range(first, last):
        grad_bias[i] = _feature_gradient(i, data, weights, scalars, grad_enc[i], grad_dec[i])


@compiled
def adam_row(row, grad, first, second, adam):
    """torch.optim.Adam on one row; adam as in ``step_features``."""
    step_size, beta1, beta2, root, epsilon = adam
    for j in range(row.shape[0]):
        m = first[j] + (grad[j] - first[j]) * (np.float32(1) - beta1)
        v = beta2 * second[j] + (np.float32(1) - beta2) * grad[j] * grad[j]
        first[j], second[j] = m, v
        row[j] -= step_size * (m / (np.sqrt(v) / root + epsilon))


@compiled
def _remove_components(row, basis):
    for k in range(basis.shape[0]):
        _add_scaled(row, -_dot(row, basis[k]), basis[k])


@compiled
def _normalise(row):
    norm = np.sqrt(_dot(row, row))
    if norm > 0:
        scale = np.float32(1) / norm
        for j in range(row.shape[0]):
            row[j] *= scale


@compiled
def step_features(
    first, last, data, weights, scalars, biases, moments, adam, constraint, tied, basis, screen, grad_squares, bias_part
):
    """Gradient, projection, Adam, constraints and the next step's screen, for features first..last - 1.

    A feature's rows stay in cache from its gradient to its renormalisation; gradient matrices are never written.

    Args:
        first: first feature.
        last: one past the last.
        data: (column bounds (S + 1,), tokens, acts, error, sae_in, decoder norms (S,)).
        weights: (enc, dec), changed in place.
        scalars: (2 / B, l1_coeff / B, weighted by decoder norm, encoder_l1, encoder_l2).
        biases: (b_enc, its first moment, its second), changed in place.
        moments: (enc's first, enc's second, dec's first, dec's second), changed in place.
        adam: (learning_rate / correction1, beta1, beta2, sqrt(correction2), epsilon).
        constraint: the decoder's, one of this module's constants.
        tied: whether encoder rows are the decoder's.
        basis: (k, d_in) orthonormal directions that encoder rows avoid; k may be 0.
        screen: (bfloat16 encoder rows, their norms (3, S), decoder norms (S,)), refreshed.
        grad_squares: (S,) float64 output, each feature's squared gradient norm.
        bias_part: (d_in,) output, sum over the block of encoder rows, before the step, times bias gradients.
    """
    enc, dec = weights
    b_enc, bias_first, bias_second = biases
    enc_first, enc_second, dec_first, dec_second = moments
    rounded, norms, dec_norms = screen
    grad_enc, grad_dec = np.empty(enc.shape[1], np.float32), np.empty(enc.shape[1], np.float32)
    grad_bias = np.empty(1, np.float32)
    bias_part[:] = 0
    for i in range(first, last):
        grad_bias[0] = _feature_gradient(i, data, weights, scalars, grad_enc, grad_dec)
        _add_scaled(bias_part, grad_bias[0], enc[i])
        if tied:
            _add_scaled(grad_dec, np.float32(1), grad_enc)
        if constraint != FREE and dec_norms[i] > 0:
            along = _dot(grad_dec, dec[i]) / dec_norms[i]
            _add_scaled(grad_dec, -along / dec_norms[i], dec[i])
        _remove_components(grad_dec if tied else grad_enc, basis)
        grad_squares[i] = (
            (0.0 if tied else np.float64(_dot(grad_enc, grad_enc)))
            + np.float64(_dot(grad_dec, grad_dec))
            + np.float64(grad_bias[0]) * np.float64(grad_bias[0])
        )
        if constraint == RENORMALISE_BEFORE:
            _normalise(dec[i])
        adam_row(dec[i], grad_dec, dec_first[i], dec_second[i], adam)
        adam_row(b_enc[i : i + 1], grad_bias, bias_first[i : i + 1], bias_second[i : i + 1], adam)
        if tied:
            _remove_components(dec[i], basis)
        else:
            adam_row(enc[i], grad_enc, enc_first[i], enc_second[i], adam)
            _remove_components(enc[i], basis)
        if constraint == FIXED:
            _normalise(dec[i])
        if tied:
            enc[i], enc_first[i], enc_second[i] = dec[i], dec_first[i], dec_second[i]
        norms[0, i], norms[1, i], norms[2, i] = _screen_row(enc[i], rounded[i])
        dec_norms[i] = np.sqrt(_dot(dec[i], dec[i]))
