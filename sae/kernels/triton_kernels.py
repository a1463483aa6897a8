"""The sparse step's loops on a CUDA device, in Triton: a program a row forward, a program a few features backward.

``compiled`` has the same loops for the CPU, under the same names and in the same order. Here a program keeps whole rows
of d_in values in registers and gathers others a few at a time, so that many loads are on their way at once. Every
output is written by one program, in an order that is fixed: no atomics, equal bits from run to run. Rejected: programs
that share a feature's entries (a second pass would add up their gradient rows); the most active features are begun
first instead.

In all kernels n is d_in, S is d_sae, B the rows of the batch; WIDTH is n padded to a power of two, DEPTH the number of
rows gathered at a time.
"""

# triton compiles these from the types that it is called with: annotations would be read by nobody, checked by nothing.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from typing import Final

import triton
import triton.language as tl

from .triton_screen import store_copy

FIXED: Final = tl.constexpr(0)
AS_PUBLISHED: Final = tl.constexpr(1)
RENORMALISE_BEFORE: Final = tl.constexpr(2)
FREE: Final = tl.constexpr(3)


@triton.jit
def activate(
    rows, centred, weights, dec_norms, candidates, active, error, sums, count, n, capacity,
    BY_NORM: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Decides candidates in float32, decodes what is active, and measures each row; one program a row.

    Args:
        rows: (B, n) activations.
        centred: (B, n) encoder inputs.
        weights: (enc (S, n), b_enc (S,), dec (S, n), b_dec (n,)).
        dec_norms: (S,) norms of decoder rows, read where BY_NORM.
        candidates: (features (B, capacity) int32, how many each row has (B,) int32).
        active: output, (features (B, capacity) int32, activations (B, capacity), how many each row has (B,) int32).
        error: (B, n) output, reconstruction minus row.
        sums: (2, B) output: squared error, L1.
        count: B.
        n: d_in.
        capacity: candidates that a row has room for.
        BY_NORM: whether the L1 is weighted by decoder norms.
        WIDTH: n padded.
        DEPTH: candidates taken at a time.
    """
    enc, b_enc, dec, b_dec = weights
    found, found_counts = candidates
    features, acts, counts = active
    t = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, WIDTH)
    inside = j < n
    row = tl.load(centred + t * n + j, mask=inside, other=0.0)
    residual = tl.load(b_dec + j, mask=inside, other=0.0) - tl.load(rows + t * n + j, mask=inside, other=0.0)
    listed = tl.minimum(tl.load(found_counts + t), capacity)
    kept = 0
    l1 = 0.0
    for begin in range(0, listed, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        real = k < listed
        i = tl.load(found + t * capacity + k, mask=real, other=0)
        place = i.to(tl.int64)[:, None] * n + j[None, :]
        reading = tl.load(enc + place, mask=real[:, None] & inside[None, :], other=0.0)
        pre = tl.sum(reading * row[None, :], axis=1) + tl.load(b_enc + i, mask=real, other=0.0)
        fires = ((pre <= 0.0) == 0) & real  # what is not a number fires
        act = tl.where(fires, pre, 0.0)
        writing = tl.load(dec + place, mask=fires[:, None] & inside[None, :], other=0.0)
        residual += tl.sum(act[:, None] * writing, axis=0)
        if BY_NORM:
            l1 += tl.sum(act * tl.load(dec_norms + i, mask=fires, other=0.0))
        else:
            l1 += tl.sum(act)
        to = t * capacity + kept + tl.cumsum(fires.to(tl.int32), axis=0) - 1
        tl.store(features + to, i, mask=fires)
        tl.store(acts + to, act, mask=fires)
        kept += tl.sum(fires.to(tl.int32))
    tl.store(counts + t, kept)
    tl.store(error + t * n + j, residual, mask=inside)
    tl.store(sums + t, tl.sum(residual * residual))
    tl.store(sums + count + t, l1)


@triton.jit
def compact(active, ends, entries, capacity, BLOCK: tl.constexpr):
    """Lists active entries row after row without gaps; one program a row.

    Args:
        active: as ``activate`` left it.
        ends: (B,) int64, one past each row's last place in the output.
        entries: output, (features (nnz,) int32, row numbers (nnz,) int32, activations (nnz,)).
        capacity: room of a row.
        BLOCK: entries taken at a time.
    """
    features, acts, counts = active
    to_features, to_rows, to_acts = entries
    t = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + t)
    to = tl.load(ends + t) - count
    for begin in range(0, count, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        real = k < count
        tl.store(to_features + to + k, tl.load(features + t * capacity + k, mask=real, other=0), mask=real)
        tl.store(to_rows + to + k, tl.full([BLOCK], 0, tl.int32) + t.to(tl.int32), mask=real)
        tl.store(to_acts + to + k, tl.load(acts + t * capacity + k, mask=real, other=0.0), mask=real)


@triton.jit
def _feature_gradient(
    i, j, inside, reading, writing, norm, data, scalars, n,
    BY_NORM: tl.constexpr, PENALISED: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Returns feature i's gradient rows and bias gradient, its encoder row being ``reading``, its decoder ``writing``.

    Every active entry reads the row's error once for both its uses: the activation's gradient and the decoder's.
    """
    column, tokens, acts, error, centred = data
    scale, l1_coeff, penalty_l1, penalty_l2 = scalars
    grad_enc = tl.zeros([WIDTH], tl.float32)
    grad_dec = tl.zeros([WIDTH], tl.float32)
    grad_bias = 0.0
    total = 0.0
    weight = l1_coeff * norm if BY_NORM else l1_coeff
    end = tl.load(column + i + 1)
    for begin in range(tl.load(column + i), end, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        real = k < end
        t = tl.load(tokens + k, mask=real, other=0).to(tl.int64)
        act = tl.load(acts + k, mask=real, other=0.0)
        place = t[:, None] * n + j[None, :]
        both = real[:, None] & inside[None, :]
        missed = tl.load(error + place, mask=both, other=0.0)
        given = tl.load(centred + place, mask=both, other=0.0)
        slope = tl.where(real, scale * tl.sum(missed * writing[None, :], axis=1) + weight, 0.0)
        grad_dec += tl.sum((scale * act)[:, None] * missed, axis=0)
        grad_enc += tl.sum(slope[:, None] * given, axis=0)
        grad_bias += tl.sum(slope)
        total += tl.sum(act)
    if BY_NORM:
        grad_dec += tl.where(norm > 0.0, l1_coeff * total / norm, 0.0) * writing
    if PENALISED:
        grad_enc += 2.0 * penalty_l2 * reading
        grad_enc += tl.where(reading > 0.0, penalty_l1, tl.where(reading < 0.0, -penalty_l1, 0.0))
    return grad_enc, grad_dec, grad_bias


@triton.jit
def write_gradients(
    data, weights, dec_norms, scalars, grads, n,
    BY_NORM: tl.constexpr, PENALISED: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Writes grads (enc (S, n), b_enc (S,), dec (S, n)), a program a feature; the rest as in ``step_features``."""
    enc, dec = weights
    grad_enc, grad_bias, grad_dec = grads
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, WIDTH)
    inside = j < n
    place = i * n + j
    reading = tl.load(enc + place, mask=inside, other=0.0)
    writing = tl.load(dec + place, mask=inside, other=0.0)
    of_enc, of_dec, of_bias = _feature_gradient(
        i, j, inside, reading, writing, tl.load(dec_norms + i), data, scalars, n, BY_NORM, PENALISED, WIDTH, DEPTH
    )
    tl.store(grad_enc + place, of_enc, mask=inside)
    tl.store(grad_dec + place, of_dec, mask=inside)
    tl.store(grad_bias + i, of_bias)


@triton.jit
def _adam(values, grad, first, second, place, mask, adam):
    """Returns values moved by torch.optim.Adam, and their moments; adam as in ``step_features``."""
    step_size, beta1, beta2, root, epsilon = adam
    m = tl.load(first + place, mask=mask, other=0.0)
    v = tl.load(second + place, mask=mask, other=0.0)
    m += (grad - m) * (1.0 - beta1)
    v = beta2 * v + (1.0 - beta2) * grad * grad
    tl.store(first + place, m, mask=mask)
    tl.store(second + place, v, mask=mask)
    return values - step_size * (m / (tl.sqrt(v) / root + epsilon)), m, v


@triton.jit
def _without_components(row, basis, n_directions, n, j, inside):
    """Returns a row without its components along the basis."""
    for k in range(n_directions):
        direction = tl.load(basis + k * n + j, mask=inside, other=0.0)
        row -= tl.sum(row * direction) * direction
    return row


@triton.jit
def _normalised(row):
    norm = tl.sqrt(tl.sum(row * row))
    return row * tl.where(norm > 0.0, 1.0 / norm, 1.0)


@triton.jit
def step_features(
    order, data, weights, scalars, biases, moments, adam, basis, n_directions, view, squares, bias_parts, d_sae, n,
    CONSTRAINT: tl.constexpr, TIED: tl.constexpr, BY_NORM: tl.constexpr, PENALISED: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradient, projection, Adam, constraints and the next step's screen; each program takes every P-th of the order.

    A feature's rows stay in registers from its gradient to its renormalisation; gradient matrices are never written.

    Args:
        order: (S,) int64, features, those with most entries first.
        data: (column bounds (S + 1,), rows (nnz,), acts (nnz,), error (B, n), centred (B, n)).
        weights: (enc, dec), both (S, n), changed in place.
        scalars: (2 / B, l1_coeff / B, encoder_l1, encoder_l2).
        biases: (b_enc, its first moment, its second), each (S,), changed in place.
        moments: (enc's first, enc's second, dec's first, dec's second), changed in place.
        adam: (learning_rate / correction1, beta1, beta2, sqrt(correction2), epsilon).
        basis: (k, n) orthonormal directions that encoder rows avoid; not read where there are none.
        n_directions: k.
        view: (bfloat16 encoder rows (S, n), their norms (3, S), decoder norms (S,)), refreshed.
        squares: (S,) output, each feature's squared gradient norm.
        bias_parts: (P, n) output, sum over a program's features of encoder rows, before the step, times bias gradients.
        d_sae: S.
        n: d_in.
        CONSTRAINT: the decoder's, one of this module's constants.
        TIED: whether encoder rows are the decoder's.
        BY_NORM: whether the L1 is weighted by decoder norms.
        PENALISED: whether encoder weights are.
        WIDTH: n padded.
        DEPTH: entries taken at a time.
    """
    enc, dec = weights
    b_enc, bias_first, bias_second = biases
    enc_first, enc_second, dec_first, dec_second = moments
    copies, norms, dec_norms = view
    j = tl.arange(0, WIDTH)
    inside = j < n
    bias_part = tl.zeros([WIDTH], tl.float32)
    for turn in range(tl.program_id(0), d_sae, tl.num_programs(0)):
        i = tl.load(order + turn)
        place = i * n + j
        reading = tl.load(enc + place, mask=inside, other=0.0)
        writing = tl.load(dec + place, mask=inside, other=0.0)
        norm = tl.load(dec_norms + i)
        grad_enc, grad_dec, grad_bias = _feature_gradient(
            i, j, inside, reading, writing, norm, data, scalars, n, BY_NORM, PENALISED, WIDTH, DEPTH
        )
        bias_part += grad_bias * reading
        if TIED:
            grad_dec += grad_enc
        if CONSTRAINT != FREE:
            along = tl.sum(grad_dec * writing) / norm
            grad_dec -= tl.where(norm > 0.0, along / norm, 0.0) * writing
        square = grad_bias * grad_bias
        if TIED:
            grad_dec = _without_components(grad_dec, basis, n_directions, n, j, inside)
        else:
            grad_enc = _without_components(grad_enc, basis, n_directions, n, j, inside)
            square += tl.sum(grad_enc * grad_enc)
        tl.store(squares + i, square + tl.sum(grad_dec * grad_dec))
        if CONSTRAINT == RENORMALISE_BEFORE:
            writing = _normalised(writing)
        writing, m, v = _adam(writing, grad_dec, dec_first, dec_second, place, inside, adam)
        bias, _, _ = _adam(tl.load(b_enc + i), grad_bias, bias_first, bias_second, i, i >= 0, adam)
        tl.store(b_enc + i, bias)
        if TIED:
            writing = _without_components(writing, basis, n_directions, n, j, inside)
        else:
            reading, _, _ = _adam(reading, grad_enc, enc_first, enc_second, place, inside, adam)
            reading = _without_components(reading, basis, n_directions, n, j, inside)
        if CONSTRAINT == FIXED:
            writing = _normalised(writing)
        if TIED:
            reading = writing
            tl.store(enc_first + place, m, mask=inside)
            tl.store(enc_second + place, v, mask=inside)
        tl.store(enc + place, reading, mask=inside)
        tl.store(dec + place, writing, mask=inside)
        store_copy(reading, i, j, inside, copies, norms, d_sae, n)
        tl.store(dec_norms + i, tl.sqrt(tl.sum(writing * writing)))
    tl.store(bias_parts + tl.program_id(0).to(tl.int64) * n + j, bias_part, mask=inside)
