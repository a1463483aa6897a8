from itertools import chain

import numpy as np
import pytest

from storage.errors import ConfigError
from storage.order import BatchOrder, EpochOrder, LaneOrder, ReadState
from storage.shuffle import Indices

ORDER = BatchOrder(seed=1, batch_rows=24, pool_rows=400, lanes=8)
SIZES = [(100, 4), (7, 4), (23, 3), (1, 1), (333, 7), (50, 4), (1000, 8), (24, 16), (21, 20)]


def epoch(n_chunks: int = 1000, chunk_rows: int = 8, order: BatchOrder = ORDER, number: int = 0) -> EpochOrder:
    return EpochOrder(order, n_chunks, chunk_rows, number)


def rows_of_lane(lane: LaneOrder) -> Indices:
    """The store's rows in the order in which a lane hands them out."""
    order = np.concatenate([lane.stage_order(stage) for stage in range(lane.last_stage + 1)])
    places, rows = lane.locate(order)
    return lane.chunks[places] * lane.chunk_rows + rows


def batches(of: EpochOrder, rank: int = 0, world: int = 1) -> list[list[int]]:
    lanes = [(lane, rows_of_lane(lane).tolist()) for lane in of.lanes(rank, world)]
    spans = [[(rows, *of.lane_span(lane, number)) for lane, rows in lanes] for number in range(of.n_batches)]
    return [list(chain.from_iterable(rows[start:end] for rows, start, end in parts)) for parts in spans]


@pytest.mark.parametrize(("n_chunks", "chunk_rows"), SIZES)
@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_each_row_comes_once_an_epoch(n_chunks: int, chunk_rows: int, lanes: int):
    order = BatchOrder(1, 24, max(20 * chunk_rows, 50), lanes)
    found = list(chain.from_iterable(batches(epoch(n_chunks, chunk_rows, order))))
    assert sorted(found) == list(range(n_chunks * chunk_rows))


@pytest.mark.parametrize(("n_chunks", "chunk_rows"), SIZES)
def test_all_batches_but_the_last_are_full_and_lanes_share_the_last_evenly(n_chunks: int, chunk_rows: int):
    of = epoch(n_chunks, chunk_rows)
    sizes = [len(batch) for batch in batches(of)]
    assert all(size == 24 for size in sizes[:-1])
    assert 0 < sizes[-1] <= 24
    shares = [end - start for start, end in (of.lane_span(lane, of.n_batches - 1) for lane in of.lanes())]
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_batches_of_one(world: int):
    whole = batches(epoch(333, 7))
    parts = [batches(epoch(333, 7), rank, world) for rank in range(world)]
    for number, batch in enumerate(whole):
        assert sorted(batch) == sorted(chain.from_iterable(part[number] for part in parts))


def test_ranks_share_the_chunks_but_for_those_that_do_not_go_round():
    chunks = [set(chain.from_iterable(lane.chunks.tolist() for lane in epoch(333, 7).lanes(r, 4))) for r in range(4)]
    assert set.union(*chunks) == set(range(333))
    assert sum(map(len, chunks)) <= 333 + 8


def test_the_order_depends_on_seed_and_epoch_only():
    base = batches(epoch())
    assert batches(epoch()) == base
    assert batches(epoch(number=1)) != base
    assert batches(epoch(order=BatchOrder(2, 24, 400, 8))) != base


@pytest.mark.parametrize(("n_chunks", "chunk_rows"), SIZES)
def test_a_stage_needs_only_the_rows_it_names(n_chunks: int, chunk_rows: int):
    order = BatchOrder(1, 24, 20 * chunk_rows, 8)
    for lane in epoch(n_chunks, chunk_rows, order).lanes():
        for stage in range(lane.last_stage + 1):
            first, end = lane.stage_rows(stage)
            rows = lane.stage_order(stage)
            assert rows.size == 0 or first <= rows.min() <= rows.max() < end


def test_memory_is_two_to_two_and_a_half_times_the_pool():
    held = [
        lane.held_rows
        for n_chunks in range(20_000, 22_000, 77)
        for lane in epoch(n_chunks, 8, BatchOrder(1, 24, 8 * 1200, 8)).lanes()
    ]
    assert 2 * 1200 <= min(held) < max(held) < 2.5 * 1200
    assert all(lane.held_rows == lane.n_rows for lane in epoch(1000, 8, BatchOrder(1, 24, 8 * 1200, 8)).lanes())


def test_the_pool_is_full_before_each_stage_but_the_last():
    lane = epoch(2000, 8).lanes()[3]
    handed_out = 0
    for stage in range(lane.last_stage):
        came_in = lane.stage_rows(stage)[1]
        assert came_in == lane.pool_rows + stage * lane.segment_rows
        assert came_in - handed_out == lane.pool_rows
        handed_out += len(lane.stage_order(stage))


def test_a_small_store_is_one_stage():
    for lane in epoch(10, 4, BatchOrder(1, 24, 4, 8)).lanes():
        assert lane.last_stage == 0


def same_chunk_rate(lane: LaneOrder, stages: range) -> float:
    """Chance that two rows of one stage share a chunk, over all stages given."""
    same = pairs = 0.0
    for stage in stages:
        counts = np.bincount(lane.locate(lane.stage_order(stage))[0])
        same += float((counts * (counts - 1)).sum())
        pairs += float(counts.sum() * (counts.sum() - 1))
    return same / pairs


def test_rows_of_a_chunk_meet_no_more_often_than_in_a_pool_shuffled_whole():
    c, m = 32, 32 * 24
    lane = EpochOrder(BatchOrder(4, 1, m, 1), 1000, c, 0).lanes()[0]
    assert lane.pool_rows == m
    whole = (c - 1) / (m - 1)
    steady = same_chunk_rate(lane, range(3, lane.last_stage))
    assert steady == pytest.approx((c / 3 - 1) / (m / 2), rel=0.1)
    assert steady < whole * 0.75
    assert same_chunk_rate(lane, range(1)) < whole * 1.1
    assert same_chunk_rate(lane, range(lane.last_stage, lane.last_stage + 1)) < whole * 1.1


def test_neighbours_in_a_stage_come_from_all_segments_that_it_mixes():
    c, m = 32, 32 * 24
    lane = EpochOrder(BatchOrder(4, 1, m, 1), 2000, c, 0).lanes()[0]
    places = [lane.locate(lane.stage_order(stage))[0] for stage in range(3, lane.last_stage)]
    alike = np.mean([(found[1:] == found[:-1]).mean() for found in places])
    assert alike == pytest.approx((c / 3 - 1) / (m / 2), rel=0.1)


def test_a_pool_of_fewer_than_twenty_chunks_is_refused_where_the_store_has_them():
    with pytest.raises(ConfigError, match="160"):
        epoch(20, 8, BatchOrder(1, 24, 159, 8))
    epoch(20, 8, BatchOrder(1, 24, 160, 8))
    epoch(19, 8, BatchOrder(1, 24, 1, 8))


@pytest.mark.parametrize(("batch_rows", "lanes"), [(25, 8), (0, 8), (8, 0), (-8, 8)])
def test_batches_must_be_multiples_of_lanes(batch_rows: int, lanes: int):
    with pytest.raises(ConfigError):
        BatchOrder(1, batch_rows, 100, lanes)


@pytest.mark.parametrize(("rank", "world"), [(0, 3), (2, 2), (-1, 2), (0, 16)])
def test_ranks_must_divide_lanes(rank: int, world: int):
    with pytest.raises(ConfigError):
        epoch().lanes(rank, world)


def test_states_are_ordered():
    assert ReadState(0, 5) < ReadState(1, 0) < ReadState(1, 2)
