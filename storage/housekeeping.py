"""Keeping house: what artifacts take of the disk, and which of them nothing needs any more.

*Needed* is what has a tag, what is younger than an age, and whatever these, or work that is unfinished, were made from,
back to the tokens; the rest is unreferenced. Staging folders, half-pulled artifacts, chunks kept of remotes and what a
repair left behind are stale once they are older than that age and nobody holds their artifact's lock. A plan is made
first and shown; removing looks again before each, under its lock, at tags, at what was begun and at what was made
meanwhile, and takes children before parents, so that a crash leaves nothing without its parents. Only work that has
found an artifact and is not yet in the journal is not seen: it meets an error where it reads.
An artifact is moved aside by one rename before its files go: a reader finds it whole or not at all.
A manifest that cannot be read stops it all, since what it needs is not known. Rejected: counting only children as
references (a finished report has none, an abandoned training's survey has).
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from storage import atomic
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore
from storage.borrowing import PULLED_NAME
from storage.chunk_cache import FOLDER_NAME as CHUNKS_NAME
from storage.errors import ArtifactNotFound, SparsemillError
from storage.manifest import MANIFEST_NAME, Spec
from storage.unfinished import file_stats

_REMOVED = ".removed"
_STALE = (".staging", PULLED_NAME, CHUNKS_NAME, ".repair", ".quarantine", _REMOVED)


@dataclass(frozen=True)
class Usage:
    """What one kind of thing takes.

    Attributes:
        name: a stage, or a folder such as ``.staging``.
        count: artifacts, or folders.
        apparent_bytes: of its files, each as often as it has a name there.
        disk_bytes: what would be free without it; a file that is shared by hard links counts where it is met first.
    """

    name: str
    count: int
    apparent_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Removal:
    """A folder that nothing needs.

    Attributes:
        path: of the folder.
        artifact_id: whose it is; of kept chunks "".
        committed: whether it is an artifact, not something unfinished.
        disk_bytes: what its files take; shared ones are counted where the last name goes.
        age_days: since it was last changed.
    """

    path: Path
    artifact_id: str
    committed: bool
    disk_bytes: int
    age_days: float


def usage(store: ArtifactStore) -> list[Usage]:
    """What a store takes, stage by stage, then unfinished and kept things."""
    seen: set[tuple[int, int]] = set()
    stages = sorted({artifact_id.rpartition("-")[0] for artifact_id in store.ids()})
    found: list[Usage] = []
    for name in (*stages, *_STALE):
        folders = _folders(store.root / name)
        if folders:
            apparent = disk = 0
            for stat in _stats(folders):
                apparent += stat.st_size
                if (key := (stat.st_dev, stat.st_ino)) not in seen:
                    seen.add(key)
                    disk += stat.st_blocks * 512
            found.append(Usage(name, len(folders), apparent, disk))
    return found


def plan_pruning(store: ArtifactStore, *, older_than_days: float) -> list[Removal]:
    """What nothing needs, children before their parents, then what is stale.

    Args:
        store: to be pruned.
        older_than_days: younger things are needed.

    Raises:
        CorruptArtifact: a manifest is damaged: what it was made from is not known.
    """
    return _plan(store, {artifact.id: artifact for artifact in store.list()}, older_than_days)


def prune(
    store: ArtifactStore, *, older_than_days: float, on_left: Callable[[Removal, str], None] | None = None
) -> list[Removal]:
    """Removes what nothing needs, and returns it; what is worked on, or needed by the time it would go, is left.

    Args:
        store: to be pruned.
        older_than_days: younger things are needed.
        on_left: told what was planned and is left, and why.
    """
    artifacts = {artifact.id: artifact for artifact in store.list()}
    plan = _plan(store, artifacts, older_than_days)
    ahead = {removal.artifact_id for removal in plan if removal.committed}
    removed: list[Removal] = []
    for removal in plan:
        with _lock_if_free(store, removal.artifact_id) as ours:
            if not removal.path.is_dir():
                why = "it has gone already"
            elif not ours:
                why = "another process works on it"
            elif _age_days(removal.path, committed=removal.committed) < older_than_days:
                why = "it was changed meanwhile"
            elif removal.committed and removal.artifact_id in _needed_now(store, artifacts, ahead):
                why = "it is needed by now"
            else:
                _remove(store, removal)
                removed.append(removal)
                why = None
        if removal.committed:
            ahead.discard(removal.artifact_id)
        if why is not None and on_left is not None:
            on_left(removal, why)
    return removed


def _plan(store: ArtifactStore, artifacts: dict[str, Artifact], older_than_days: float) -> list[Removal]:
    ages = {name: _age_days(artifact.folder, committed=True) for name, artifact in artifacts.items()}
    young = [name for name, age in ages.items() if age < older_than_days]
    needed = _with_ancestors([*store.tags().values(), *young, *_begun(store)], artifacts)
    links: dict[tuple[int, int], int] = {}
    found = [
        Removal(artifacts[name].folder, name, True, _freed(artifacts[name].folder, links), ages[name])
        for name in _children_first(artifacts)
        if name not in needed
    ]
    for folder in (folder for name in _STALE for folder in _folders(store.root / name)):
        age = _age_days(folder, committed=False)
        if age >= older_than_days:
            owner = "" if folder.parent.name == CHUNKS_NAME else folder.name
            found.append(Removal(folder, owner, False, _freed(folder, links), age))
    return found


def _age_days(folder: Path, *, committed: bool) -> float:
    """Since an artifact was committed, or since anything in another folder was changed."""
    if committed:
        changed = (folder / MANIFEST_NAME).stat().st_mtime
    else:
        changed = max((stat.st_mtime for stat in _stats([folder])), default=folder.stat().st_mtime)
    return (time.time() - changed) / 86400


def _needed_now(store: ArtifactStore, artifacts: dict[str, Artifact], ahead: set[str]) -> set[str]:
    """What tags, begun work and artifacts that stay were made from at this moment, with themselves.

    Args:
        store: being pruned.
        artifacts: by id; those made meanwhile are added.
        ahead: ids of those that may still be removed.
    """
    needing = [*store.tags().values(), *_begun(store)]  # first: what is committed meanwhile is among the ids then
    for artifact_id in store.ids():
        if artifact_id not in artifacts:
            with suppress(ArtifactNotFound):  # made and removed meanwhile
                artifacts[artifact_id] = store.open(artifact_id)
        if artifact_id not in ahead:
            needing.append(artifact_id)
    return _with_ancestors(needing, artifacts)


def _remove(store: ArtifactStore, removal: Removal) -> None:
    if not removal.committed:
        atomic.remove_tree(removal.path)
        return
    aside = store.root / _REMOVED / removal.artifact_id
    atomic.make_folder(aside.parent)
    atomic.remove_tree(aside)
    atomic.rename(removal.path, aside)
    atomic.remove_tree(aside)


@contextmanager
def _lock_if_free(store: ArtifactStore, artifact_id: str) -> Generator[bool]:
    """Holds an id's lock, if nobody else does; whether it does."""
    if not artifact_id:
        yield True
        return
    folder = store.root / ".locks"
    atomic.make_folder(folder)
    descriptor = os.open(folder / artifact_id, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _with_ancestors(ids: Iterable[str], artifacts: dict[str, Artifact]) -> set[str]:
    found: set[str] = set()
    ahead = list(ids)
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            if name in artifacts:
                ahead += [parent.id for parent in artifacts[name].parents.values()]
    return found


def _begun(store: ArtifactStore) -> Iterator[str]:
    """Ids of the parents of what is being made, or was begun."""
    for journal in (store.root / ".staging").glob("*/journal.jsonl"):
        with suppress(ValueError, KeyError, TypeError, SparsemillError, OSError):  # torn: nothing goes on from it
            with journal.open("rb") as file:
                spec = Spec.from_json(json.loads(file.readline())["spec"])
            yield from (parent.id for parent in spec.parents.values())


def _children_first(artifacts: dict[str, Artifact]) -> list[str]:
    """Ids in an order in which none comes before what was made from it."""
    n_ancestors = {name: len(_with_ancestors([name], artifacts)) for name in artifacts}
    return sorted(artifacts, key=lambda name: (-n_ancestors[name], name))  # a child has all that its parents have


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _stats(folders: Sequence[Path]) -> Iterator[os.stat_result]:
    for folder in folders:
        yield from file_stats(folder)


def _freed(folder: Path, links: dict[tuple[int, int], int]) -> int:
    """Bytes that go with the last name of each file; ``links`` counts the names removed so far."""
    freed = 0
    for stat in _stats([folder]):
        key = (stat.st_dev, stat.st_ino)
        links[key] = links.get(key, 0) + 1
        if links[key] == stat.st_nlink:
            freed += stat.st_blocks * 512
    return freed
