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
def test_rows_that_come_in_for_a_stage_go_no_further_than_it_says_and_there_is_memory_for_that(epoch: EpochOrder):
    size = epoch.order.batch_rows // epoch.order.lanes
    lanes = epoch.lanes()
    for lane in lanes:
        order = np.concatenate([lane.stage_order(stage) for stage in range(lane.last_stage + 1)])
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        before = 0
        for stage in range(lane.last_stage + 1 if lane.n_rows else 0):
            end, start, reach = lane.stage_rows(stage)[1], lane.stage_start(stage), lane.reach(stage)
            came_in = place[before:end]
            assert came_in.size == 0 or start <= came_in.min() <= came_in.max() < reach
            assert (reach - 1) // size - start // size < epoch.held_batches(lanes)
            before = end
        assert before == lane.n_rows


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
