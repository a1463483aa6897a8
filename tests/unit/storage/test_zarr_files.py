import google_crc32c
import numpy as np
import pytest

from storage.errors import ConfigError
from storage.zarr_files import ShardedArray, crc32c


def array(columns: int | None = 3) -> ShardedArray:
    return ShardedArray("a", np.dtype("<f4"), 24, 12, 4, columns)


def test_crc32c_of_the_standard_check_value():
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283


def test_crc32c_of_a_writable_array():
    data = np.arange(100, dtype=np.float32)
    assert crc32c(data) == google_crc32c.value(data.tobytes())


@pytest.mark.parametrize("columns", [None, 3])
def test_a_shard_is_as_long_as_promised_and_ends_with_the_index(columns: int | None):
    a = array(columns)
    rows = np.random.default_rng(0).standard_normal((12, *a.row_shape)).astype("<f4")
    pieces, checksums = a.shard_pieces(rows)
    data = b"".join(bytes(np.ascontiguousarray(piece).tobytes()) for piece in pieces)
    assert len(data) == a.shard_bytes
    assert data.endswith(a.index)
    assert len(checksums) == a.chunks_per_shard == 3


def test_names_of_shards_follow_zarrs_default_chunk_keys():
    assert array().shard_name(17) == "a/c/17/0"
    assert array(None).shard_name(17) == "a/c/17"


def test_rows_of_another_shape_or_dtype_are_refused():
    with pytest.raises(ConfigError):
        array().shard_pieces(np.zeros((12, 4), "<f4"))
    with pytest.raises(ConfigError):
        array().shard_pieces(np.zeros((12, 3), "<f2"))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError):
        ShardedArray("a", np.dtype("<f4"), 24, 12, 5)
    with pytest.raises(ConfigError):
        ShardedArray("a", np.dtype("<f4"), 25, 12, 4)
