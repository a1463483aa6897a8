"""``sparsemill artifacts``: what is in the artifact store."""

import json
from typing import Any

from cyclopts import App

from pipeline.cli.options import AsJson, Home, print_table, workspace_at
from storage.artifact import Artifact

artifacts = App(name="artifacts", help="Look at what is in the artifact store.")


@artifacts.command(name="ls")
def list_artifacts(stage: str | None = None, *, home: Home = None, as_json: AsJson = False) -> None:
    """List artifacts, newest first.

    Args:
        stage: only those of one stage: tokenize, harvest, train, analyze or report.
    """
    found = workspace_at(None, home).store.list(stage)
    if as_json:
        print(json.dumps([_described(artifact) for artifact in found], indent=2))
        return
    rows = [
        [artifact.id, _size(artifact.manifest.total_bytes), str(len(artifact.manifest.files))] for artifact in found
    ]
    print_table(["artifact", "size", "files"], rows)


@artifacts.command
def show(reference: str, *, home: Home = None) -> None:
    """Print an artifact's config, parents, stats and place as JSON.

    Args:
        reference: id, unique prefix, tag, or a stage's name for its latest.
    """
    artifact = workspace_at(None, home).store.resolve(reference)
    detail = {"config": artifact.config, "stats": artifact.stats, "provenance": artifact.manifest.provenance}
    print(json.dumps(_described(artifact) | detail, indent=2, default=str))


@artifacts.command
def tag(name: str, reference: str, *, home: Home = None) -> None:
    """Give an artifact a name that stays with it.

    Args:
        name: the tag.
        reference: id, unique prefix or another tag.
    """
    store = workspace_at(None, home).store
    artifact = store.resolve(reference)
    store.tag(name, artifact)
    print(f"{name} -> {artifact.id}")


@artifacts.command
def lineage(reference: str, *, home: Home = None) -> None:
    """Print what an artifact was made from, back to the tokens.

    Args:
        reference: id, unique prefix or tag.
    """
    store = workspace_at(None, home).store

    def walk(artifact: Artifact, role: str, depth: int) -> None:
        print(f"{'  ' * depth}{role}{artifact.id}")
        for parent_role in artifact.parents:
            walk(store.parent(artifact, parent_role), f"{parent_role}: ", depth + 1)

    walk(store.resolve(reference), "", 0)


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


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"
