"""Chunks of an activation store that lies in a remote, read in ranges, ahead of their use, and checked like files.

Activations are nearly all of a store's bytes: a chunk of them is one range request with its trailing crc32c, which must
agree with its bytes and with the ``checksum`` array. The small arrays (where each row comes from, checksums) are
fetched whole, a window at a time, and checked by their sha256. ``expect`` starts requests for chunks that will be
wanted, some dozens at a time; neighbours in a shard become one request. Chunks that were read are kept in a bounded
folder (storage.chunk_cache). Cost: memory for the chunks on their way.
Rejected: fetching whole shards for the chunks in them (a shuffled order would fetch each several times, or need room
for all of them: that is what pulling is for).
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from storage.artifact import Artifact, Origin
from storage.chunk_cache import FOLDER_NAME, ChunkCache, cache_limit
from storage.chunks import ChunkFiles
from storage.shards import Layout
from storage.zarr_files import CRC_BYTES, crc32c

_REQUESTS_AT_ONCE = 32
_REQUEST_BYTES = 1 << 23  # neighbours are asked for together up to this
_KEPT_BYTES = 1 << 28
_STREAMED = "activations"


class RemoteChunks:
    """Reads chunks of a store's arrays from where they are; safe to use from several threads.

    Args:
        artifact: borrowed from a remote.
        origin: of the artifact.
        layout: of its store.
        group: folder of the Zarr group within it.
    """

    def __init__(self, artifact: Artifact, origin: Origin, layout: Layout, group: str):
        self.artifact_id = artifact.id
        self.arrays = layout.arrays()
        self._artifact = artifact
        self._origin = origin
        self._group = group
        own = {name.removeprefix(f"{group}/"): record for name, record in artifact.manifest.files.items()}
        self._files = ChunkFiles(artifact.folder / group, self.arrays, artifact.id, own)
        self._array = self.arrays[_STREAMED]
        self._stride = self._array.chunk_bytes + CRC_BYTES
        folder = artifact.folder.parents[2] / FOLDER_NAME
        self._cache = ChunkCache(
            folder,
            artifact.manifest_sha256,
            cache_limit(),
            chunk_bytes=self._array.chunk_bytes,
            chunks_per_file=self._array.chunks_per_shard,
        )
        self._requests = ThreadPoolExecutor(_REQUESTS_AT_ONCE, "sparsemill-remote")
        self._coming: dict[int, Future[dict[int, memoryview]]] = {}
        self._lock = threading.Lock()
        self._fetching = threading.Lock()
        self._windows: set[int] = set()

    def check_listing(self) -> None:
        """Compares the manifest's shards with the layout's; the remote itself is not listed."""
        for array in self.arrays.values():
            for shard in range(array.n_shards):
                name = f"{self._group}/{array.shard_name(shard)}"
                record = self._artifact.manifest.files.get(name)
                if record is None or record.bytes != array.shard_bytes:
                    raise self._files.corrupt(
                        array, shard, "the manifest has another", record, f"{array.shard_bytes} bytes"
                    )

    def expect(self, chunks: Sequence[int], names: Iterable[str]) -> None:
        """Starts to read chunks that will be loaded; neighbours in one request."""
        if _STREAMED not in names:
            return
        with self._lock:
            for run in self._runs(sorted(set(chunks) - self._coming.keys())):
                request = self._requests.submit(self._read, run)
                self._coming.update(dict.fromkeys(run, request))
            while len(self._coming) > max(len(chunks), _KEPT_BYTES // self._stride):
                del self._coming[next(iter(self._coming))]  # expected by a reader that was closed, and never loaded

    def load(self, chunk: int, out: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Reads one chunk of each array that ``out`` names; see :meth:`read_into`."""
        for name, rows in out.items():
            self.read_into(name, chunk, rows)

    def read(self, name: str, chunk: int) -> npt.NDArray[np.generic]:
        """One chunk as a new array; see :meth:`read_into`."""
        array = self.arrays[name]
        out = np.empty((array.chunk_rows, *array.row_shape), array.dtype)
        self.read_into(name, chunk, out)
        return out

    def read_into(self, name: str, chunk: int, out: npt.NDArray[np.generic]) -> None:
        """Reads one chunk.

        Args:
            name: of the array.
            chunk: number of the chunk in the array.
            out: (chunk_rows, *row_shape), C-contiguous, of the array's dtype; overwritten.

        Raises:
            CorruptArtifact: the remote's bytes are not those that were committed.
            RemoteError: the remote cannot be read.
        """
        window = chunk if name == "checksum" else chunk // self.arrays["checksum"].shard_rows
        self._need(window)
        if name != _STREAMED:
            self._files.read_into(name, chunk, out)
            return
        expected = self._files.expected(name, chunk)
        if self._cache.read_into(chunk, out) and crc32c(out) == expected:
            return
        data = self._take(chunk)
        found = self._copy(data, out)
        if found != expected:
            shard, inner = divmod(chunk, self._array.chunks_per_shard)
            what = f"chunk {inner} of the remote's is not the one that was written there"
            raise self._files.corrupt(self._array, shard, what, found, f"crc32c {expected:08x}")
        self._cache.put(chunk, data)

    def _need(self, window: int) -> None:
        """Sees to it that a window's small arrays are here."""
        if window in self._windows:
            return
        with self._fetching:
            small = [array for array in self.arrays.values() if array.name != _STREAMED]
            self._origin.fetch(self._artifact, [f"{self._group}/{array.shard_name(window)}" for array in small])
            self._windows.add(window)

    def _take(self, chunk: int) -> memoryview:
        with self._lock:
            request = self._coming.pop(chunk, None)
        return (self._read([chunk]) if request is None else request.result())[chunk]

    def _read(self, run: Sequence[int]) -> dict[int, memoryview]:
        """Chunks that are neighbours, each with its checksum, in one request."""
        shard, inner = divmod(run[0], self._array.chunks_per_shard)
        name = f"{self._group}/{self._array.shard_name(shard)}"
        data = memoryview(self._origin.read_range(self._artifact, name, inner * self._stride, len(run) * self._stride))
        return {chunk: data[i * self._stride : (i + 1) * self._stride] for i, chunk in enumerate(run)}

    def _runs(self, chunks: Sequence[int]) -> list[list[int]]:
        """Those that are not kept here, neighbours of one shard together."""
        longest = max(1, _REQUEST_BYTES // self._stride)
        runs: list[list[int]] = []
        for chunk in chunks:
            if self._cache.has(chunk):
                continue
            follows = bool(runs) and runs[-1][-1] == chunk - 1 and chunk % self._array.chunks_per_shard != 0
            if follows and len(runs[-1]) < longest:
                runs[-1].append(chunk)
            else:
                runs.append([chunk])
        return runs

    def _copy(self, data: memoryview, out: npt.NDArray[np.generic]) -> int | None:
        """Copies a chunk to its place; its crc32c, or None where its own checksum says that it is damaged."""
        if len(data) != self._stride:
            return None
        out.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8, self._array.chunk_bytes)
        found = crc32c(out)
        return found if found == int.from_bytes(data[-CRC_BYTES:], "little") else None
