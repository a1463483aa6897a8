"""One pass over rows of the store along one direction: the outermost rows, how projections spread, and their norms.

Of every batch there is a part, some kilobytes: its counts, its power sums around one origin, and its outermost rows.
The origin is the mean over the first batch, which is read for it first.

Cost: one dot product and one norm a row, so the pass runs at the speed of the disk; memory is some batches, a histogram
of fixed bins, and the rows kept at either end. Rejected: keeping all projections, which grows with the store.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.analysis.context import Context, Floats, Integers, RowBatch, RowSource
from pipeline.analysis.passes import Parts, Pass, in_batches
from pipeline.statistics import Moments
from storage.prefetch import Prefetched

_BATCH_ROWS = 16_384
_AHEAD = 2


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


def project_rows(context: Context, direction: Floats, edges: Floats, *, n_rows: int, kept: int) -> Projections:
    """Projects the first rows of the store, in the order they lie in, on a direction.

    The store is shuffled over its whole corpus, so a front part is an unbiased sample.

    Args:
        context: the store.
        direction: a unit vector, (d_in,).
        edges: ascending edges of the histogram's bins, (n_bins + 1,).
        n_rows: rows to read; fewer where the store has fewer.
        kept: rows kept at either end; equal projections go by prompt, then position.
    """
    reader = context.need_reader()
    along = _Along(direction.astype(np.float32), edges, min(n_rows, reader.n_rows), kept, np.zeros(2))
    along = replace(along, origin=along.first_mean(reader))
    work = Pass(
        label="projections",
        unit="rows",
        batches=along.batches,
        reads=frozenset({"store"}),
        needs={"batches of rows": 2 * (_AHEAD + 2) * 4 * along.batch_rows * direction.size},
        opening=along,
    )
    return _taken_in(context.passes.in_order(work, context), along)


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


class _Part(NamedTuple):
    """What a batch gives.

    Attributes:
        n_rows: of it.
        total: sums of projection and norm, each less the origin's, (2,).
        products: sums of their products, (2, 2).
        histogram: rows by projection, (n_bins,).
        top: its rows of largest projection.
        bottom: its rows of smallest projection.
    """

    n_rows: int
    total: Floats
    products: Floats
    histogram: Integers
    top: Sequence[OuterRow]
    bottom: Sequence[OuterRow]


class _Projected(NamedTuple):
    """The rows of a batch."""

    projection: Floats
    norm: Floats
    prompt: Integers
    position: Integers

    @property
    def pairs(self) -> Floats:
        """Projection and norm, (2, b)."""
        return np.stack([self.projection, self.norm])


@dataclass(frozen=True)
class _Along:
    """Opens a pass.

    Attributes:
        along: the direction, (d_in,).
        edges: of the histogram's bins.
        n_rows: rows read.
        kept: rows kept at either end.
        origin: of projections and norms, so that sums of them cancel nothing, (2,).
    """

    along: npt.NDArray[np.float32]
    edges: Floats
    n_rows: int
    kept: int
    origin: Floats

    @property
    def batch_rows(self) -> int:
        """Rows a batch."""
        return min(_BATCH_ROWS, max(self.n_rows, 1))

    @property
    def batches(self) -> list[Sequence[int]]:
        """The rows of each batch."""
        return in_batches(range(self.n_rows), self.batch_rows)

    def __call__(self, context: Context) -> Parts[Sequence[int], _Part]:
        reader = context.need_reader()
        return lambda batches: (self._part(projected) for projected in self._projected(reader, batches))

    def first_mean(self, reader: RowSource) -> Floats:
        """Means of the first batch's projections and norms, (2,); zero where there is none."""
        means = [projected.pairs.mean(axis=1) for projected in self._projected(reader, self.batches[:1])]
        return means[0] if means else np.zeros(2)

    def _projected(self, reader: RowSource, batches: Sequence[Sequence[int]]) -> Iterator[_Projected]:
        with Prefetched(self._read(reader, batches), _AHEAD) as read:
            for numbers, batch in zip(batches, read, strict=True):
                yield self._project(batch, len(numbers))

    def _read(self, reader: RowSource, batches: Sequence[Sequence[int]]) -> Generator[RowBatch]:
        """These batches and no more: what is beyond is another's."""
        first = batches[0][0] // self.batch_rows if batches else 0
        rows = reader.sequential(self.batch_rows, start=first, prefetch=0)
        for _ in batches:
            yield next(rows)

    def _project(self, batch: RowBatch, kept: int) -> _Projected:
        rows = np.asarray(batch.rows, np.float32)[:kept]
        projection = (rows @ self.along).astype(np.float64)
        norm = np.sqrt(np.einsum("ij,ij->i", rows, rows)).astype(np.float64)
        return _Projected(projection, norm, *(np.asarray(at)[:kept] for at in (batch.prompt, batch.position)))

    def _part(self, rows: _Projected) -> _Part:
        pairs = rows.pairs - self.origin[:, None]
        inside = np.clip(rows.projection, self.edges[0], self.edges[-1])
        return _Part(
            n_rows=len(rows.projection),
            total=pairs.sum(axis=1),
            products=pairs @ pairs.T,
            histogram=np.histogram(inside, self.edges)[0],
            top=_outermost(_outer_rows(rows, self.kept, 1), self.kept, 1),
            bottom=_outermost(_outer_rows(rows, self.kept, -1), self.kept, -1),
        )


def _taken_in(parts: Iterator[_Part], along: _Along) -> Projections:
    n_rows, total, products = 0, np.zeros(2), np.zeros((2, 2))
    histogram = np.zeros(along.edges.size - 1, np.int64)
    top, bottom = list[OuterRow](), list[OuterRow]()
    for part in parts:
        n_rows += part.n_rows
        total += part.total
        products += part.products
        histogram += part.histogram
        top = _outermost([*top, *part.top], along.kept, 1)
        bottom = _outermost([*bottom, *part.bottom], along.kept, -1)
    mean = total / max(n_rows, 1)
    covariance = products / max(n_rows, 1) - np.outer(mean, mean)
    projection, norm = np.sqrt(np.maximum(np.diag(covariance), 0))
    correlation = float(covariance[0, 1] / (projection * norm)) if projection > 0 and norm > 0 else None
    return Projections(n_rows, float(along.origin[0] + mean[0]), float(projection), correlation, histogram, top, bottom)


def _outer_rows(rows: _Projected, kept: int, sign: int) -> list[OuterRow]:
    """The rows furthest out on one side, and those as far out as the last of them."""
    outward = sign * rows.projection
    count = min(kept, len(outward))
    if not count:
        return []
    chosen = np.flatnonzero(outward >= np.partition(outward, -count)[-count])
    return [
        OuterRow(float(rows.projection[row]), float(rows.norm[row]), int(rows.prompt[row]), int(rows.position[row]))
        for row in chosen
    ]


def _outermost(rows: Sequence[OuterRow], kept: int, sign: int) -> list[OuterRow]:
    return sorted(rows, key=lambda row: (-sign * row.projection, row.prompt, row.position))[:kept]
