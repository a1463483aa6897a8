from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.order import BatchOrder, EpochOrder, LaneOrder
from storage.pool import ForeseeingSource, LanePool

CHUNK_ROWS = 4


@dataclass
class Format:
    row_shape: tuple[int, ...]
    dtype: np.dtype[np.generic]


class Numbered:
    """Chunks whose rows hold their own number in the store, in two columns and alone."""

    def __init__(self, fail_at: int | None = None):
        self.arrays = {"pair": Format((2,), np.dtype(np.int64)), "number": Format((), np.dtype(np.int32))}
        self.loaded: list[int] = []
        self._fail_at = fail_at

    def load(self, chunk: int, out: Mapping[str, npt.NDArray[np.generic]]) -> None:
        if chunk == self._fail_at:
            raise RuntimeError(f"chunk {chunk}")
        rows = np.arange(chunk * CHUNK_ROWS, (chunk + 1) * CHUNK_ROWS)
        out["pair"][:] = np.stack([rows, -rows], axis=1)
        out["number"][:] = rows
        self.loaded.append(chunk)


class Foreseeing(Numbered):
    """Notes what it is told; with one thread each chunk is loaded after it was expected."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: list[int] = []

    def expect(self, chunks: Sequence[int], names: Iterable[str]) -> None:
        assert list(names) == ["pair", "number"]
        self.expected += chunks

    def load(self, chunk: int, out: Mapping[str, npt.NDArray[np.generic]]) -> None:
        assert chunk in self.expected
        super().load(chunk, out)


def lane_of(n_chunks: int, pool_rows: int) -> LaneOrder:
    order = BatchOrder(seed=2, batch_rows=8, pool_rows=pool_rows, lanes=2)
    return EpochOrder(order, n_chunks, CHUNK_ROWS, epoch=0).lanes()[1]


def row_numbers(lane: LaneOrder) -> npt.NDArray[np.int64]:
    """The lane's order worked out at once, without a pool."""
    places, rows = lane.locate(np.concatenate([lane.stage_order(stage) for stage in range(lane.last_stage + 1)]))
    return lane.chunks[places] * CHUNK_ROWS + rows


def take(pool: LanePool, start: int, end: int) -> npt.NDArray[np.int32]:
    out = {"pair": np.empty((end - start, 2), np.int64), "number": np.empty(end - start, np.int32)}
    pool.take(start, end, out)
    np.testing.assert_array_equal(out["pair"], np.stack([out["number"], -out["number"]], axis=1))
    return out["number"]


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as executor:
        yield executor


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(80, 200), st.integers(1, 3), st.data())
def test_rows_come_in_the_lanes_order_however_they_are_taken(
    n_chunks: int, pool_rows: int, threads: int, data: st.DataObject
):
    lane = lane_of(n_chunks, pool_rows)
    cuts = data.draw(st.lists(st.integers(0, lane.n_rows), max_size=8).map(sorted))
    edges = [*cuts, lane.n_rows]
    with ThreadPoolExecutor(threads) as executor:
        pool = LanePool(Numbered(), lane, ["pair", "number"], executor)
        found = [take(pool, start, end) for start, end in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate([np.empty(0), *found]), row_numbers(lane)[edges[0] :])


def test_a_source_that_wants_to_know_is_told_of_each_chunk_before_it_is_loaded(executor: Executor):
    lane, source = lane_of(60, 90), Foreseeing()
    assert isinstance(source, ForeseeingSource)
    found = take(LanePool(source, lane, ["pair", "number"], executor), 0, lane.n_rows)
    np.testing.assert_array_equal(found, row_numbers(lane))
    assert source.expected == source.loaded == lane.chunks.tolist()


def test_an_error_of_the_source_comes_with_the_rows_that_need_its_chunk(executor: Executor):
    lane = lane_of(60, 90)
    pool = LanePool(Numbered(fail_at=int(lane.chunks[-1])), lane, ["pair", "number"], executor)
    take(pool, 0, lane.segment_rows)
    with pytest.raises(RuntimeError, match="chunk"):
        take(pool, lane.segment_rows, lane.n_rows)
