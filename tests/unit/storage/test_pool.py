from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.order import BatchOrder, EpochOrder, LaneOrder
from storage.pool import BatchMemory, ChunkSource, ForeseeingSource, LanePool, Share

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


class AtOnce(Executor):
    """Loads when it is asked to: what is read ahead is there before the batch that it was asked beside is looked at."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def epoch_of(n_chunks: int, pool_rows: int, batch_rows: int = 8) -> EpochOrder:
    return EpochOrder(BatchOrder(2, batch_rows, pool_rows, lanes=2), n_chunks, CHUNK_ROWS, epoch=0)


def row_numbers(lane: LaneOrder) -> npt.NDArray[np.int64]:
    """The lane's order worked out at once, without a pool."""
    places, rows = lane.locate(np.concatenate([lane.stage_order(stage) for stage in range(lane.last_stage + 1)]))
    return lane.chunks[places] * CHUNK_ROWS + rows


def parts_of(
    source: ChunkSource, epoch: EpochOrder, executor: Executor, first: int = 0
) -> Iterator[npt.NDArray[np.int32]]:
    """What the second lane gives to each batch, from ``first`` on."""
    (lane,) = epoch.lanes(1, 2)
    memory = BatchMemory(source, ["pair", "number"], epoch, [lane])
    share = Share(epoch.order.batch_rows // 2, 0, 0)
    for slot in range(memory.slots):
        memory.batch(slot, share.rows)["number"][:] = -1  # a row that does not come must not look like an older one
    pool = LanePool(source, lane, share, memory, executor, epoch.lane_span(lane, first)[0])
    for number in range(first, epoch.n_batches):
        start, end = epoch.lane_span(lane, number)
        pool.complete(start, end)
        found = memory.batch(number, end - start)
        numbers = found["number"].astype(np.int32)
        np.testing.assert_array_equal(found["pair"], np.stack([numbers, -numbers], axis=1))
        yield numbers


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 90), st.integers(80, 200), st.integers(1, 60), st.integers(0, 3), st.data())
def test_batches_hold_the_lanes_order_from_any_of_them_on(
    n_chunks: int, pool_rows: int, rows: int, threads: int, data: st.DataObject
):
    epoch = epoch_of(n_chunks, pool_rows, 2 * rows)
    first = data.draw(st.integers(0, epoch.n_batches - 1))
    with ThreadPoolExecutor(threads) if threads else AtOnce() as executor:
        found = list(parts_of(Numbered(), epoch, executor, first))
    np.testing.assert_array_equal(np.concatenate(found), row_numbers(epoch.lanes()[1])[first * rows :])


@pytest.mark.parametrize("n_chunks", [63, 73])  # the smallest last stage that there is, and the largest
def test_from_any_batch_of_an_epoch_of_five_stages(n_chunks: int):
    epoch = epoch_of(n_chunks, 80)
    lane = epoch.lanes()[1]
    assert lane.last_stage == 4
    for first in range(epoch.n_batches):
        found = np.concatenate(list(parts_of(Numbered(), epoch, AtOnce(), first)))
        np.testing.assert_array_equal(found, row_numbers(lane)[4 * first :])


def test_rows_of_a_shared_chunk_that_are_another_lanes_go_nowhere():
    epoch = epoch_of(99, 80)
    (lane,) = epoch.lanes(1, 2)
    assert lane.skipped_rows == 2
    np.testing.assert_array_equal(np.concatenate(list(parts_of(Numbered(), epoch, AtOnce()))), row_numbers(lane))


def test_a_source_that_wants_to_know_is_told_of_each_chunk_before_it_is_loaded():
    epoch, source = epoch_of(60, 90), Foreseeing()
    assert isinstance(source, ForeseeingSource)
    lane = epoch.lanes()[1]
    np.testing.assert_array_equal(np.concatenate(list(parts_of(source, epoch, AtOnce()))), row_numbers(lane))
    assert source.expected == source.loaded == lane.chunks.tolist()


def test_an_error_of_the_source_comes_with_the_batches_that_need_its_chunk():
    epoch = epoch_of(60, 90)
    lane = epoch.lanes()[1]
    with ThreadPoolExecutor(1) as executor:
        parts = parts_of(Numbered(fail_at=int(lane.chunks[-1])), epoch, executor)
        for _ in range(lane.segment_rows // 4):
            next(parts)
        with pytest.raises(RuntimeError, match="chunk"):
            list(parts)


def test_the_next_stage_is_loaded_while_one_is_handed_out():
    epoch, source = epoch_of(400, 160), Numbered()
    lane = epoch.lanes()[1]
    parts = parts_of(source, epoch, AtOnce())
    for number in range(lane.last_stage - 3):
        for _ in range(lane.segment_rows // 4):
            next(parts)
        assert len(source.loaded) * CHUNK_ROWS >= lane.stage_rows(number + 1)[1]
