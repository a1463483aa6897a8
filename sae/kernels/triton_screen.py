"""The screen on a CUDA device: which features may be active on which rows, listed row by row.

The bound is ``screen``'s, term by term. A tensor core aligns the products of a block (8 or 16 of them) and the running
sum to the largest and truncates at 24 bits or later, so that summing n products errs by at most (1 + 1/4) n 2^-23
|xb| |wb|: with the deciding dot product's n 2^-24 |x| |w| still below the bound's n 2^-22 |xb| |wb|. Partial sums must
not be rounded to bfloat16 on their way, which torch allows by default: it is forbidden for the product.

Cost: one bfloat16 product of B d_in d_sae, its result written and read once, in parts of bounded size. Lists have room
for a fixed number of candidates a row and know how many there were, so the caller can tell when they do not suffice.
Rejected: one kernel that multiplies and compares (saves the result's traffic, 270 MB of a step's 11 GB, and gives up
the vendor's product); lists of exact length (a second pass over the result, and a synchronisation).
"""

# triton compiles these from the types that it is called with: annotations would be read by nobody, checked by nothing.
# pyright: reportMissingParameterType=false

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PRODUCT_BYTES: Final = 2**28
"""Room for the products of a part of the batch."""

FEATURE_BLOCK: Final = 1024
"""Features that a program of the screen looks at together."""

ROUND_UP: Final = tl.constexpr(1 + 2.0**-22)
LOOSE: Final = tl.constexpr(1 + 2.0**-20)
OUTPUT_ROUNDING: Final = tl.constexpr(2.0**-8 + 2.0**-20)
EVALUATION: Final = tl.constexpr(2.0**-20)


class Tiles(NamedTuple):
    """How a program lays out rows of d_in values: whole, padded to a power of two.

    Attributes:
        width: d_in padded.
        depth: rows gathered at a time backward, of two matrices; forward, of one, up to twice as many.
        warps: of a program.
    """

    width: int
    depth: int
    warps: int

    @classmethod
    def of(cls, d_in: int) -> "Tiles":
        """As many gathered rows as registers hold beside a feature's own, two programs to a processor or more."""
        width = max(16, _power_of_two(d_in))
        warps = 4 if width <= 512 else 8 if width <= 2048 else 16
        return cls(width, max(1, min(8, 512 * warps // width)), warps)


class View(NamedTuple):
    """What is kept about the weights from step to step.

    Attributes:
        copies: (d_sae, d_in) bfloat16 copies of encoder rows.
        norms: (3, d_sae) norms of encoder rows, of copies and of their differences, rounded up.
        dec_norms: (d_sae,) norms of decoder rows.
    """

    copies: Tensor
    norms: Tensor
    dec_norms: Tensor


class Inputs(NamedTuple):
    """A batch as the encoder sees it.

    Attributes:
        centred: (B, d_in) encoder inputs.
        copies: (B, d_in) bfloat16 copies.
        norms: (3, B) as in ``View``.
        deviation: (B,) squared distance of each row from the dataset mean.
    """

    centred: Tensor
    copies: Tensor
    norms: Tensor
    deviation: Tensor


class Candidates(NamedTuple):
    """Features that may be active.

    Attributes:
        found: (B, capacity) int32; row t's first counts[t] are its candidates, ascending.
        counts: (B,) int32 candidates of each row; where one exceeds the capacity, the rest of it is missing.
    """

    found: Tensor
    counts: Tensor


def launch(kernel: Any, programs: int, *arguments: object, **settings: object) -> None:
    """Starts a kernel; keyword arguments are its compile-time constants and how it is compiled."""
    kernel[(programs,)](*arguments, **settings)


def look_at(enc: Tensor, dec: Tensor, tiles: Tiles) -> View:
    """Makes a view of (d_sae, d_in) weights."""
    d_sae, d_in = enc.shape
    view = View(torch.empty_like(enc, dtype=torch.bfloat16), enc.new_empty(3, d_sae), enc.new_empty(d_sae))
    launch(_look_at_rows, d_sae, enc, dec, *view, d_sae, d_in, WIDTH=tiles.width, num_warps=tiles.warps)
    return view


def centre(rows: Tensor, b_dec: Tensor | None, mean: Tensor, tiles: Tiles) -> Inputs:
    """Subtracts b_dec, where there is one, from (B, d_in) rows, and looks at the result."""
    count, d_in = rows.shape
    copies = torch.empty_like(rows, dtype=torch.bfloat16)
    inputs = Inputs(torch.empty_like(rows), copies, rows.new_empty(3, count), rows.new_empty(count))
    launch(
        *(_centre_rows, count, rows, mean if b_dec is None else b_dec, mean, *inputs, count, d_in),
        SUBTRACT=b_dec is not None,
        WIDTH=tiles.width,
        num_warps=tiles.warps,
    )
    return inputs


def candidates(inputs: Inputs, b_enc: Tensor, view: View, capacity: int) -> Candidates:
    """Lists the features that may be active on each row.

    Args:
        inputs: the batch.
        b_enc: (d_sae,) biases.
        view: of the encoder.
        capacity: candidates that a row has room for.
    """
    (count, d_in), d_sae = inputs.copies.shape, b_enc.shape[0]
    found = torch.empty(count, capacity, dtype=torch.int32, device=b_enc.device)
    counts = torch.empty(count, dtype=torch.int32, device=b_enc.device)
    part = max(16, PRODUCT_BYTES // (2 * d_sae))
    for first in range(0, count, part):
        last = min(count, first + part)
        with _summed_in_float32():
            approx = torch.mm(inputs.copies[first:last], view.copies.T)
        launch(
            *(_list_candidates, -(-(last - first) // 4), approx, b_enc, view.norms, inputs.norms, found, counts),
            *(first, last, count, d_sae, capacity, d_in * 2.0**-22, d_in * 2.0**-100),
            ROWS=4,
            BLOCK=min(FEATURE_BLOCK, _power_of_two(d_sae)),
        )
    return Candidates(found, counts)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@contextmanager
def _summed_in_float32() -> Generator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


@triton.jit
def store_copy(row, i, j, inside, copies, norms, count, n):
    """Writes row i's bfloat16 copy, and the norms of row, of copy and of their difference, rounded up.

    Args:
        row: (WIDTH,) float32, zero outside.
        i: its number.
        j: (WIDTH,) columns.
        inside: (WIDTH,) j < n.
        copies: (count, n) bfloat16 output.
        norms: (3, count) output.
        count: number of rows.
        n: d_in.
    """
    copy = row.to(tl.bfloat16)
    tl.store(copies + i * n + j, copy, mask=inside)
    whole = row.to(tl.float64)
    copied = copy.to(tl.float32).to(tl.float64)
    lost = copied - whole
    tl.store(norms + i, (tl.sqrt(tl.sum(whole * whole)) * ROUND_UP).to(tl.float32))
    tl.store(norms + count + i, (tl.sqrt(tl.sum(copied * copied)) * ROUND_UP).to(tl.float32))
    tl.store(norms + 2 * count + i, (tl.sqrt(tl.sum(lost * lost)) * ROUND_UP).to(tl.float32))


@triton.jit
def _look_at_rows(enc, dec, copies, norms, dec_norms, count, n, WIDTH: tl.constexpr):
    """Fills a ``View``; one program a feature."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, WIDTH)
    inside = j < n
    store_copy(tl.load(enc + i * n + j, mask=inside, other=0.0), i, j, inside, copies, norms, count, n)
    row = tl.load(dec + i * n + j, mask=inside, other=0.0)
    tl.store(dec_norms + i, tl.sqrt(tl.sum(row * row)))


@triton.jit
def _centre_rows(
    rows, b_dec, mean, centred, copies, norms, deviation, count, n, SUBTRACT: tl.constexpr, WIDTH: tl.constexpr
):
    """Fills ``Inputs``; one program a row."""
    t = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, WIDTH)
    inside = j < n
    row = tl.load(rows + t * n + j, mask=inside, other=0.0)
    away = row - tl.load(mean + j, mask=inside, other=0.0)
    tl.store(deviation + t, tl.sum(away * away))
    if SUBTRACT:
        row -= tl.load(b_dec + j, mask=inside, other=0.0)
    tl.store(centred + t * n + j, row, mask=inside)
    store_copy(row, t, j, inside, copies, norms, count, n)


@triton.jit
def _list_candidates(
    approx, b_enc, features, rows, found, counts, first, last, count, d_sae, capacity, sums, tiny,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lists what the screen cannot rule out; one program for ROWS rows, so that they share a feature's norms.

    Args:
        approx: (last - first, d_sae) bfloat16, the product of the copies.
        b_enc: (d_sae,) encoder biases.
        features: (3, d_sae) norms of encoder rows, of their copies and of the differences.
        rows: (3, count) the same of the encoder's inputs.
        found: (count, capacity) int32 output.
        counts: (count,) int32 output.
        first: row of the batch that approx begins with.
        last: one past the row that it ends with.
        count: rows of the batch.
        d_sae: number of features.
        capacity: candidates that a row has room for.
        sums: d_in 2^-22, for the rounding of sums.
        tiny: d_in 2^-100, for underflow.
        ROWS: rows of a program.
        BLOCK: features taken at a time.
    """
    t = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = t < last
    whole = tl.load(rows + t, mask=real, other=0.0)
    copied = tl.load(rows + count + t, mask=real, other=0.0)
    lost = tl.load(rows + 2 * count + t, mask=real, other=0.0)
    residual = (whole * LOOSE)[:, None]
    copy = ((lost + sums * copied) * LOOSE)[:, None]
    least = (tiny * (1.0 + whole))[:, None]
    product = approx + (t - first).to(tl.int64)[:, None] * d_sae
    list_of = found + t.to(tl.int64)[:, None] * capacity
    listed = tl.zeros([ROWS], tl.int32)
    for begin in range(0, d_sae, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        known = i < d_sae
        bias = tl.load(b_enc + i, mask=known, other=0.0)[None, :]
        norm = tl.load(features + d_sae + i, mask=known, other=0.0)[None, :]
        difference = tl.load(features + 2 * d_sae + i, mask=known, other=0.0)[None, :]
        inside = real[:, None] & known[None, :]
        a = tl.load(product + i[None, :], mask=inside, other=0.0).to(tl.float32)
        slack = OUTPUT_ROUNDING * tl.abs(a) + EVALUATION * tl.abs(bias)
        slack += residual * difference + copy * norm + least
        marked = ((a + bias + slack <= 0.0) == 0) & inside  # what is not a number is marked too
        place = listed[:, None] + tl.cumsum(marked.to(tl.int32), axis=1) - 1
        every = tl.broadcast_to(i[None, :], [ROWS, BLOCK])
        tl.store(list_of + place, every, mask=marked & (place < capacity))
        listed += tl.sum(marked.to(tl.int32), axis=1)
    tl.store(counts + t, listed, mask=real)
