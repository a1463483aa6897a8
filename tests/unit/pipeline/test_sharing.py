"""Sharing of small artifacts through a folder."""

from pathlib import Path

from pipeline import sharing
from pipeline.config import Runtime
from pipeline.progress import Quiet
from pipeline.workspace import Workspace
from storage.artifact import Artifact
from storage.artifacts import Result, Spec, Staging
from storage.remote import RemoteStore


def test_parents_are_pulled_also_where_one_between_is_here_without_its_own(tmp_path: Path):
    ours, theirs = (Workspace.open(Runtime(root=tmp_path / name, remote=None), Quiet()) for name in ("ours", "theirs"))
    (tmp_path / "remote").mkdir()
    remote = RemoteStore(str(tmp_path / "remote"))
    tokens = make(ours, "tokenize")
    harvest = make(ours, "harvest", tokens)
    sae = make(ours, "train", harvest)
    sharing.push(sae, remote, ours, with_parents=True)
    sharing.pull(harvest.id, remote, theirs)
    _, moved = sharing.pull(sae.id, remote, theirs, with_parents=True)
    assert [(one.id, one.there) for one in moved] == [(tokens.id, False), (harvest.id, True), (sae.id, False)]
    assert set(theirs.store.ids()) == {tokens.id, harvest.id, sae.id}


def make(workspace: Workspace, stage: str, *parents: Artifact) -> Artifact:
    def produce(staging: Staging) -> Result:
        staging.write_json("contents.json", {"stage": stage})
        return Result({})

    spec = Spec(stage, 1, {}, {parent.stage: parent.as_parent() for parent in parents})
    return workspace.make(spec, produce).artifact
