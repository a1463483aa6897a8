"""Chunks read straight from shard files, always checked, into memory that the caller owns.

A read is one ``preadv``: the chunk into its place, its trailing crc32c beside it. Three things must then agree: the
crc32c of the bytes read, the one stored behind them, and the one that the ``checksum`` array names for that chunk
(which catches swapped files). When a file is opened its size and its index are compared with what every shard of the
array has. Open files are kept, a few hundred at a time; a file's index is read once. Around a read are a few
microseconds of Python, beside 100 and more to copy 1 MiB. Rejected: memory maps (a read error is then a signal that
kills the process, and cold random access costs a fault per page); zarr-python, zarrs and tensorstore, which copy a
chunk once more (docs/performance.md compares them).
"""

import errno
import os
import resource
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from storage.errors import CorruptArtifact, repair_remedy
from storage.fingerprint import sha256_file
from storage.manifest import FileRecord
from storage.zarr_files import CRC_BYTES, ShardedArray, crc32c

_WORTH_FETCHING_BYTES = 1 << 16
_UNREADABLE = frozenset({errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})


class _OpenFile:
    """A descriptor closed when the last user lets go of it, so that the cache may drop files that are being read."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Place(NamedTuple):
    """Where an array's chunks and their checksums are."""

    array: ShardedArray
    chunks_per_shard: int
    stride: int  # bytes from chunk to chunk
    column: int  # of the table of checksums


class ChunkFiles:
    """Reads chunks of a store's arrays; safe to use from several threads, and cheap to pickle.

    Args:
        folder: of the Zarr group.
        arrays: its arrays by name, ``checksum`` among them.
        artifact_id: named in errors.
        records: the manifest's files, by name relative to the group, to check the ``checksum`` array against.
    """

    def __init__(
        self,
        folder: Path,
        arrays: Mapping[str, ShardedArray],
        artifact_id: str,
        records: Mapping[str, FileRecord] | None = None,
    ):
        self.folder = folder
        self._records = records
        self.arrays = arrays
        self.artifact_id = artifact_id
        self._places = {
            name: _Place(array, array.chunks_per_shard, array.chunk_bytes + CRC_BYTES, column)
            for column, (name, array) in enumerate(arrays.items())  # "checksum", the last, has no column
        }
        self._table_rows = arrays["checksum"].shard_rows
        self._lock = threading.Lock()
        self._open: dict[tuple[str, int], _OpenFile] = {}
        self._indexed: set[tuple[str, int]] = set()
        self._tables: dict[int, npt.NDArray[np.uint32]] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return (ChunkFiles, (self.folder, self.arrays, self.artifact_id, self._records))

    def check_listing(self) -> None:
        """Looks for shards that are missing, or are one too many, by listing each array's folder once.

        And at the size of each array's first: a layout is believed no further than there are bytes.
        """
        for array in self.arrays.values():
            folder = self.folder / array.name / "c"
            found = set(os.listdir(folder)) if folder.is_dir() else set[str]()  # noqa: PTH208  (names, 100,000s of them)
            expected = {str(shard) for shard in range(array.n_shards)}
            for shard in sorted(expected - found, key=int)[:1]:
                raise self.corrupt(array, int(shard), "it is missing", "no file", "a file")
            for name in sorted(found - expected)[:1]:
                raise CorruptArtifact(
                    f"{array.name} of {self.artifact_id} has a shard too many",
                    where=folder / name,
                    found=name,
                    remedy=repair_remedy(self.artifact_id),
                )
            self._check_size(array)

    def _check_size(self, array: ShardedArray) -> None:
        """Of the first shard, as the manifest has it: whether it is still so, reading it tells."""
        name = array.shard_name(0)
        record = None if self._records is None else self._records.get(name)
        try:
            size = (self.folder / name).stat().st_size if record is None else record.bytes
        except OSError as error:
            raise self._unreadable(array, 0, error) from error
        if size != array.shard_bytes:
            raise self.corrupt(array, 0, "it has another size", f"{size} bytes", f"{array.shard_bytes} bytes")

    def expect(self, chunks: Sequence[int], names: Iterable[str]) -> None:
        """Has the system begin to fetch chunks, unless the first is in memory; small ones come by themselves."""
        if not hasattr(os, "posix_fadvise"):
            return
        for place in (self._places[name] for name in names):
            if place.stride < _WORTH_FETCHING_BYTES or self._in_memory(place, chunks[0]):
                continue
            for chunk in chunks:
                shard, inner = divmod(chunk, place.chunks_per_shard)
                file = self._file(place.array, shard)  # held, or another thread might have it closed
                os.posix_fadvise(file.descriptor, inner * place.stride, place.stride, os.POSIX_FADV_WILLNEED)

    def _in_memory(self, place: _Place, chunk: int) -> bool:
        shard, inner = divmod(chunk, place.chunks_per_shard)
        file = self._file(place.array, shard)
        try:
            return os.preadv(file.descriptor, [bytearray(1)], inner * place.stride, os.RWF_NOWAIT) == 1
        except OSError:  # it would have to wait, or cannot tell
            return False

    def load(self, chunk: int, out: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Reads one chunk of each array that ``out`` names; see :meth:`read_into`."""
        for name, rows in out.items():
            self.read_into(name, chunk, rows)

    def read_into(self, name: str, chunk: int, out: npt.NDArray[np.generic]) -> None:
        """Reads one chunk.

        Args:
            name: of the array.
            chunk: number of the chunk in the array.
            out: (chunk_rows, *row_shape), C-contiguous, of the array's dtype; overwritten.

        Raises:
            CorruptArtifact: the shard is missing, short, damaged, or another one's; names artifact and shard.
        """
        place = self._places[name]
        shard, inner = divmod(chunk, place.chunks_per_shard)
        found = self._read(place, shard, inner, out)
        if name == "checksum":
            return
        expected = self.expected(name, chunk)
        if found != expected:
            what = f"chunk {inner} is not the one that was written there"
            raise self.corrupt(place.array, shard, what, f"{found:08x}", f"{expected:08x}")

    def expected(self, name: str, chunk: int) -> int:
        """The crc32c of the chunk that belongs at a place."""
        window, row = divmod(chunk, self._table_rows)
        return int(self._table(window)[row, self._places[name].column])

    def read(self, name: str, chunk: int) -> npt.NDArray[np.generic]:
        """One chunk as a new array; see :meth:`read_into`."""
        array = self.arrays[name]
        out = np.empty((array.chunk_rows, *array.row_shape), array.dtype)
        self.read_into(name, chunk, out)
        return out

    def corrupt(self, array: ShardedArray, shard: int, what: str, found: object, expected: object) -> CorruptArtifact:
        """The error that says what is wrong with a shard."""
        name = array.shard_name(shard)
        return CorruptArtifact(
            f"shard {name} of {self.artifact_id}: {what}",
            where=self.folder / name,
            found=found,
            expected=expected,
            remedy=repair_remedy(self.artifact_id),
        )

    def _read(self, place: _Place, shard: int, inner: int, out: npt.NDArray[np.generic]) -> int:
        array = place.array
        stored = bytearray(CRC_BYTES)
        file = self._file(array, shard)
        self._read_fully(array, shard, file, [cast("bytearray", out), stored], place.stride, inner * place.stride)
        found, trailing = crc32c(out), int.from_bytes(stored, "little")
        if found != trailing:
            raise self.corrupt(array, shard, f"chunk {inner} has another crc32c", f"{found:08x}", f"{trailing:08x}")
        return found

    def _read_fully(
        self, array: ShardedArray, shard: int, file: _OpenFile, buffers: Sequence[bytearray], n_bytes: int, offset: int
    ) -> None:
        done, rest = 0, cast("Sequence[bytearray | memoryview]", buffers)
        while done < n_bytes:
            try:
                count = os.preadv(file.descriptor, rest, offset + done)
            except OSError as error:
                raise self._unreadable(array, shard, error) from error
            if count == 0:
                raise self.corrupt(array, shard, "it ends early", f"{offset + done} bytes", array.shard_bytes)
            done += count
            if done < n_bytes:
                rest = _rest(buffers, done)

    def _file(self, array: ShardedArray, shard: int) -> _OpenFile:
        key = (array.name, shard)
        file = self._open.get(key)  # needs no lock: other threads only add and remove
        if file is None:
            file = self._open_checked(array, shard)
            with self._lock:
                self._open[key] = file
                self._indexed.add(key)
                while len(self._open) > _open_limit():
                    del self._open[next(iter(self._open))]
        return file

    def _open_checked(self, array: ShardedArray, shard: int) -> _OpenFile:
        try:
            file = _OpenFile(self.folder / array.shard_name(shard))
            size = os.fstat(file.descriptor).st_size
        except OSError as error:
            raise self._unreadable(array, shard, error) from error
        if size != array.shard_bytes:
            raise self.corrupt(array, shard, "it has another size", f"{size} bytes", f"{array.shard_bytes} bytes")
        if (array.name, shard) not in self._indexed:
            index = bytearray(len(array.index))
            self._read_fully(array, shard, file, [index], len(index), array.shard_bytes - len(index))
            if bytes(index) != array.index:
                raise self.corrupt(array, shard, "its index is damaged", index[:16].hex(), array.index[:16].hex())
        return file

    def _table(self, window: int) -> npt.NDArray[np.uint32]:
        table = self._tables.get(window)
        if table is None:
            table = cast("npt.NDArray[np.uint32]", self.read("checksum", window))
            self._check_record(self.arrays["checksum"], window)
            self._tables[window] = table
        return table

    def _check_record(self, array: ShardedArray, shard: int) -> None:
        if self._records is None:
            return
        name = array.shard_name(shard)
        record = self._records.get(name)
        found = sha256_file(self.folder / name)
        if record is None or record.sha256 != found:
            raise self.corrupt(array, shard, "its sha256 is not the manifest's", found, record and record.sha256)

    def _unreadable(self, array: ShardedArray, shard: int, error: OSError) -> Exception:
        if error.errno not in _UNREADABLE:
            return error
        return self.corrupt(array, shard, "it cannot be read", os.strerror(error.errno or 0), "a file")


def _rest(buffers: Sequence[bytearray], done: int) -> list[memoryview]:
    rest: list[memoryview] = []
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        rest += [view[done:]] if done < len(view) else []
        done = max(0, done - len(view))
    return rest


def _open_limit() -> int:
    return min(2048, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
