"""Artifacts shared through a folder and through a real S3 server: nothing half visible, only what is read moves."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import sharing
from pipeline.config import Runtime, load_preset
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.errors import ArtifactNotFound, CorruptArtifact, RemoteConflict, RemoteError
from storage.reader import ShardReader
from storage.remote import RemoteStore
from tests.integration.s3 import BUCKET, S3Server

ROOT = Path(__file__).parents[2]
SHORT = ("train.autoencoder.steps=20",)


def workspace_in(root: Path, remote: str | None = None) -> Workspace:
    return Workspace.open(Runtime(root=root, threads=1, remote=remote), Quiet())


def chain(preset: Path, workspace: Workspace, *overrides: str) -> Chain:
    return Chain(load_preset(str(preset), overrides), workspace, run_directly)


@pytest.fixture(scope="module")
def made(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Artifact]:
    """A's machine, and the autoencoder that A trained."""
    workspace = workspace_in(tmp_path_factory.mktemp("a") / "store")
    return workspace, chain(tiny_preset, workspace, *SHORT).train()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place of either kind."""
    if request.param == "folder":
        (tmp_path / "shared").mkdir()
        return (tmp_path / "shared").as_uri()
    server: S3Server = request.getfixturevalue("server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"


def contents(artifact: Artifact) -> dict[str, bytes]:
    names = [*artifact.manifest.files, "manifest.json"]
    return {name: (artifact.folder / name).read_bytes() for name in names}


def test_what_is_pushed_is_pulled_to_the_same_bytes_and_pushed_once(
    made: tuple[Workspace, Artifact], url: str, tmp_path: Path
):
    ours, sae = made
    remote = RemoteStore(url)
    planned = sharing.push(sae, remote, ours, with_parents=True, dry_run=True)
    assert sharing.list_remote(remote) == []
    moved = sharing.push(sae, remote, ours, with_parents=True)
    assert [(one.id, one.files) for one in planned] == [(one.id, one.files) for one in moved]
    assert [one.id.partition("-")[0] for one in moved] == ["tokenize", "harvest", "train"]
    assert {pointer.id for pointer in sharing.list_remote(remote)} == {one.id for one in moved}
    assert all(one.there for one in sharing.push(sae, remote, ours, with_parents=True))
    theirs = workspace_in(tmp_path / "b")
    pulled, _ = sharing.pull(sae.id, remote, theirs, with_parents=True)
    assert contents(pulled) == contents(sae)
    harvest = theirs.store.parent(pulled, "activations")
    assert contents(harvest) == contents(ours.store.parent(sae, "activations"))
    assert all(one.there for one in sharing.pull(sae.id, remote, theirs, with_parents=True)[1])


def test_a_push_that_breaks_off_is_invisible_and_goes_on(
    made: tuple[Workspace, Artifact], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ours, sae = made
    harvest = ours.store.parent(sae, "activations")
    remote = RemoteStore(url)
    put, sent = RemoteStore.put_file, []

    def break_off(self: RemoteStore, *rest: object, **more: object) -> object:
        if len(sent) >= 5:
            raise RemoteError("the line is dead", where=url)
        sent.append(rest)
        return put(self, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(RemoteStore, "put_file", break_off)
    with pytest.raises(RemoteError):
        sharing.push(harvest, remote, ours)
    monkeypatch.setattr(RemoteStore, "put_file", put)
    assert sharing.list_remote(remote) == []
    with pytest.raises(ArtifactNotFound):
        sharing.pull(harvest.id, remote, workspace_in(tmp_path / "b"))
    (rest,) = sharing.push(harvest, remote, ours)
    assert 0 < rest.files < len(harvest.manifest.files) + 1
    pulled, _ = sharing.pull(harvest.id, remote, workspace_in(tmp_path / "b"))
    assert contents(pulled) == contents(harvest)


def test_other_bytes_of_an_id_are_reported_to_the_second(
    made: tuple[Workspace, Artifact], tiny_preset: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ours, sae = made
    remote = RemoteStore(url)
    sharing.push(sae, remote, ours)
    other = workspace_in(tmp_path / "other")
    monkeypatch.setattr("pipeline.training.measure_quality", lambda *_: SimpleNamespace(recovered=0.5))
    second = chain(tiny_preset, other, *SHORT).train()
    assert second.id == sae.id
    assert second.manifest_sha256 != sae.manifest_sha256
    with pytest.raises(RemoteConflict, match=sae.id):
        sharing.push(second, remote, other)
    pulled, _ = sharing.pull(sae.id, remote, workspace_in(tmp_path / "c"))
    assert contents(pulled) == contents(sae)


def test_a_changed_object_of_the_remote_is_refused_and_nothing_is_committed(
    made: tuple[Workspace, Artifact], tmp_path: Path
):
    ours, sae = made
    shared = tmp_path / "shared"
    shared.mkdir()
    sharing.push(sae, RemoteStore(str(shared)), ours)
    (weights,) = shared.rglob("autoencoder.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    theirs = workspace_in(tmp_path / "b")
    with pytest.raises((CorruptArtifact, RemoteError), match=r"autoencoder\.safetensors"):
        sharing.pull(sae.id, RemoteStore(str(shared)), theirs)
    assert theirs.store.list() == []


def test_a_teammate_on_an_empty_machine_pulls_only_what_is_read(
    made: tuple[Workspace, Artifact], tiny_preset: Path, url: str, tmp_path: Path
):
    ours, sae = made
    sharing.push(sae, RemoteStore(url), ours, with_parents=True)
    theirs = workspace_in(tmp_path / "b", remote=url)
    run = chain(tiny_preset, theirs, *SHORT)
    run.analyze(only=["kurtosis"])
    statuses = {stage.name: stage.made.status for stage in run.runs}
    assert {statuses[name] for name in ("tokenize", "harvest", "train")} == {"cached"}
    assert statuses["kurtosis"] == "made"
    here = [path.name for path in (tmp_path / "b").rglob("*") if path.is_file()]
    assert "autoencoder.safetensors" in here
    assert not any(name.endswith(".arrow") for name in here)  # densities read the rows, not the text behind them
    other = chain(tiny_preset, theirs, *SHORT, "train.autoencoder.seed=1")
    assert other.train().id != sae.id
    assert {stage.name: stage.made.status for stage in other.runs}["harvest"] == "cached"
    arrow = {path.name for path in (tmp_path / "b").rglob("*.arrow")}
    assert arrow == {"held_out-00000.arrow"}  # a training measures itself on held-out prompts, and reads no others


def test_a_sample_of_windows_is_an_artifact_of_its_own(made: tuple[Workspace, Artifact], url: str, tmp_path: Path):
    ours, sae = made
    harvest = ours.store.parent(sae, "activations")
    remote = RemoteStore(url)
    sharing.push(harvest, remote, ours)
    theirs = workspace_in(tmp_path / "b")
    sample, _ = sharing.pull(harvest.id, remote, theirs, windows="2")
    assert sample.id != harvest.id
    assert sample.parents["sampled_from"].id == harvest.id
    assert facts(sample)["windows"] == 2
    whole, part = ShardReader.of(harvest), ShardReader.of(sample)
    assert (part.read(0, part.n_rows).rows == whole.read(0, part.n_rows).rows).all()


def test_the_command_line_pushes_lists_and_pulls_without_telling_secrets(
    made: tuple[Workspace, Artifact], server: S3Server, tmp_path: Path
):
    ours, sae = made
    url = f"s3://{BUCKET}/{tmp_path.name}"
    environment = os.environ | server.environment

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    outputs = [
        run("push", sae.id, url, "--home", ours.store.root),
        run("artifacts", "ls", url),
        run("pull", url, sae.id, "--home", tmp_path / "b"),
        run("pull", url, "train-000000000000", "--home", tmp_path / "b"),
    ]
    assert [done.returncode for done in outputs] == [0, 0, 0, 1], [done.stderr for done in outputs]
    assert sae.id in outputs[1].stdout
    assert outputs[2].stdout.splitlines()[-1] == sae.id
    secret = server.environment["AWS_SECRET_ACCESS_KEY"]
    assert not any(secret in done.stdout + done.stderr for done in outputs)
    assert not any(secret.encode() in path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file())


def test_a_server_that_dies_in_a_push_or_a_pull_loses_nothing(
    made: tuple[Workspace, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ours, sae = made
    harvest = ours.store.parent(sae, "activations")
    server = S3Server(tmp_path / "s3")
    server.start()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    remote = RemoteStore(f"s3://{BUCKET}/x")
    monkeypatch.setattr("storage.remote._RETRY", {"max_retries": 0})
    put, fetched = RemoteStore.put_file, 0

    def die_at_the_fourth(self: RemoteStore, *rest: object, **more: object) -> object:
        nonlocal fetched
        fetched += 1
        if fetched == 4:
            server.kill()
        return put(self, *rest, **more)  # type: ignore[arg-type]

    try:
        monkeypatch.setattr(RemoteStore, "put_file", die_at_the_fourth)
        with pytest.raises(RemoteError):
            sharing.push(harvest, RemoteStore(f"s3://{BUCKET}/x"), ours)
        monkeypatch.setattr(RemoteStore, "put_file", put)
        server.start()
        assert sharing.list_remote(remote) == []
        sharing.push(harvest, remote, ours)
        pulled, _ = sharing.pull(harvest.id, remote, workspace_in(tmp_path / "b"))
        assert contents(pulled) == contents(harvest)
    finally:
        server.kill()
