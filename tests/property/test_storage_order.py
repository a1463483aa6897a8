"""The reader's order over all sizes, from ids alone."""

from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.order import BatchOrder, EpochOrder, LaneOrder
from storage.shuffle import window_places

QUICK = settings(max_examples=60, deadline=None)


@st.composite
def epochs(draw: st.DrawFn) -> EpochOrder:
    lanes = draw(st.sampled_from([1, 2, 4, 6, 8]))
    n_chunks, chunk_rows = draw(st.integers(1, 150)), draw(st.integers(1, 9))
    least = 20 * chunk_rows if n_chunks >= 20 else 1
    pool_rows = least + draw(st.integers(0, 200))
    order = BatchOrder(draw(st.integers(0, 2**64)), lanes * draw(st.integers(1, 30)), pool_rows, lanes)
    return EpochOrder(order, n_chunks, chunk_rows, draw(st.integers(0, 3)))


def rows_of(lane: LaneOrder) -> list[int]:
    order = np.concatenate([lane.stage_order(stage) for stage in range(lane.last_stage + 1)])
    places, rows = lane.locate(order)
    return (lane.chunks[places] * lane.chunk_rows + rows).tolist()


@QUICK
@given(epochs())
def test_each_row_once_in_full_batches_and_an_even_rest(epoch: EpochOrder):
    lanes = epoch.lanes()
    rows = [rows_of(lane) for lane in lanes]
    assert sorted(chain.from_iterable(rows)) == list(range(epoch.n_chunks * epoch.chunk_rows))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    taken = [0] * len(lanes)
    for number in range(epoch.n_batches):
        spans = [epoch.lane_span(lane, number) for lane in lanes]
        assert [start for start, _ in spans] == taken
        taken = [end for _, end in spans]
        sizes = [end - start for start, end in spans]
        assert min(sizes) >= 0
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == epoch.order.batch_rows or number == epoch.n_batches - 1
        assert sum(sizes) > 0
    assert taken == [lane.n_rows for lane in lanes]


@QUICK
@given(epochs())
def test_what_a_stage_needs_fits_the_memory_it_is_promised(epoch: EpochOrder):
    for lane in epoch.lanes():
        for stage in range(lane.last_stage + 1):
            first, end = lane.stage_chunks(stage)
            places = lane.locate(lane.stage_order(stage))[0]
            assert end - first <= lane.held_chunks()
            assert places.size == 0 or (first <= places.min() and places.max() < end)


@QUICK
@given(epochs(), st.data())
def test_any_number_of_ranks_reads_the_lanes_of_one(epoch: EpochOrder, data: st.DataObject):
    divisors = [w for w in range(1, epoch.order.lanes + 1) if epoch.order.lanes % w == 0]
    world = data.draw(st.sampled_from(divisors))
    ranks = [epoch.lanes(rank, world) for rank in range(world)]
    for lane in epoch.lanes():
        other = ranks[lane.lane % world][lane.lane // world]
        assert rows_of(other) == rows_of(lane)


@QUICK
@given(st.integers(0, 2**32), st.integers(0, 9), st.integers(1, 12), st.integers(1, 12))
def test_a_window_is_shuffled_to_distinct_places_one_row_of_each_prompt_a_shard(
    seed: int, window: int, prompts: int, positions: int
):
    places = window_places(seed, window, prompts, positions)
    assert sorted(places.reshape(-1).tolist()) == list(range(prompts * positions))
    assert all(len(set(row)) == positions for row in (places // prompts).tolist())
