import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from storage.shuffle import permutations, prompt_order, random_bits, window_places


@pytest.mark.parametrize("n", [1, 2, 3, 127, 128, 129, 1000])
def test_each_row_is_a_permutation(n: int):
    result = permutations((20, n), 3, "test")
    np.testing.assert_array_equal(np.sort(result, axis=1), np.tile(np.arange(n), (20, 1)))


def test_nothing_can_be_permuted():
    assert permutations((0,), 3, "test").shape == (0,)


def test_permutations_of_four_are_uniform():
    result = permutations((24_000, 4), 5, "test")
    counts = np.unique(result, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


def test_seed_purpose_and_place_each_change_the_bits():
    arguments = [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1), (1, "a"), (-1, "a", 0)]
    assert len({random_bits((4,), seed, *place).tobytes() for seed, *place in arguments}) == len(arguments)


def test_bits_are_the_documented_philox_stream():
    # sha256(b'[1,"a",0]')[:16] as the key: a change of this stream would reorder every store that exists.
    import hashlib

    key = np.frombuffer(hashlib.sha256(b'[1,"a",0]').digest()[:16], "<u8")
    expected = np.random.Generator(np.random.Philox(key=key)).integers(0, 2**64, 6, dtype=np.uint64)
    np.testing.assert_array_equal(random_bits((2, 3), 1, "a", 0).reshape(-1), expected)


def test_another_process_computes_the_same_order():
    code = "from storage.shuffle import prompt_order; print(prompt_order(9, 50).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(prompt_order(9, 50).tolist())


def test_a_windows_rows_go_to_distinct_places():
    places = window_places(1, 2, 16, 5)
    assert sorted(places.reshape(-1).tolist()) == list(range(80))


def test_each_shard_of_a_window_holds_one_row_of_each_prompt():
    columns = window_places(1, 2, 16, 5) // 16
    np.testing.assert_array_equal(np.sort(columns, axis=1), np.tile(np.arange(5), (16, 1)))


def test_shard_and_place_in_it_are_uniform_and_independent():
    places = np.stack([window_places(1, window, 4, 3) for window in range(6000)])
    counts = np.bincount(places[:, 1, 2], minlength=12)
    assert stats.chisquare(counts).pvalue > 1e-4
    # Two prompts' rows at one position share a shard in a third of the windows.
    together = (places[:, 0, 0] // 4 == places[:, 1, 0] // 4).mean()
    assert abs(together - 1 / 3) < 4 * np.sqrt(2 / 9 / 6000)


def test_windows_differ():
    assert not np.array_equal(window_places(1, 0, 16, 5), window_places(1, 1, 16, 5))
