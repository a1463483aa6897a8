from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from math import comb, prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from storage.certificate import Certificate, certify, measure
from storage.order import BatchOrder, EpochOrder, ReadState
from storage.reader import ShardReader
from storage.shuffle import window_places
from tests.unit.storage.stores import ID, write_store

ORDER = BatchOrder(seed=3, batch_rows=48, pool_rows=96, lanes=8)


def test_pairs_and_prompts_equal_a_count_by_hand(tmp_path: Path):
    write_store(tmp_path)
    reader = ShardReader(tmp_path, ID)
    certificate = certify(reader, ORDER)
    batches = [batch.prompt.tolist() for batch in reader.epoch(ORDER)]
    pairs = sum(a == b for batch in batches for a, b in combinations(batch, 2))
    expected = 10 * comb(48, 2) * 4 / 479
    assert certificate.batches == len(batches) == 10
    assert certificate.pair_ratio == pytest.approx(pairs / expected)
    assert certificate.standard_error == pytest.approx(expected**-0.5)
    assert certificate.distinct_prompts == pytest.approx(np.mean([len(set(batch)) for batch in batches]))
    assert certificate.distinct_prompts_uniform == pytest.approx(96 * (1 - comb(475, 48) / comb(480, 48)))
    assert certificate.passed
    assert certificate.to_json()["order"] == {"seed": 3, "batch_rows": 48, "pool_rows": 96, "lanes": 8}


def test_a_uniform_shuffle_has_ratio_one_within_its_error():
    prompts = np.random.default_rng(0).permutation(np.repeat(np.arange(5000), 20))
    certificate = measure(np.split(prompts, 100), order=BatchOrder(0, 1000, 1, 1), n_rows=100_000, positions=20)
    assert abs(certificate.pair_ratio - 1) < 3 * certificate.standard_error
    assert certificate.distinct_prompts == pytest.approx(certificate.distinct_prompts_uniform, rel=5e-3)


def test_rows_left_in_prompt_order_fail():
    prompts = np.repeat(np.arange(5000), 20)
    certificate = measure(np.split(prompts, 100), order=BatchOrder(0, 1000, 1, 1), n_rows=100_000, positions=20)
    assert certificate.pair_ratio > 50
    assert not certificate.passed


@pytest.mark.parametrize(("n_rows", "passed"), [(7_999_999, True), (8_000_000, False)])
def test_only_small_stores_may_be_excused_by_noise(n_rows: int, passed: bool):
    certificate = Certificate(1.2, 0.1, 1, 1, 1, n_rows, 10, ORDER)
    assert certificate.passed is passed
    assert not replace(certificate, standard_error=0.04).passed
    assert replace(certificate, pair_ratio=0.951).passed


@lru_cache(maxsize=1)
def stored_ids(windows: int, prompts: int, positions: int) -> npt.NDArray[np.int32]:
    """The prompt number of each of a large store's rows."""
    stored = np.empty((windows, prompts * positions), np.int32)
    for window in range(windows):
        numbers = np.arange(prompts)[:, None] + window * prompts
        stored[window][window_places(1, window, prompts, positions)] = numbers
    return stored.reshape(-1)


def prompts_by_ids(
    order: BatchOrder, windows: int, prompts: int, positions: int, c: int
) -> Iterator[npt.NDArray[np.int32]]:
    """The prompt numbers of a large store's batches, from its ids alone."""
    stored = stored_ids(windows, prompts, positions)
    epoch = EpochOrder(order, len(stored) // c, c, 0)
    lanes = [
        (lane, np.concatenate([lane.stage_order(t) for t in range(lane.last_stage + 1)])) for lane in epoch.lanes()
    ]
    for number in range(epoch.n_batches):
        parts: list[npt.NDArray[np.int32]] = []
        for lane, rows in lanes:
            places, row = lane.locate(rows[slice(*epoch.lane_span(lane, number))])
            parts.append(stored[lane.chunks[places] * c + row])
        yield np.concatenate(parts)


@pytest.mark.parametrize(
    ("prompts", "c", "pool_chunks"),
    [(2048, 64, 20), (16_384, 256, 20), (16_384, 256, 60), (16_384, 256, 500)],  # 1.0M rows, and 8.3M
)
def test_any_pool_allowed_mixes_a_large_store_nearly_uniformly(prompts: int, c: int, pool_chunks: int):
    windows, positions = 4, 127
    order = BatchOrder(seed=5, batch_rows=4096, pool_rows=pool_chunks * c, lanes=8)
    batches = prompts_by_ids(order, windows, prompts, positions, c)
    certificate = measure(batches, order=order, n_rows=windows * prompts * positions, positions=positions)
    assert abs(certificate.pair_ratio - 1) <= 0.05  # also below 8M rows, where 4 standard errors are less
    assert certificate.passed
    assert certificate.standard_error < 0.005


@pytest.mark.parametrize("max_batches", [1, 4, 9])
def test_a_part_of_the_epoch_is_enough_and_is_spread_over_it(tmp_path: Path, max_batches: int):
    write_store(tmp_path)
    reader = ShardReader(tmp_path, ID)
    order = replace(ORDER, batch_rows=8)
    starts: list[int] = []

    class Watched:
        n_rows, positions = reader.n_rows, reader.positions
        batches_per_epoch = reader.batches_per_epoch

        def prompts(self, order: BatchOrder, *, start: ReadState) -> Iterator[npt.NDArray[np.int32]]:
            for prompts in reader.prompts(order, start=start):
                starts.append(start.batch)
                start = ReadState(0, start.batch + 1)
                yield prompts

    whole = list(reader.prompts(order))
    certificate = certify(Watched(), order, max_batches=max_batches)
    assert len(set(starts)) == len(starts) == certificate.batches == max_batches
    assert abs(np.mean(starts) - 29.5) < 60 / 16
    assert certificate == measure(
        (whole[k] for k in starts), order=order, n_rows=reader.n_rows, positions=reader.positions
    )


@pytest.mark.parametrize("n_rows", [127_000, 2_000_000_000 // 127 * 127])
def test_distinct_prompts_of_a_uniform_shuffle_at_any_size(n_rows: int):
    absent = prod(Fraction(n_rows - 4096 - i, n_rows - i) for i in range(127))
    expected = float(n_rows // 127 * (1 - absent))
    found = measure([np.arange(4096)], order=BatchOrder(0, 4096, 1, 1), n_rows=n_rows, positions=127)
    assert found.distinct_prompts_uniform == pytest.approx(expected, rel=1e-9)
