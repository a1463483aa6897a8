"""Which features may be active on which rows: a cheap product that never loses one.

The product is taken in bfloat16, where that is fast, and says only which (row, feature) pairs could have a
pre-activation above zero; the caller decides those in float32. With x the encoder's input, w an encoder row, xb and wb
their bfloat16 copies, n = d_in, u = 2^-24, and s = x.w exactly:

- |xb.wb - s| = |x.(wb - w) + (xb - x).wb| <= |x| |wb - w| + |xb - x| |wb|, by Cauchy-Schwarz on the rounding residuals
  that really occurred.
- The product adds exact products in float32 in any order, some processors by truncation: off by at most 2 g |xb| |wb|,
  g = n u / (1 - n u). The float32 dot product that decides is off from s by at most g |x| |w|, and |x| |w| is at most
  1.01 |xb| |wb| since each copy differs by at most one part in 2^8. Together below n 2^-22 |xb| |wb| for n < 2^20.
- Rounding the product to bfloat16, which has 8 significant bits, moves it by at most 2^-8 |approx|.
- Adding b_enc in float32 cannot change a sum's sign. Evaluating the bound itself in float32 costs a few units in the
  last place: 2^-20 (|approx| + |b_enc|), and factors (1 + 2^-20) on the rest. Underflow: n 2^-100 (1 + |x|).

So a feature whose float32 pre-activation is above zero always has approx + b_enc > -margin, margin being the sum of
these. A plain 2^-8 |x| |w| is no bound: the residuals can all have one sign. For each active pair the screen keeps
1.25 at 512 -> 4096 and 1.7 at 2048 -> 16384 (random rows, L0 60). Cost: one product of B d_in d_sae in bfloat16 and one
pass over its result. Rejected: deciding by the bfloat16 value itself, which would train another autoencoder.

Where bfloat16 products are slow, the same screen runs on a float32 product with the error of its summation alone,
oneDNN's where torch has it: of these shapes it takes a fifth less than ``torch.mm``, which is MKL's (on an AMD EPYC).
Since the decision is not the product's, results do not depend on which was used; so the choice may be timed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from . import candidates, compiled

ROW_BLOCK: Final = 256
"""Rows screened at a time: their products stay in a core's cache."""

_ONEDNN: Final[Callable[..., torch.Tensor] | None] = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
"""The one way to oneDNN's float32 product that copies nothing; torch's compiler calls it. None: not in this torch."""

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class EncoderView:
    """What the screen knows of the encoder; the backward pass refreshes it row by row.

    Attributes:
        rounded: (d_sae, d_in) bfloat16 copies of encoder rows, as bits.
        norms: (3, d_sae) norms of rows, of copies and of their differences, rounded up.
    """

    rounded: NDArray[np.uint16]
    norms: F32

    @classmethod
    def empty(cls, d_sae: int, d_in: int) -> "EncoderView":
        """Room for an encoder."""
        return cls(np.empty((d_sae, d_in), np.uint16), np.empty((3, d_sae), np.float32))


class Screen:
    """One thread's buffers for screening a block of rows."""

    def __init__(self, d_in: int, d_sae: int, *, bfloat16: bool) -> None:
        """Allocates; pages of the candidate list that are never written take no memory.

        Args:
            d_in: width of the activations.
            d_sae: number of features.
            bfloat16: the precision of the product.
        """
        self.shape = (d_sae, d_in)
        self._bfloat16 = bfloat16
        self._approx = torch.empty(ROW_BLOCK if bfloat16 else 0, d_sae, dtype=torch.bfloat16)
        self._rounded = np.empty((ROW_BLOCK, d_in), np.uint16)
        self._norms = np.empty((3, ROW_BLOCK), np.float32)
        self._marks = np.zeros(-(-d_sae // 8) * 8, np.uint8)
        self.found = np.empty(ROW_BLOCK * d_sae + 8, np.int32)
        self.pointer = np.empty(ROW_BLOCK + 1, np.int64)

    def candidates(self, sae_in: F32, enc: F32, b_enc: F32, view: EncoderView) -> None:
        """Lists the features that may be active on each row: row t's are ``found[pointer[t]:pointer[t + 1]]``.

        Args:
            sae_in: (B, d_in) encoder inputs, B at most ROW_BLOCK.
            enc: (d_sae, d_in) encoder rows.
            b_enc: (d_sae,) biases.
            view: of enc.
        """
        count, n = sae_in.shape
        rounded = self._rounded[:count]
        compiled.screen_rows(0, count, sae_in, rounded, self._norms)
        if self._bfloat16:
            approx = torch.mm(_as_bfloat16(rounded), _as_bfloat16(view.rounded).T, out=self._approx[:count])
            product, listing = approx.view(torch.uint16).numpy(), candidates.from_bfloat16
        else:
            product = _float32_product(torch.from_numpy(sae_in), torch.from_numpy(enc)).numpy()
            listing = candidates.from_float32
        words = self._marks.view(np.uint64)
        listing(product, b_enc, view.norms, self._norms, n, self._marks, words, self.found, self.pointer)


def bfloat16_is_faster(d_in: int, d_sae: int) -> bool:
    """Times both products on this machine, on at most 2,048 features; a few milliseconds.

    Where float32 products round their factors (a setting of torch's or of oneDNN's), only the bfloat16 bound covers it.
    """
    rows = torch.full((64, d_in), 1 + 2.0**-12)  # with rounded factors a product loses the last bits of each term
    features = rows[:1].repeat(min(d_sae, 2048), 1)
    if _is_allowed_to_round() or float(_float32_product(rows, features).min()) < d_in * (1 + 2.0**-12):
        return True
    in_bfloat16 = _seconds(_bfloat16_product, rows.bfloat16(), features.bfloat16())
    return in_bfloat16 < _seconds(_float32_product, rows, features)


def _seconds(product: Callable[..., torch.Tensor], rows: torch.Tensor, features: torch.Tensor) -> float:
    tries: list[float] = []
    for _ in range(4):
        begin = time.perf_counter()
        product(rows, features)
        tries.append(time.perf_counter() - begin)
    return min(tries)


def _is_allowed_to_round() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch's answer where the setting was changed by one of its newer names
        return True


def _bfloat16_product(rows: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return torch.mm(rows, features.T)


def _float32_product(rows: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(B, S) float32; memory is the allocator's, which keeps it from block to block."""
    if _ONEDNN is None:
        return torch.mm(rows, features.T)
    return _ONEDNN(rows, features, None, "none", [], "")


def _as_bfloat16(bits: NDArray[np.uint16]) -> torch.Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)
