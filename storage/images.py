"""Shard files as they will lie on disk, in memory: filled row by row in any order, then sealed and written as they are.

The rows of a chunk stand together; behind them there is room for their crc32c, at a shard's end for its index. So a row
is copied once, to where it belongs in the file, and the file is written in one piece past the page cache: a harvest
writes more than memory holds, reads none of it again, and would otherwise pay for a copy and for fresh pages. Memory is
mapped once, its pages asked for as large ones, and used for window after window. Rejected: rows in one plain array and
files pieced together from its chunks (each file a copy, or dozens of unaligned writes).
"""

import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage import atomic
from storage.encoding import Floats
from storage.errors import ConfigError
from storage.fingerprint import sha256_pieces
from storage.manifest import FileRecord
from storage.zarr_files import CRC_BYTES, ShardedArray, crc32c


class RunningSums(NamedTuple):
    """Of rows taken in so far.

    Attributes:
        low: minimum, float32 (d,).
        high: maximum, float32 (d,).
        total: sum, float64 (d,).
    """

    low: Floats
    high: Floats
    total: npt.NDArray[np.float64]

    @staticmethod
    def empty(d_in: int) -> "RunningSums":
        """Of no rows."""
        low, high = np.full(d_in, np.inf, np.float32), np.full(d_in, -np.inf, np.float32)
        return RunningSums(low, high, np.zeros(d_in))

    def within(self, limit: float) -> bool:
        """Whether every value was a number from -limit to limit."""
        return bool(np.isfinite(self.total).all() and self.low.min() >= -limit and self.high.max() <= limit)


class ShardImages:
    """Some shards of one array.

    Args:
        array: which they are part of.
        n_shards: how many.
    """

    def __init__(self, array: ShardedArray, n_shards: int):
        self._array = array
        self.n_shards = n_shards
        self._stride = image_bytes(array)
        self._memory = mmap.mmap(-1, n_shards * self._stride)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        row_bytes = array.chunk_bytes // array.chunk_rows
        self._chunks = np.ndarray(
            (n_shards, array.chunks_per_shard, array.chunk_rows, *array.row_shape),
            array.dtype,
            buffer=self._memory,
            strides=(
                self._stride, array.chunk_bytes + CRC_BYTES, row_bytes, *[array.dtype.itemsize] * len(array.row_shape)
            ),
        )  # fmt: skip

    @property
    def n_rows(self) -> int:
        """Rows of all the shards."""
        return self.n_shards * self._array.shard_rows

    def put(self, places: npt.NDArray[np.integer], rows: npt.NDArray[np.generic]) -> None:
        """Copies rows to their places.

        Args:
            places: numbers of rows, counted through all the shards, int (n,).
            rows: (n, *row_shape), or what broadcasts to it, of the array's dtype.
        """
        if rows.dtype != self._array.dtype or rows.shape[1:] != self._array.row_shape:
            raise ConfigError("rows of another array", where=self._array.name, found=f"{rows.dtype} {rows.shape}")
        self._chunks[self._where(places)] = rows

    def encode_float16(self, places: npt.NDArray[np.integer], rows: Floats, sums: RunningSums) -> None:
        """Encodes rows as halves at their places, without looking whether they fit, and takes them into sums.

        Args:
            places: numbers of rows, counted through all the shards, int (n,).
            rows: float32 (n, d), C-contiguous.
            sums: added to; tell afterwards whether all values fitted.
        """
        from storage.fused import scatter_float16  # here, as numba takes half a second, and only harvests want it

        shard, chunk, row = self._where(places)
        strides = self._chunks.strides
        begin = (shard * strides[0] + chunk * strides[1] + row * strides[2]) // self._array.dtype.itemsize
        scatter_float16(rows, begin, np.frombuffer(self._memory, np.uint16), *sums)

    def _where(self, places: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.integer], ...]:
        chunk, row = np.divmod(places, self._array.chunk_rows)
        return (*np.divmod(chunk, self._array.chunks_per_shard), row)

    def seal(self, shard: int) -> npt.NDArray[np.uint32]:
        """Fills in a shard's checksums and index, once its rows are there; returns the crc32c of each chunk."""
        image = self._image(shard)
        checksums = np.array([crc32c(chunk) for chunk in self._chunks[shard]], "<u4")
        stride = self._array.chunk_bytes + CRC_BYTES
        for chunk, checksum in enumerate(checksums):
            end = (chunk + 1) * stride
            image[end - CRC_BYTES : end] = checksum.tobytes()
        image[self._array.shard_bytes - len(self._array.index) : self._array.shard_bytes] = self._array.index
        return checksums

    def write(self, path: Path, shard: int) -> FileRecord:
        """Writes a sealed shard's file, not yet durable; returns its size and sha256."""
        image, size = self._image(shard), self._array.shard_bytes
        atomic.write_aligned(path, image, size)
        return FileRecord(size, sha256_pieces([image[:size]]))

    def _image(self, shard: int) -> memoryview:
        return memoryview(self._memory)[shard * self._stride : (shard + 1) * self._stride]


def image_bytes(array: ShardedArray) -> int:
    """Memory of one shard's image: its file, rounded up to whole pages."""
    return -(-array.shard_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
