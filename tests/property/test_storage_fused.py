"""The fused pass against numpy's cast and sums, over bit patterns of float32."""

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from storage.images import RunningSums, ShardImages
from storage.zarr_files import ShardedArray

LARGEST = float(np.finfo(np.float16).max)


def encode(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint16], RunningSums]:
    """The bits stored for rows, in their order, and their sums."""
    n, d = rows.shape
    array = ShardedArray("a", np.dtype("<f2"), n, n, 1, d)
    images, sums = ShardImages(array, 1), RunningSums.empty(d)
    images.encode_float16(np.arange(n), rows, sums)
    return images._chunks[0, :, 0].view(np.uint16).copy(), sums


@settings(max_examples=200, deadline=None)  # the first example may compile
@given(arrays.arrays(np.uint32, st.tuples(st.integers(1, 5), st.integers(1, 70))))
def test_every_value_that_a_half_can_hold_is_cast_as_numpy_casts_it(bits: npt.NDArray[np.uint32]):
    rows = bits.view(np.float32)
    rows = np.where(np.abs(rows) <= LARGEST, rows, np.float32(0.1)).astype(np.float32)  # false for NaN, too
    found, sums = encode(rows)
    np.testing.assert_array_equal(found, rows.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(sums.low, rows.min(0))
    np.testing.assert_array_equal(sums.high, rows.max(0))
    np.testing.assert_allclose(sums.total, rows.sum(0, dtype=np.float64), rtol=1e-12, atol=1e-300)
    assert sums.within(LARGEST)


def test_every_half_and_the_values_half_way_between_two():
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2
    near = np.concatenate([np.nextafter(between, np.float32(0)), between, np.nextafter(between, np.float32(1e9))])
    values = np.concatenate([halves, near, -halves, -near]).astype(np.float32)
    found, _ = encode(values[None])
    np.testing.assert_array_equal(found[0], values.astype(np.float16).view(np.uint16))


@settings(deadline=None)
@given(
    arrays.arrays(np.float32, (4, 9), elements=st.floats(-10, 10, width=32)),
    st.integers(0, 35),
    st.sampled_from([np.nan, np.inf, -np.inf, 65_520.0, -1e30]),
)
def test_a_value_that_a_half_cannot_hold_shows_in_the_sums(rows: npt.NDArray[np.float32], place: int, value: float):
    rows.reshape(-1)[place] = value
    _, sums = encode(rows)
    assert not sums.within(LARGEST)
