"""A bounded folder of chunks read from remotes: a file a chunk, with its checksum behind it as in the shard.

Every epoch reads every chunk once, in another order, so there is no use in evicting one chunk of an artifact for
another: what was kept first is kept, and a cache of a fraction of the bytes saves that fraction of the requests
(the least recently used one would save about half its square). Other artifacts' chunks, the longest unused first, make
room. A file is a whole one or none (renamed), and is checked like the remote's own bytes when it is read, so nothing
is fsynced. Processes that share the folder may overshoot the limit by what they write meanwhile.
"""

import os
import shutil
import threading
from pathlib import Path

from storage.errors import ConfigError

FOLDER_NAME = ".chunks"
VARIABLE = "SPARSEMILL_CACHE_GIB"
_DEFAULT_GIB = 8.0


class ChunkCache:
    """Chunks of one artifact.

    Args:
        root: the folder that all artifacts' caches share.
        name: of the artifact's; its manifest's sha256.
        limit_bytes: of all of them together; 0 keeps nothing.
    """

    def __init__(self, root: Path, name: str, limit_bytes: int):
        self._root = root
        self._folder = root / name
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._sizes = {entry.name: _tree_bytes(Path(entry)) for entry in os.scandir(root)} if root.is_dir() else {}
        if limit_bytes:
            self._folder.mkdir(parents=True, exist_ok=True)
            os.utime(self._folder)  # used now

    def has(self, chunk: int) -> bool:
        """Whether a chunk is here."""
        return (self._folder / str(chunk)).exists()

    def get(self, chunk: int) -> memoryview | None:
        """A chunk's bytes as they were put, if they are here."""
        try:
            return memoryview((self._folder / str(chunk)).read_bytes())
        except OSError:
            return None

    def put(self, chunk: int, data: memoryview) -> None:
        """Keeps a chunk, if there is room for it; a disk that is full is no error."""
        with self._lock:
            if not self._make_room(len(data)):
                return
            self._sizes[self._folder.name] = self._sizes.get(self._folder.name, 0) + len(data)
        temporary = self._folder / f"{chunk}.{os.getpid()}-{threading.get_ident()}"
        try:
            temporary.write_bytes(data)
            temporary.replace(self._folder / str(chunk))
        except OSError:
            temporary.unlink(missing_ok=True)

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
            total += path.stat().st_size
        except OSError:  # removed by another process meanwhile
            continue
    return total
