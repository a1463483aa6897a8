from itertools import islice

import numpy as np
import pytest

from bench.orders import Natural, passes
from storage.certificate import measure
from storage.reader import BatchOrder

PROMPTS, L = 400, 16
ORDER = BatchOrder(seed=0, batch_rows=64, pool_rows=1024)
ROWS = Natural(np.zeros((PROMPTS * L, 1), np.float16), np.arange(PROMPTS) * 3, L, 1)


@pytest.mark.parametrize("pool_rows", [None, 1024])
def test_each_row_comes_once_an_epoch_and_epochs_differ(pool_rows: int | None):
    batches = passes(ROWS, ORDER, pool_rows)
    first, second = (np.concatenate(list(islice(batches, PROMPTS * L // 64))) for _ in range(2))
    assert np.array_equal(np.sort(first), np.arange(PROMPTS * L))
    assert np.array_equal(np.sort(second), np.arange(PROMPTS * L))
    assert not np.array_equal(first, second)


def test_without_a_pool_a_batch_is_whole_prompts_and_a_pool_mixes_them():
    def pair_ratio(pool_rows: int | None) -> float:
        batches = [batch // L for batch in islice(passes(ROWS, ORDER, pool_rows), 100)]
        return measure(batches, order=ORDER, n_rows=PROMPTS * L, positions=L).pair_ratio

    # Of 64 rows 4 prompts of 16: each row has 15 of the 63 others, a uniform shuffle's 15 of 6,399.
    assert pair_ratio(None) == pytest.approx((PROMPTS * L - 1) / 63)
    assert 1 < pair_ratio(1024) < pair_ratio(None) / 4


def test_a_row_is_found_by_its_token():
    assert ROWS.numbers(np.array([0, 6, 1197], np.int32), np.array([1, 4, 16], np.int32)).tolist() == [0, 35, 6399]
