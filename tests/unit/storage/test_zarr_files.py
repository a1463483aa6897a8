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


def test_names_of_shards_follow_zarrs_default_chunk_keys():
    assert array().shard_name(17) == "a/c/17/0"
    assert array(None).shard_name(17) == "a/c/17"


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError):
        ShardedArray("a", np.dtype("<f4"), 24, 12, 5)
    with pytest.raises(ConfigError):
        ShardedArray("a", np.dtype("<f4"), 25, 12, 4)
