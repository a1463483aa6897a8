"""Pushing and pulling artifacts: plans that say what would move, and moving it, several files at a time, resumably.

*Push*: files, then the manifest, then the pointer, created only if there is none. A push that breaks off anywhere
leaves nothing that a reader sees; the next one skips files that are there with their size (they lie under the
manifest's sha256, and appeared only because their own was right). *Pull*: files into a folder of their manifest's own,
each renamed there once its sha256 was right; then one rename to where artifacts are. What a killed pull, or reading
from a remote (storage.borrowing), has fetched already is hashed again and kept. Cost: one listing, one request a file.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from storage import atomic
from storage.artifact import Artifact, Problem
from storage.errors import ArtifactNotFound, ConfigError, CorruptArtifact, RemoteConflict, RemoteError
from storage.fingerprint import sha256_file
from storage.manifest import MANIFEST_NAME, FileRecord
from storage.remote import OnBytes, RemoteStore, file_key, uncounted
from storage.shared import Pointer, read_pointer

FILES_AT_ONCE = 8
_SETTLING_SECONDS = 0.25

Track: TypeAlias = Callable[[str, int], AbstractContextManager[OnBytes]]
"""Shows progress: given a label and the bytes in all, a context in which bytes are reported."""


@contextmanager
def untracked(label: str, total_bytes: int) -> Generator[OnBytes]:  # noqa: ARG001
    """Shows nothing."""
    yield uncounted


@dataclass(frozen=True)
class Plan:
    """What moving an artifact would be.

    Attributes:
        artifact: which; of a pull, the remote's.
        missing: files that would move, by name.
        there: whether it is whole at the other end already, and nothing would.
    """

    artifact: Artifact
    missing: Mapping[str, FileRecord] = field(default_factory=dict[str, FileRecord])
    there: bool = False

    @property
    def bytes(self) -> int:
        """Bytes that would move."""
        return sum(record.bytes for record in self.missing.values())


def plan_push(artifact: Artifact, remote: RemoteStore) -> Plan:
    """What pushing an artifact would move.

    Raises:
        ConfigError: the remote takes no files.
        RemoteConflict: it has other bytes under this id.
    """
    if remote.read_only:
        raise ConfigError(
            "a web server takes no files", found=remote.shown, expected="s3://, gs://, az://, file:// or hf://"
        )
    if _is_there(artifact, remote):
        return Plan(artifact, there=True)
    sizes = remote.sizes(file_key(artifact, "").rstrip("/"))
    files = artifact.manifest.files
    return Plan(artifact, {name: record for name, record in files.items() if sizes.get(name) != record.bytes})


def push(plan: Plan, remote: RemoteStore, on_bytes: OnBytes = uncounted) -> None:
    """Pushes what a plan says, and makes the artifact visible.

    Raises:
        CorruptArtifact: a file here is not as it was committed; nothing became visible.
        RemoteConflict: someone else has pushed other bytes under this id meanwhile.
        RemoteError: the remote does not take it; the same push again goes on where it stopped.
    """
    artifact, manifest = plan.artifact, plan.artifact.manifest
    pointer = Pointer(artifact.id, artifact.manifest_sha256, len(manifest.files), manifest.total_bytes)
    if plan.there:
        remote.settle([pointer.key])  # whoever wrote it may have been killed before it did
        return
    together(lambda name: remote.put_file(artifact, name, _exclusively(on_bytes)), plan.missing)
    remote.put(file_key(artifact, MANIFEST_NAME), manifest.to_bytes())
    remote.settle(file_key(artifact, name) for name in (*manifest.files, MANIFEST_NAME))
    remote.create(pointer.key, pointer.to_bytes())
    time.sleep(_SETTLING_SECONDS)  # not every service makes two that create it at once agree by itself
    if not _is_there(artifact, remote):
        raise RemoteError("the remote has lost a pointer that it took", where=f"{remote.shown}/{pointer.key}")


def fetch(artifact: Artifact, names: Iterable[str], remote: RemoteStore, on_bytes: OnBytes = uncounted) -> None:
    """Fetches files into an artifact's folder, each checked as it comes.

    Raises:
        CorruptArtifact: the folder leads elsewhere.
        RemoteError: the remote cannot be read, or has other bytes; what has come is kept.
    """
    names = list(names)
    atomic.require_free(artifact.folder, sum(artifact.manifest.files[name].bytes for name in names))
    for parent in {(artifact.folder / name).parent for name in names}:
        atomic.make_folder(parent, durable=False)
        if not parent.resolve().is_relative_to(artifact.folder.resolve()):
            raise CorruptArtifact("a folder leads out of its artifact", where=parent, found=parent.resolve())
    advance = _exclusively(on_bytes)
    together(lambda name: remote.fetch_file(artifact, name, artifact.folder / name, advance), names)


def missing_files(artifact: Artifact) -> dict[str, FileRecord]:
    """Files that a folder of fetched ones lacks, by name; the others are hashed, and removed if they are wrong."""

    def lacks(name: str) -> bool:
        path, record = artifact.folder / name, artifact.manifest.files[name]
        if not path.is_symlink() and path.is_file():
            if path.stat().st_size == record.bytes and sha256_file(path) == record.sha256:
                return False
            atomic.remove_file(path)
        return True

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        found = dict(zip(artifact.manifest.files, pool.map(lacks, artifact.manifest.files), strict=True))
    return {name: record for name, record in artifact.manifest.files.items() if found[name]}


def verify_remote(artifact: Artifact, remote: RemoteStore, on_bytes: OnBytes = uncounted) -> list[Problem]:
    """Compares every file of an artifact in a remote with its manifest, keeping none of them."""
    problems: dict[str, Problem] = {}
    advance = _exclusively(on_bytes)

    def check(name: str) -> None:
        try:
            for _ in remote.file_pieces(artifact, name, advance):
                pass
        except RemoteError as error:
            if error.expected is None:  # it could not be read: nothing is known of its bytes
                raise
            problems[name] = Problem(name, "sha256", str(error.found), str(error.expected))
        except ArtifactNotFound:
            problems[name] = Problem(name, "missing", "no object", f"{artifact.manifest.files[name].bytes} bytes")

    together(check, artifact.manifest.files)
    return [problems[name] for name in artifact.manifest.files if name in problems]


def together(work: Callable[[str], object], names: Iterable[str]) -> None:
    """Runs ``work`` for several names at a time; after the first error starts no more, and raises it."""
    failed = threading.Event()

    def unless_failed(name: str) -> None:
        if failed.is_set():  # workers start while names are still being handed in
            return
        try:
            work(name)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(FILES_AT_ONCE, "sparsemill-transfer") as pool:
        futures = [pool.submit(unless_failed, name) for name in names]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


def _is_there(artifact: Artifact, remote: RemoteStore) -> bool:
    found = read_pointer(remote, artifact.id)
    if found is None:
        return False
    if found.manifest_sha256 != artifact.manifest_sha256:
        raise RemoteConflict(
            f"the remote has another {artifact.id}: the same question, answered with other bytes", where=remote.shown,
            found=f"manifest {found.manifest_sha256}", expected=artifact.manifest_sha256,
            remedy=f"'sparsemill explain' tells what differs; pull theirs on a machine without yours, or keep yours "
            f"out of {remote.shown}",
        )  # fmt: skip
    return True


def _exclusively(on_bytes: OnBytes) -> OnBytes:
    lock = threading.Lock()

    def advance(count: int) -> None:
        with lock:
            on_bytes(count)

    return advance
