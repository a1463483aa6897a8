"""A bounded folder of chunks read from remotes: a sparse file a shard, each chunk in a place of its own in it.

Every epoch reads every chunk once, in another order, so there is no use in evicting one chunk of an artifact for
another: what was kept first is kept, and a cache of a fraction of the bytes saves that fraction of the requests
(the least recently used one would save about half its square). Other artifacts' chunks, the longest unused first, make
room. A place begins with a page; a chunk lies there with its checksum behind it as in the shard, which is 0 where
nothing was written. What was written in part, or meanwhile, is found out by its checksum, so nothing is fsynced or
renamed. Processes that share the folder may overshoot the limit by what they write meanwhile.
Rejected: a file a chunk (to make and rename one takes as long as to write a megabyte).
"""

import os
import shutil
import threading
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from storage.errors import ConfigError
from storage.zarr_files import CRC_BYTES

FOLDER_NAME = ".chunks"
VARIABLE = "SPARSEMILL_CACHE_GIB"
_DEFAULT_GIB = 8.0
_PAGE_BYTES = 4096


class ChunkCache:
    """Chunks of one artifact.

    Args:
        root: the folder that all artifacts' caches share.
        name: of the artifact's; its manifest's sha256.
        limit_bytes: of all of them together, in whole pages a chunk; 0 keeps nothing.
        chunk_bytes: size of a chunk, without its checksum.
        chunks_per_file: how many neighbours share a file.
    """

    def __init__(self, root: Path, name: str, limit_bytes: int, *, chunk_bytes: int, chunks_per_file: int):
        self._root = root
        self._folder = root / name
        self._limit = limit_bytes
        self._chunk_bytes = chunk_bytes
        self._chunks_per_file = chunks_per_file
        self._place_bytes = -(-(chunk_bytes + CRC_BYTES) // _PAGE_BYTES) * _PAGE_BYTES
        self._lock = threading.Lock()
        self._sizes = {entry.name: _tree_bytes(Path(entry)) for entry in os.scandir(root)} if root.is_dir() else {}
        if limit_bytes:
            self._folder.mkdir(parents=True, exist_ok=True)
            os.utime(self._folder)  # used now

    def has(self, chunk: int) -> bool:
        """Whether a chunk seems to be here; reading it tells."""
        stored = bytearray(CRC_BYTES)
        return self._read(chunk, [stored], self._chunk_bytes) == CRC_BYTES and any(stored)

    def read_into(self, chunk: int, out: npt.NDArray[np.generic]) -> bool:
        """Reads what is kept for a chunk, which is not checked; whether there was as much as a chunk."""
        return self._read(chunk, [cast("bytearray", out)], 0) == self._chunk_bytes

    def put(self, chunk: int, data: memoryview) -> None:
        """Keeps a chunk, its checksum behind it, if there is room for it; a disk that is full is no error."""
        with self._lock:
            if not self._make_room(self._place_bytes):
                return
            self._sizes[self._folder.name] = self._sizes.get(self._folder.name, 0) + self._place_bytes
        path, place = self._place(chunk)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.pwrite(file, data, place)
            finally:
                os.close(file)
        except OSError:
            return

    def _place(self, chunk: int) -> tuple[Path, int]:
        number, place = divmod(chunk, self._chunks_per_file)
        return self._folder / str(number), place * self._place_bytes

    def _read(self, chunk: int, buffers: list[bytearray], offset: int) -> int:
        path, place = self._place(chunk)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.preadv(file, buffers, place + offset)
            finally:
                os.close(file)
        except OSError:
            return 0

    def _make_room(self, n_bytes: int) -> bool:
        while sum(self._sizes.values()) + n_bytes > self._limit:
            others = [self._root / name for name in self._sizes if name != self._folder.name]
            if not others:
                return False
            oldest = min(others, key=lambda path: path.stat().st_mtime if path.exists() else 0)
            shutil.rmtree(oldest, ignore_errors=True)
            del self._sizes[oldest.name]
        return True


def cache_limit() -> int:
    """Bytes that chunks of remotes may take on this disk: SPARSEMILL_CACHE_GIB, or 8 GiB."""
    text = os.environ.get(VARIABLE, "")
    try:
        gib = float(text) if text else _DEFAULT_GIB
    except ValueError:
        gib = -1.0
    if not 0 <= gib < 1 << 20:
        raise ConfigError("not a size", where=VARIABLE, found=repr(text), expected="a number of GiB, such as 8 or 0.5")
    return int(gib * 2**30)


def _tree_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:  # removed by another process meanwhile
            continue
    return total
