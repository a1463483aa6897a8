import sys
import threading

import google_crc32c
import numpy as np
import pytest

from storage import zarr_files
from storage.errors import ConfigError
from storage.zarr_files import ShardedArray, crc32c


def array(columns: int | None = 3) -> ShardedArray:
    return ShardedArray("a", np.dtype("<f4"), 24, 12, 4, columns)


def test_crc32c_of_the_standard_check_value():
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283


def test_crc32c_of_a_writable_array():
    data = np.arange(100, dtype=np.float32)
    assert crc32c(data) == google_crc32c.value(data.tobytes())


@pytest.mark.parametrize("n_bytes", [1, 65_535, 65_536, 3_000_001])
@pytest.mark.parametrize("native", [True, False])
def test_crc32c_of_any_size_however_it_is_called(n_bytes: int, native: bool, monkeypatch: pytest.MonkeyPatch):
    if not native:
        monkeypatch.setattr(zarr_files, "_native_crc32c", lambda: None)
    data = np.random.default_rng(0).integers(0, 256, n_bytes, np.uint8)
    data.flags.writeable = False
    assert crc32c(data) == google_crc32c.value(data.tobytes())


def test_crc32c_of_a_large_array_that_is_not_contiguous_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        crc32c(np.zeros((1000, 1000), np.uint8).T)


def test_other_threads_run_while_a_large_array_is_checked():
    data, begun, noticed = np.zeros(1 << 24, np.uint8), threading.Lock(), False
    begun.acquire()
    in_time: list[bool] = []

    def check() -> None:
        begun.release()
        rounds = 0
        while not noticed and rounds < 300:
            crc32c(data)
            rounds += 1
        in_time.append(noticed)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)  # no thread is made to let go
    try:
        thread = threading.Thread(target=check)
        thread.start()
        begun.acquire()
        noticed = True
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert in_time == [True]


def test_names_of_shards_follow_zarrs_default_chunk_keys():
    assert array().shard_name(17) == "a/c/17/0"
    assert array(None).shard_name(17) == "a/c/17"


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError):
        ShardedArray("a", np.dtype("<f4"), 24, 12, 5)
    with pytest.raises(ConfigError):
        ShardedArray("a", np.dtype("<f4"), 25, 12, 4)
