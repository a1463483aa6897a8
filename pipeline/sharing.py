"""Sharing artifacts through a remote: what ``push``, ``pull`` and ``artifacts ls URL`` do.

Parents go before what was made from them, so that at every moment what is visible is complete. What moves, and how a
broken transfer goes on, ``storage.transfers`` says.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pipeline.sampling import count_windows, sample
from pipeline.workspace import Workspace
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore
from storage.borrowing import Borrowing
from storage.errors import AmbiguousReference, ArtifactNotFound
from storage.manifest import is_id
from storage.remote import RemoteStore
from storage.shared import Pointer, known_ids, read_pointer
from storage.transfers import FILES_AT_ONCE, Plan, fetch, missing_files, plan_push


@dataclass(frozen=True)
class Moved:
    """What pushing or pulling one artifact was, or would be.

    Attributes:
        id: of the artifact.
        files: that moved.
        bytes: of them.
        there: whether it was there already.
    """

    id: str
    files: int
    bytes: int
    there: bool

    @staticmethod
    def of(plan: Plan) -> "Moved":
        """A plan in numbers."""
        return Moved(plan.artifact.id, len(plan.missing), plan.bytes, plan.there)


def push(
    artifact: Artifact, remote: RemoteStore, workspace: Workspace, *, with_parents: bool = False, dry_run: bool = False
) -> list[Moved]:
    """Pushes an artifact, and with it what it was made from.

    Args:
        artifact: of the workspace's store.
        remote: where to.
        workspace: whose store has the parents; shows the progress.
        with_parents: whether parents go too, back to the tokens.
        dry_run: whether only to say what would move.

    Raises:
        CorruptArtifact: a file is not as it was committed; nothing of its artifact became visible.
        RemoteConflict: the remote has other bytes under an id.
        RemoteError: the remote does not take it; the same command goes on where it stopped.
    """
    chosen = lineage(artifact, workspace.store) if with_parents else [artifact]
    for one in chosen:
        one.fetch()  # of one that is borrowed: nothing otherwise
    return [Moved.of(plan_push(one, remote) if dry_run else workspace.push(one, remote)) for one in chosen]


def pull(
    reference: str,
    remote: RemoteStore,
    workspace: Workspace,
    *,
    with_parents: bool = False,
    windows: str | None = None,
    dry_run: bool = False,
) -> tuple[Artifact, list[Moved]]:
    """Pulls an artifact, and with it what it was made from, or a sample of a harvest.

    Args:
        reference: id, or, where the remote can be listed, the unique beginning of one.
        remote: where from.
        workspace: whose store takes it.
        with_parents: whether parents come too, back to the tokens.
        windows: of a harvest, a number of windows or such as ``1%``; see ``pipeline.sampling``.
        dry_run: whether only to say what would move.

    Returns:
        The artifact (of a dry run: the remote's), and what moved.

    Raises:
        ArtifactNotFound: the remote does not have it.
        CorruptArtifact: what the remote has is not what it should be, or another one is here.
        RemoteError: it cannot be read; the same command goes on where it stopped.
    """
    store = workspace.store
    origin = Borrowing(remote, store.root, track=workspace.track_bytes)
    artifact = origin.find(resolve_remote(reference, remote))
    if artifact is None:
        raise ArtifactNotFound("the remote has no such artifact", where=remote.shown, found=reference)
    chosen = lineage(artifact, store, origin)[:-1] if with_parents else []
    if windows is None:
        chosen.append(artifact)
    moved = [_pull(one, remote, workspace, dry_run=dry_run) for one in chosen]
    if windows is None:
        return (artifact if dry_run else store.open(artifact.id)), moved
    count = count_windows(windows, artifact)
    if dry_run:
        share = artifact.manifest.total_bytes * count // int(str(artifact.stats["windows"]))
        files = len(artifact.manifest.files) * count // int(str(artifact.stats["windows"]))
        return artifact, [*moved, Moved(f"sample of {count} windows of {artifact.id}", files, share, there=False)]
    made = sample(artifact, count, workspace)
    figures = made.artifact.manifest
    return made.artifact, [
        *moved, Moved(made.artifact.id, len(figures.files), figures.total_bytes, made.status == "cached")
    ]  # fmt: skip


def list_remote(remote: RemoteStore, stage: str | None = None) -> list[Pointer]:
    """What a remote has, by stage and id; what is pushed half is not there.

    Raises:
        RemoteError: it cannot be listed: a web server cannot.
    """
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        found = pool.map(lambda artifact_id: read_pointer(remote, artifact_id), known_ids(remote, stage))
        return [pointer for pointer in found if pointer is not None]


def resolve_remote(reference: str, remote: RemoteStore) -> str:
    """The id of a remote's artifact from its unique beginning."""
    if is_id(reference):
        return reference
    matches = [pointer.id for pointer in list_remote(remote) if pointer.id.startswith(reference) and reference]
    if len(matches) > 1:
        raise AmbiguousReference("several artifacts answer to this", where=remote.shown, found=", ".join(matches))
    if not matches:
        raise ArtifactNotFound("the remote has no such artifact", where=remote.shown, found=reference)
    return matches[0]


def lineage(artifact: Artifact, store: ArtifactStore, origin: Borrowing | None = None) -> list[Artifact]:
    """An artifact's ancestors, each after its own, and the artifact itself last.

    Args:
        artifact: here, or in a remote.
        store: which has them.
        origin: where else they are looked for, those too whose child is here already.
    """
    ordered: dict[str, Artifact] = {}

    def visit(one: Artifact) -> None:
        if one.id not in ordered:
            child = one if origin is None else replace(one, origin=origin)
            for role in one.parents:
                visit(store.parent(child, role))
            ordered[one.id] = one

    visit(artifact)
    return list(ordered.values())


def total(moved: Sequence[Moved]) -> Moved:
    """All of it together."""
    return Moved("", sum(one.files for one in moved), sum(one.bytes for one in moved), all(one.there for one in moved))


def _pull(artifact: Artifact, remote: RemoteStore, workspace: Workspace, *, dry_run: bool) -> Moved:
    store = workspace.store
    if artifact.origin is None or store.has(artifact):
        return Moved(artifact.id, 0, 0, there=True)
    if dry_run:
        return Moved.of(Plan(artifact, missing_files(artifact)))
    with store.lock(artifact.id, lambda: workspace.reporter.say("  another process makes or pulls it: waiting")):
        if store.has(artifact):
            return Moved(artifact.id, 0, 0, there=True)
        plan = Plan(artifact, missing_files(artifact))
        with workspace.track_bytes(f"pull {artifact.id}", plan.bytes) as advance:
            fetch(artifact, plan.missing, remote, advance)
        store.adopt(artifact)
    return Moved.of(plan)
