"""How well batches are mixed, as a number: same-prompt pairs a batch over what a uniform shuffle would have.

Rows of one prompt are alike, so a batch with many of them is worth less than its size. Of b rows drawn uniformly,
without replacement, from N rows of N / L prompts, b (b-1) / 2 x (L-1) / (N-1) pairs are expected to share a prompt,
and N/L x (1 - C(N-L, b) / C(N, b)) distinct prompts to occur. Counting a batch's pairs costs one sort of its prompt
numbers. The ratio's standard error takes the number of pairs as Poisson, which is a little cautious for whole epochs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from math import inf, sqrt
from typing import Protocol

import numpy as np
import numpy.typing as npt

from storage.fingerprint import Json
from storage.order import READER_VERSION, BatchOrder, ReadState

TOLERANCE = 0.05
SMALL_STORE_ROWS = 8_000_000
SMALL_STORE_ERRORS = 4.0
_STRETCHES = 8


@dataclass(frozen=True)
class Certificate:
    """A measurement of the mixing of a store's batches.

    Attributes:
        pair_ratio: same-prompt pairs over the uniform expectation; 1 is a uniform shuffle.
        standard_error: of ``pair_ratio``.
        distinct_prompts: distinct prompts a full batch, mean; 0 where no batch is full.
        distinct_prompts_uniform: the uniform expectation of the same.
        batches: how many were measured.
        n_rows: rows of the store.
        positions: rows of a prompt.
        order: the reader's parameters.
        reader_version: of the order.
    """

    pair_ratio: float
    standard_error: float
    distinct_prompts: float
    distinct_prompts_uniform: float
    batches: int
    n_rows: int
    positions: int
    order: BatchOrder
    reader_version: int = READER_VERSION

    @property
    def passed(self) -> bool:
        """Within 0.05 of 1 or, on stores too small to tell (below 8M rows), within 4 standard errors."""
        off = abs(self.pair_ratio - 1)
        noisy = self.n_rows < SMALL_STORE_ROWS and off <= SMALL_STORE_ERRORS * self.standard_error
        return off <= TOLERANCE or noisy

    def to_json(self) -> dict[str, Json]:
        """For an artifact's stats."""
        return asdict(self) | {"passed": self.passed}


class PromptBatches(Protocol):
    """What has batches to measure: a ``ShardReader``, or a ``ShuffledBatches``."""

    @property
    def n_rows(self) -> int:
        """Rows an epoch."""
        ...

    @property
    def positions(self) -> int:
        """Rows a prompt."""
        ...

    def batches_per_epoch(self, order: BatchOrder) -> int:
        """Batches of one epoch."""
        ...

    def prompts(self, order: BatchOrder, *, start: ReadState = ...) -> Iterator[npt.NDArray[np.int32]]:
        """Prompt numbers of the batches of an epoch, from ``start`` on."""
        ...


def certify(reader: PromptBatches, order: BatchOrder, *, max_batches: int | None = None) -> Certificate:
    """Measures the mixing of a reader's own batches, from the ``prompt`` array alone.

    Args:
        reader: of the store, or of a live source.
        order: as training will read it.
        max_batches: of the first epoch, in up to eight stretches spread evenly over it; all of them by default.
    """
    batches = _sample(reader, order, max_batches)
    return measure(batches, order=order, n_rows=reader.n_rows, positions=reader.positions)


def measure(
    batches: Iterable[npt.NDArray[np.integer]], *, order: BatchOrder, n_rows: int, positions: int
) -> Certificate:
    """Measures the mixing of batches given by their rows' prompt numbers.

    Args:
        batches: the prompt numbers of each batch, int (b,).
        order: named in the certificate.
        n_rows: rows of the store.
        positions: L, rows of a prompt.
    """
    pairs, expected, count = 0, 0.0, 0
    distinct: list[tuple[int, float]] = []
    for prompts in batches:
        b = len(prompts)
        counts = np.unique(prompts, return_counts=True)[1]
        pairs += int((counts * (counts - 1) // 2).sum())
        expected += b * (b - 1) / 2 * (positions - 1) / max(n_rows - 1, 1)
        count += 1
        if b == order.batch_rows:
            distinct.append((len(counts), _distinct_uniform(b, n_rows, positions)))
    found, uniform = np.mean(distinct, axis=0) if distinct else (0.0, 0.0)
    return Certificate(
        pair_ratio=pairs / expected if expected else 1.0,
        standard_error=1 / sqrt(expected) if expected else inf,
        distinct_prompts=float(found),
        distinct_prompts_uniform=float(uniform),
        batches=count,
        n_rows=n_rows,
        positions=positions,
        order=order,
    )


def _sample(reader: PromptBatches, order: BatchOrder, max_batches: int | None) -> Iterator[npt.NDArray[np.int32]]:
    whole = reader.batches_per_epoch(order)
    if max_batches is None or max_batches >= whole:
        yield from reader.prompts(order)
        return
    stretches = min(_STRETCHES, max_batches)
    for i in range(stretches):
        size = (i + 1) * max_batches // stretches - i * max_batches // stretches
        start = ReadState(0, ((2 * i + 1) * whole // stretches - size) // 2)  # in the middle of the i-th part
        yield from islice(reader.prompts(order, start=start), size)


def _distinct_uniform(b: int, n_rows: int, positions: int) -> float:
    if b > n_rows - positions:
        return n_rows / positions
    # One factor a row of the prompt: the logarithms of the binomials themselves would cancel at 10^9 rows.
    log_absent = np.log1p(-b / (n_rows - np.arange(positions))).sum()
    return float(-np.expm1(log_absent)) * n_rows / positions
