import hashlib
import mmap
from pathlib import Path

import numpy as np
import pytest

from storage.errors import ConfigError
from storage.images import ShardImages, image_bytes
from storage.zarr_files import ShardedArray, crc32c


def array(columns: int | None = 3, dtype: str = "<f4") -> ShardedArray:
    return ShardedArray("a", np.dtype(dtype), 24, 12, 4, columns)


@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("dtype", ["<f4", "<f2", "u1"])
def test_a_file_is_its_chunks_each_with_its_crc32c_then_the_index(tmp_path: Path, columns: int | None, dtype: str):
    a = array(columns, dtype)
    rows = (np.random.default_rng(0).standard_normal((24, *a.row_shape)) * 50).astype(dtype)
    images = ShardImages(a, 2)
    order = np.random.default_rng(1).permutation(24)
    for part in np.split(order, 4):
        images.put(part, rows[part])
    for shard in (1, 0):
        checksums = images.seal(shard)
        record = images.write(tmp_path / str(shard), shard)
        chunks = rows[shard * 12 : shard * 12 + 12].reshape(3, 4, *a.row_shape)
        expected = b"".join(chunk.tobytes() + crc32c(chunk).to_bytes(4, "little") for chunk in chunks) + a.index
        data = (tmp_path / str(shard)).read_bytes()
        assert data == expected
        assert len(data) == a.shard_bytes == record.bytes
        assert record.sha256 == hashlib.sha256(data).hexdigest()
        assert checksums.tolist() == [crc32c(chunk) for chunk in chunks]


def test_images_filled_again_hold_the_new_rows(tmp_path: Path):
    a = array()
    images = ShardImages(a, 1)
    for value in (1, 2):
        images.put(np.arange(12), np.full((12, 3), value, "<f4"))
        images.seal(0)
        images.write(tmp_path / "f", 0)
    fresh = ShardImages(a, 1)
    fresh.put(np.arange(12), np.full((12, 3), 2, "<f4"))
    fresh.seal(0)
    assert fresh.write(tmp_path / "g", 0) == images.write(tmp_path / "f", 0)


def test_an_image_takes_whole_pages():
    assert image_bytes(array()) == mmap.PAGESIZE
    assert (
        image_bytes(ShardedArray("a", np.dtype("<f4"), 1024, 1024, 1024)) == 2 * mmap.PAGESIZE
    )  # a page, and 24 bytes


def test_rows_of_another_shape_or_dtype_are_refused():
    with pytest.raises(ConfigError):
        ShardImages(array(), 1).put(np.arange(12), np.zeros((12, 4), "<f4"))
    with pytest.raises(ConfigError):
        ShardImages(array(), 1).put(np.arange(12), np.zeros((12, 3), "<f2"))
