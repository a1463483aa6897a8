"""One pass over rows of the store along one direction: the outermost rows, how projections spread, and their norms.

Cost: one dot product and one norm a row, so the pass runs at the speed of the disk; memory is one batch, a histogram of
fixed bins, and the rows kept at either end. Rejected: keeping all projections, which grows with the store.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pipeline.analysis.context import Floats, Integers, RowSource
from pipeline.statistics import Moments

_BATCH_ROWS = 16_384


class OuterRow(NamedTuple):
    """A row far out along the direction.

    Attributes:
        projection: of the row on the direction.
        norm: of the row.
        prompt: training prompt.
        position: position in it.
    """

    projection: float
    norm: float
    prompt: int
    position: int


@dataclass(frozen=True)
class Projections:
    """What the pass finds.

    Attributes:
        n_rows: rows read.
        mean: of the projections.
        std: of the projections.
        norm_correlation: of projection and norm; None where either does not vary.
        histogram: rows by projection; those beyond the edges count in the outermost bins, int64 (n_bins,).
        top: the rows of largest projection, largest first.
        bottom: the rows of smallest projection, smallest first.
    """

    n_rows: int
    mean: float
    std: float
    norm_correlation: float | None
    histogram: Integers
    top: Sequence[OuterRow]
    bottom: Sequence[OuterRow]


def project_rows(reader: RowSource, direction: Floats, edges: Floats, *, n_rows: int, kept: int) -> Projections:
    """Projects the first rows of the store, in the order they lie in, on a direction.

    The store is shuffled over its whole corpus, so a front part is an unbiased sample.

    Args:
        reader: the store.
        direction: a unit vector, (d_in,).
        edges: ascending edges of the histogram's bins, (n_bins + 1,).
        n_rows: rows to read; fewer where the store has fewer.
        kept: rows kept at either end; equal projections go by prompt, then position.
    """
    along = direction.astype(np.float32)
    sums, top, bottom = _Sums(), _Ends(kept, 1), _Ends(kept, -1)
    histogram = np.zeros(edges.size - 1, np.int64)
    left = min(n_rows, reader.n_rows)
    for batch in reader.sequential(min(_BATCH_ROWS, max(left, 1))):
        rows = np.asarray(batch.rows, np.float32)[:left]
        projection = (rows @ along).astype(np.float64)
        norm = np.sqrt(np.einsum("ij,ij->i", rows, rows)).astype(np.float64)
        prompt, position = (np.asarray(column)[: len(rows)] for column in (batch.prompt, batch.position))
        sums.add(projection, norm)
        histogram += np.histogram(np.clip(projection, edges[0], edges[-1]), edges)[0]
        for ends in (top, bottom):
            ends.add(projection, norm, prompt, position)
        left -= len(rows)
        if left <= 0:
            break
    mean, std, correlation = sums.moments()
    return Projections(sums.n_rows, mean, std, correlation, histogram, top.rows, bottom.rows)


def projection_stds(moments: Moments, directions: Floats) -> Floats:
    """Standard deviation of the store's activations along each of several directions, from its mean and second moment.

    Args:
        moments: of the store.
        directions: (n, d_in).

    Returns:
        (n,).
    """
    second = moments.second_moment / max(moments.sampled_rows, 1)
    mean_square = np.einsum("ij,ij->i", directions @ second, directions)
    return np.sqrt(np.maximum(mean_square - np.square(directions @ moments.mean), 0))


@dataclass
class _Sums:
    """Power sums of projection and norm, around the first row's so that nothing cancels."""

    n_rows: int = 0
    origin: Floats = field(default_factory=lambda: np.zeros(2))
    total: Floats = field(default_factory=lambda: np.zeros(2))
    products: Floats = field(default_factory=lambda: np.zeros((2, 2)))

    def add(self, projection: Floats, norm: Floats) -> None:
        pairs = np.stack([projection, norm])
        if not self.n_rows:
            self.origin = pairs.mean(axis=1)
        pairs -= self.origin[:, None]
        self.n_rows += pairs.shape[1]
        self.total += pairs.sum(axis=1)
        self.products += pairs @ pairs.T

    def moments(self) -> tuple[float, float, float | None]:
        """Mean and standard deviation of the projection, and its correlation with the norm."""
        mean = self.total / max(self.n_rows, 1)
        covariance = self.products / max(self.n_rows, 1) - np.outer(mean, mean)
        projection, norm = np.sqrt(np.maximum(np.diag(covariance), 0))
        correlation = float(covariance[0, 1] / (projection * norm)) if projection > 0 and norm > 0 else None
        return float(self.origin[0] + mean[0]), float(projection), correlation


@dataclass
class _Ends:
    """The rows furthest out on one side."""

    kept: int
    sign: int
    rows: list[OuterRow] = field(default_factory=list[OuterRow])

    def add(self, projection: Floats, norm: Floats, prompt: Integers, position: Integers) -> None:
        outward = self.sign * projection
        count = min(self.kept, len(outward))
        if not count:
            return
        chosen = np.flatnonzero(outward >= np.partition(outward, -count)[-count])
        found = [
            OuterRow(float(projection[row]), float(norm[row]), int(prompt[row]), int(position[row])) for row in chosen
        ]
        key = lambda row: (-self.sign * row.projection, row.prompt, row.position)  # noqa: E731
        self.rows = sorted(self.rows + found, key=key)[: self.kept]
