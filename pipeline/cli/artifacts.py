"""``sparsemill artifacts``: what is in the artifact store."""

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import App, Parameter

from pipeline.cli.options import AFTERWARDS, AsJson, Home, print_table, workspace_at
from pipeline.cli.sharing import list_remote
from pipeline.unfinished import so_far
from storage.artifact import Artifact
from storage.errors import ArtifactNotFound, CorruptArtifact
from storage.housekeeping import Removal, plan_pruning, usage
from storage.housekeeping import prune as remove_unneeded
from storage.unfinished import Unfinished, state, unfinished

artifacts = App(
    name="artifacts",
    help="Look at what is in the artifact store, name it, and keep it tidy.",
    group=AFTERWARDS,
    sort_key=2,
)


@artifacts.command(name="ls")
def list_artifacts(where: str | None = None, *, home: Home = None, as_json: AsJson = False) -> None:
    """List artifacts, newest first, and what is unfinished; or what a remote has.

    Of unfinished work it says how much is kept, and whether a process works on it or it was interrupted: then the same
    command again goes on with it.

    Args:
        where: only those of one stage, such as tokenize, harvest, train, analyze or report; or the URL of a remote.
    """
    if where is not None and "/" in where:
        list_remote(where, as_json=as_json)
        return
    store = workspace_at(None, home).store
    begun = unfinished(store.root, where)  # looked at first: what is committed meanwhile is in one of the two
    found = store.list(where)
    if as_json:
        described = {"artifacts": [_described(one) for one in found], "unfinished": [_begun(work) for work in begun]}
        print(json.dumps(described, indent=2))
        return
    rows = [
        [artifact.id, _size(artifact.manifest.total_bytes), str(len(artifact.manifest.files))] for artifact in found
    ]
    print_table(["artifact", "size", "files"], rows)
    if begun:
        print()
        print_table(
            ["unfinished", "kept", "on disk", "now"],
            [[work.id, str(so_far(work) or "unreadable"), _size(work.disk_bytes), _now(work)] for work in begun],
        )
    if not all(work.working for work in begun):
        print("\nWhat was interrupted goes on with the command that began it, given again.")


@artifacts.command
def show(reference: str, *, home: Home = None) -> None:
    """Print an artifact's config, parents, stats and place as JSON.

    Args:
        reference: id, unique prefix, tag, path, or 'latest'.
    """
    artifact = workspace_at(None, home).store.resolve(reference)
    detail = {"config": artifact.config, "stats": artifact.stats, "provenance": artifact.manifest.provenance}
    print(json.dumps(_described(artifact) | detail, indent=2, default=str))


@artifacts.command
def tag(name: str, reference: str, *, home: Home = None) -> None:
    """Give an artifact a name that stays with it; every command takes it, and 'prune' spares what has one.

    For instance: sparsemill artifacts tag baseline train-2ab7.

    Args:
        name: the tag.
        reference: id, unique prefix, another tag, or 'latest'.
    """
    store = workspace_at(None, home).store
    artifact = store.resolve(reference)
    store.tag(name, artifact)
    print(f"{name} -> {artifact.id}")


@artifacts.command
def lineage(reference: str, *, home: Home = None) -> None:
    """Print what an artifact was made from, back to the tokens.

    Args:
        reference: id, unique prefix, tag, path, or 'latest'.
    """
    store = workspace_at(None, home).store

    def walk(artifact: Artifact, role: str, depth: int) -> None:
        print(f"{'  ' * depth}{role}{artifact.id}{'' if artifact.origin is None else ' (in the remote)'}")
        for parent_role, wanted in artifact.parents.items():
            try:
                walk(store.parent(artifact, parent_role), f"{parent_role}: ", depth + 1)
            except (ArtifactNotFound, CorruptArtifact) as error:
                what = "not here" if isinstance(error, ArtifactNotFound) else "another one is here"
                print(f"{'  ' * (depth + 1)}{parent_role}: {wanted.id} ({what})")

    walk(store.resolve(reference), "", 0)


@artifacts.command
def du(*, home: Home = None, as_json: AsJson = False) -> None:
    """Tell what artifacts take of the disk, stage by stage, and what is unfinished or kept of remotes.

    'size' counts every file; 'on disk' counts one that several artifacts share (windows of a longer harvest) once.
    """
    found = usage(workspace_at(None, home).store)
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return
    rows = [[one.name, f"{one.count:,}", _size(one.apparent_bytes), _size(one.disk_bytes)] for one in found]
    total = ["all", "", _size(sum(one.apparent_bytes for one in found)), _size(sum(one.disk_bytes for one in found))]
    print_table(["stage", "artifacts", "size", "on disk"], [*rows, total])


@artifacts.command
def prune(
    *,
    older_than: Annotated[float, Parameter(help="days; what is younger is needed, with all it was made from")] = 30,
    yes: Annotated[bool, Parameter(negative=(), help="remove it; without, only list it")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """List what nothing needs any more, and with --yes remove it.

    Needed is what has a tag ('sparsemill artifacts tag'), what is younger than --older-than, what is being made, and
    all that these were made from. Unfinished work counts as stale once it is older, and nobody works on it.
    """
    store = workspace_at(None, home).store
    found = (
        remove_unneeded(store, older_than_days=older_than, on_left=_tell_left)
        if yes
        else plan_pruning(store, older_than_days=older_than)
    )
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2, default=str))
        return
    rows = [
        [str(one.path.relative_to(store.root)), "artifact" if one.committed else "stale", _size(one.disk_bytes),
         _days(one.age_days)]
        for one in found
    ]  # fmt: skip
    print_table(["removed" if yes else "would be removed", "what", "frees", "age"], rows)
    freed = _size(sum(one.disk_bytes for one in found))
    print(f"{freed} freed" if yes else f"{freed} would be free; 'sparsemill artifacts prune --yes' removes them")


def _described(artifact: Artifact) -> dict[str, Any]:
    return {
        "id": artifact.id,
        "stage": artifact.stage,
        "folder": str(artifact.folder),
        "bytes": artifact.manifest.total_bytes,
        "files": len(artifact.manifest.files),
        "manifest_sha256": artifact.manifest_sha256,
        "parents": {role: parent.id for role, parent in artifact.parents.items()},
    }


def _begun(work: Unfinished) -> dict[str, Any]:
    kept = so_far(work)
    return {
        "id": work.id,
        "stage": work.stage,
        "folder": str(work.folder),
        "done": None if kept is None else kept.done,
        "of": None if kept is None else kept.of,
        "unit": None if kept is None else kept.unit,
        "disk_bytes": work.disk_bytes,
        "working": work.working,
        "committed": work.committed,
    }


def _now(work: Unfinished) -> str:
    return state(work.working) + (" (an artifact of this id is there)" if work.committed else "")


def _tell_left(removal: Removal, why: str) -> None:
    print(f"  left {removal.path.parent.name}/{removal.path.name}: {why}", file=sys.stderr)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


def _days(age: float) -> str:
    return f"{age:,.1f} days"
