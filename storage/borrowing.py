"""Artifacts that a remote has, opened from here: the manifest at once, files when something reads them.

A stage needs a parent's manifest to know its own id, and of its files only those that it reads: another autoencoder
needs the activations and the held-out prompts, not the text they came from. Files that were fetched stay in
``.pulled/<id>/<sha256 of the manifest>/`` of the store, where a pull of the whole artifact goes on from. With
``streams`` the chunks of activations are not fetched but read where they are (storage.remote_chunks).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from storage.artifact import Artifact, Problem
from storage.remote import RemoteStore, file_key
from storage.root import create_root
from storage.shared import read_manifest, read_pointer
from storage.transfers import Track, fetch, untracked, verify_remote

PULLED_NAME = ".pulled"
_WORTH_SHOWING_BYTES = 1 << 24


class Borrowing:
    """The artifacts of one remote as seen from one store; an ``Origin``.

    Args:
        remote: which has them.
        root: of the store.
        streams: whether activations are read where they are.
        track: shows progress of larger fetches.
    """

    def __init__(self, remote: RemoteStore, root: Path, *, streams: bool = False, track: Track = untracked):
        self.remote = remote
        self.root = root
        self.streams = streams
        self._track = track

    def __reduce__(self) -> tuple[object, ...]:
        return (_reopen, (self.remote, self.root.absolute(), self.streams))  # a worker shows no progress

    def find(self, artifact_id: str, manifest_sha256: str | None = None) -> Artifact | None:
        """The remote's artifact of an id, its manifest checked; None where it has none, or another than that wanted.

        Raises:
            CorruptArtifact: what it has is not what it should be.
            RemoteError: it cannot be read.
        """
        pointer = read_pointer(self.remote, artifact_id)
        if pointer is None or manifest_sha256 not in (None, pointer.manifest_sha256):
            return None
        manifest, _ = read_manifest(self.remote, artifact_id, pointer.manifest_sha256)
        folder = self.root / PULLED_NAME / artifact_id / pointer.manifest_sha256
        return Artifact(folder, manifest, pointer.manifest_sha256, self)

    def fetch(self, artifact: Artifact, names: Sequence[str]) -> None:
        """Fetches those of the files that are not here with their size."""
        records = artifact.manifest.files
        missing = [name for name in names if _size(artifact.folder / name) != records[name].bytes]
        if not missing:
            return
        create_root(self.root)
        total = sum(records[name].bytes for name in missing)
        track = self._track if total >= _WORTH_SHOWING_BYTES else untracked
        with track(f"fetch from {artifact.id}", total) as advance:
            fetch(artifact, missing, self.remote, advance)

    def read_range(self, artifact: Artifact, name: str, start: int, n_bytes: int) -> bytes:
        """A part of a file, unchecked."""
        return self.remote.read_range(file_key(artifact, name), start, n_bytes)

    def verify(self, artifact: Artifact, on_progress: Callable[[int, int], None] | None) -> list[Problem]:
        """Compares every file, in the remote, with the manifest; none is kept."""
        done = 0

        def advance(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            if on_progress is not None:
                on_progress(done, artifact.manifest.total_bytes)

        return verify_remote(artifact, self.remote, advance)


def _reopen(remote: RemoteStore, root: Path, streams: bool) -> Borrowing:
    return Borrowing(remote, root, streams=streams)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() and not path.is_symlink() else None
