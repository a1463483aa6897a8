"""``sparsemill artifacts``: what is in the artifact store."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from pipeline.cli.options import AFTERWARDS, AsJson, Home, print_table, workspace_at
from pipeline.cli.sharing import list_remote
from pipeline.listing import RunRecord, run_record, settings_apart, shown
from pipeline.unfinished import so_far
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore
from storage.errors import ArtifactNotFound, CorruptArtifact
from storage.housekeeping import Removal, plan_pruning, usage
from storage.housekeeping import prune as remove_unneeded
from storage.manifest import Parent, stage_of
from storage.references import ids
from storage.root import MARKER_NAME
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

    Each is told apart from others of its kind: by when it was made, its tags, and the settings, or the parent, that
    they do not have in common. 'sparsemill artifacts show ID' has all of one. Of unfinished work it says how much is
    kept, and whether a process works on it, it was interrupted, or an error ended it, and which: the same command
    again goes on with it.

    For instance: sparsemill artifacts ls train; sparsemill artifacts ls s3://bucket/team.

    Args:
        where: only those of one stage, such as tokenize, harvest, train, analyze or report; or the URL of a remote,
            or the folder of another store.
    """
    if where is not None and (Path(where) / MARKER_NAME).is_file():
        where, home = None, Path(where)
    if where is not None and "/" in where:
        list_remote(where, as_json=as_json)
        return
    store = workspace_at(None, home).store
    begun = unfinished(store.root, where)  # looked at first: what is committed meanwhile is in one of the two
    found = store.list(where)
    runs, apart, tags = [run_record(one) for one in found], settings_apart(found), _tags(store)
    if as_json:
        described = [
            {**_described(one), **_run(run), "tags": tags.get(one.id, []), "settings_apart": settings}
            for one, run, settings in zip(found, runs, apart, strict=True)
        ]
        print(json.dumps({"artifacts": described, "unfinished": [_begun(work) for work in begun]}, indent=2))
        return
    if not found and not begun:
        print(_nothing(store.root, where))
        return
    rows = [
        [
            one.id, run.day, _size(one.manifest.total_bytes), f"{len(one.manifest.files):,}",
            ", ".join(filter(None, [*(f"tag {name}" for name in tags.get(one.id, [])), shown(settings)])),
        ]
        for one, run, settings in zip(found, runs, apart, strict=True)
    ]  # fmt: skip
    if rows:
        print_table(["artifact", "made", "size", "files", "told apart by"], rows)
        print("\n" * bool(begun), end="")
    if begun:
        print_table(
            ["unfinished", "kept", "on disk", "now"],
            [[work.id, str(so_far(work) or "unreadable"), _size(work.disk_bytes), _now(work)] for work in begun],
        )
        for work in begun:
            if work.failure is not None:
                print(f"\n{work.id} failed: {work.failure}")
    if not all(work.working for work in begun):
        print(
            "\nThe command that began it, given again, goes on with what is unfinished; 'sparsemill artifacts prune' "
            "removes what is stale."
        )


@artifacts.command
def show(reference: str, *, home: Home = None) -> None:
    """Print an artifact's config, parents, stats and place as JSON, and when it was made.

    Args:
        reference: id, unique prefix, tag, path, or 'latest'.
    """
    artifact = workspace_at(None, home).store.resolve(reference)
    detail = {"config": artifact.config, "stats": artifact.stats, "provenance": artifact.manifest.provenance}
    print(json.dumps(_described(artifact) | _run(run_record(artifact)) | detail, indent=2, default=str))


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
def lineage(
    reference: str,
    *,
    full: Annotated[bool, Parameter(negative=(), help="each under everything that was made from it")] = False,
    home: Home = None,
) -> None:
    """Print what an artifact was made from, back to the tokens: each artifact once.

    For instance: sparsemill artifacts lineage train-2ab7.

    Args:
        reference: id, unique prefix, tag, path, or 'latest'.
    """
    store = workspace_at(None, home).store
    told: set[Parent] = set()

    def walk(artifact: Artifact, role: str, depth: int) -> None:
        print(f"{'  ' * depth}{role}{artifact.id}{'' if artifact.origin is None else ' (in the remote)'}")
        parents = {role: wanted for role, wanted in artifact.parents.items() if full or wanted not in told}
        told.update(parents.values())  # before any is gone into: each stands where it is nearest
        for parent_role, wanted in parents.items():
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
    if not found:
        print(f"nothing to remove: all is needed, or younger than {older_than:g} days")
        return
    rows = [
        [str(one.path.relative_to(store.root)), "artifact" if one.committed else "stale", _size(one.disk_bytes),
         _days(one.age_days)]
        for one in found
    ]  # fmt: skip
    print_table(["removed" if yes else "would be removed", "what", "frees", "age"], rows)
    freed = _size(sum(one.disk_bytes for one in found))
    print(f"{freed} freed" if yes else f"{freed} would be free; the same command with --yes removes them")


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
        "failure": work.failure,
    }


def _run(run: RunRecord) -> dict[str, Any]:
    return {
        "finished": None if run.finished is None else run.finished.isoformat(),
        "seconds": run.seconds,
        "status": run.status or None,
    }


def _tags(store: ArtifactStore) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, artifact_id in store.tags().items():
        found.setdefault(artifact_id, []).append(name)
    return found


def _nothing(root: Path, stage: str | None) -> str:
    stages = sorted({stage_of(artifact_id) for artifact_id in ids(root)})
    if stages:
        return f"{root} has no artifact of a stage {stage!r}; it has some of: {', '.join(stages)}"
    return f"{root} holds no artifacts yet: 'sparsemill replicate' makes the demo's; SPARSEMILL_HOME names others"


def _now(work: Unfinished) -> str:
    now = state(work.working) if work.failure is None else "failed"
    return now + (" (an artifact of this id is there)" if work.committed else "")


def _tell_left(removal: Removal, why: str) -> None:
    print(f"  left {removal.path.parent.name}/{removal.path.name}: {why}", file=sys.stderr)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


def _days(age: float) -> str:
    return f"{age:,.1f} days"
