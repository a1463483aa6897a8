"""Artifacts shared through a folder and through a real S3 server: nothing half visible, only what is read moves."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.filesize import decimal

import sparsemill
from pipeline import cli, sharing, studies
from pipeline.analysis import ANALYSES
from pipeline.config import Runtime, load_preset
from pipeline.explaining import StageAnswer, explain_chain
from pipeline.progress import Plain, Quiet
from pipeline.sampling import sample as sample_of
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore, Result, Spec
from storage.errors import ArtifactNotFound, ConfigError, CorruptArtifact, InputError, RemoteConflict, RemoteError
from storage.reader import ShardReader
from storage.remote import RemoteStore
from tests.integration.s3 import BUCKET, SECRET, S3Server

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


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs the command line in this process; returns what it wrote to stdout and to stderr."""
    app = cli.app

    def run(*arguments: str | Path) -> tuple[str, str]:
        monkeypatch.setattr(cli, "app", partial(app, [*map(str, arguments)], result_action="return_value"))
        capfd.readouterr()
        cli.main()
        return capfd.readouterr()

    return run


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


def test_the_command_line_says_what_would_move_and_finds_the_remote_in_the_environment(
    made: tuple[Workspace, Artifact],
    url: str,
    tmp_path: Path,
    command: Callable[..., tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
):
    ours, sae = made
    harvest = ours.store.parent(sae, "activations")
    figures = {"id": harvest.id, "files": len(harvest.manifest.files), "bytes": harvest.manifest.total_bytes}
    said = f"{figures['files']:,} files, {decimal(figures['bytes'])}"  # type: ignore[arg-type]
    push = ("push", harvest.id, "--home", ours.store.root)
    monkeypatch.setenv("SPARSEMILL_REMOTE", url)
    out, _ = command(*push, "--dry-run", "--json")
    assert json.loads(out) == {"dry_run": True, "artifacts": [{**figures, "there": False}]}
    assert command(*push, "--dry-run")[0] == f"{harvest.id}: would push {said}\n"
    assert sharing.list_remote(RemoteStore(url)) == []
    out, err = command(*push)
    assert out == f"{harvest.id}: pushed {said}\n"
    assert f"push {harvest.id}: {decimal(figures['bytes'])} in " in err  # type: ignore[arg-type]
    out, _ = command(*push, "--dry-run", "--json")
    assert json.loads(out)["artifacts"] == [{"id": harvest.id, "files": 0, "bytes": 0, "there": True}]

    pull = ("pull", url, harvest.id, "--windows", "1%", "--home", tmp_path / "b")
    out, _ = command(*pull, "--dry-run")
    assert out.startswith(f"sample of 1 windows of {harvest.id}: would pull ")
    assert not (tmp_path / "b").exists()
    sample = workspace_in(tmp_path / "b").store.open(command(*pull)[0].splitlines()[-1])
    assert facts(sample)["windows"] == 1  # of 9: a share is rounded up
    assert sample.parents["sampled_from"].id == harvest.id


def test_a_command_publishes_what_it_made_and_what_it_found(
    made: tuple[Workspace, Artifact],
    tiny_preset: Path,
    url: str,
    command: Callable[..., tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
):
    ours, sae = made
    monkeypatch.setenv("SPARSEMILL_REMOTE", url)
    rest = ("--preset", tiny_preset, "--set", SHORT[0], "--home", ours.store.root, "--threads", "1", "--push")
    assert command("train", *rest)[0].startswith(sae.id)
    found = {pointer.id for pointer in sharing.list_remote(RemoteStore(url))}
    assert found == {one.id for one in sharing.lineage(sae, ours.store)}
    report = command("analyze", sae.id, "--only", "enc_dec", *rest)[0].split()[0]
    published = {pointer.id for pointer in sharing.list_remote(RemoteStore(url))} - found
    assert report in published
    assert {one.rpartition("-")[0] for one in published} == {"survey", "analyze", "report"}


def test_training_and_analysis_read_straight_from_the_remote_to_the_same_bytes(
    made: tuple[Workspace, Artifact], tiny_preset: Path, url: str, tmp_path: Path
):
    ours, sae = made
    sharing.push(sae, RemoteStore(url), ours, with_parents=True)
    theirs = workspace_in(tmp_path / "b")
    harvest_id = sae.parents["activations"].id
    activations = theirs.store.resolve(f"{url}/harvest/{harvest_id}", stage="harvest")
    trained = chain(tiny_preset, theirs, *SHORT).train(activations)
    assert trained.id == sae.id
    assert trained.read_bytes("autoencoder.safetensors") == sae.read_bytes("autoencoder.safetensors")
    there = theirs.store.resolve(f"{url}/train/{sae.id}", stage="train")
    findings = chain(tiny_preset, theirs, *SHORT).analyze(there, ["kurtosis"])
    expected = chain(tiny_preset, ours, *SHORT).analyze(sae, ["kurtosis"])
    assert facts(findings["kurtosis"]) == facts(expected["kurtosis"])
    assert not list((tmp_path / "b").rglob("activations/c/*"))  # chunks were read, no shard was fetched


def test_what_is_made_from_a_sample_does_not_pass_for_the_whole(
    made: tuple[Workspace, Artifact], tiny_preset: Path, tmp_path: Path
):
    ours, sae = made
    harvest = ours.store.parent(sae, "activations")
    (tmp_path / "shared").mkdir()
    remote = RemoteStore(str(tmp_path / "shared"))
    sharing.push(harvest, remote, ours, with_parents=True)
    theirs = workspace_in(tmp_path / "b")
    _, planned = sharing.pull(harvest.id, remote, theirs, windows="30%", dry_run=True)
    assert theirs.store.list() == []
    sample, moved = sharing.pull(harvest.id, remote, theirs, windows="30%", with_parents=True)
    assert facts(sample)["windows"] == 3  # of 9: 30 % rounded up
    assert moved[-1].id == sample.id
    assert 0 < planned[0].bytes < harvest.manifest.total_bytes / 2
    assert theirs.store.verify(sample) == []
    trained = chain(tiny_preset, theirs, *SHORT).train(sample)
    assert trained.id != sae.id
    assert trained.parents["activations"].id == sample.id
    larger, _ = sharing.pull(harvest.id, remote, theirs, windows="4")
    shard = "store.zarr/activations/c/0/0"
    assert (larger.folder / shard).samefile(sample.folder / shard)  # windows are kept once
    assert chain(tiny_preset, theirs).harvest().id == harvest.id  # the sample is not taken for it
    for wrong in ("0", "10", "0%", "101%", "half", "1.5", "-1", "3%x"):
        with pytest.raises(InputError, match="not a number of windows"):
            sharing.pull(harvest.id, remote, theirs, windows=wrong)
    with pytest.raises(InputError, match="only a whole harvest"):
        sample_of(sample, 1, theirs)


def test_what_stages_make_is_published_and_found_by_the_next_machine_and_no_secret_is_written(
    tiny_preset: Path, url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    pushing = Workspace.open(Runtime(root=tmp_path / "a", threads=1, remote=url, push=True), Plain())
    first = chain(tiny_preset, pushing, *SHORT)
    first.train()
    assert {pointer.id for pointer in sharing.list_remote(RemoteStore(url))} == {
        one.made.artifact.id for one in first.runs
    }
    second = chain(tiny_preset, workspace_in(tmp_path / "b", remote=url), *SHORT)
    second.train()
    assert [one.made.status for one in second.runs] == ["cached"] * 3
    assert [one.made.artifact for one in second.runs] != [one.made.artifact for one in first.runs]  # lent, not copied
    assert [one.made.artifact.manifest_sha256 for one in second.runs] == [
        one.made.artifact.manifest_sha256 for one in first.runs
    ]
    assert not [path for path in (tmp_path / "b").rglob("*") if path.is_file()]  # nothing of it was read
    second.analyze(only=["kurtosis"])
    for machine in ("a", "b"):
        written = [path for path in (tmp_path / machine).rglob("*") if path.is_file()]
        assert {"manifest.json", "run.json"} < {path.name for path in written}
        assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    out, err = capfd.readouterr()
    assert "push train-" in err
    assert SECRET not in out + err


def test_each_analysis_the_report_and_a_study_are_found_by_the_next_machine(tiny_preset: Path, tmp_path: Path):
    (tmp_path / "shared").mkdir()
    everything = f"analyze.analyses={json.dumps(list(ANALYSES))}"

    def run(machine: str, *, push: bool) -> Chain:
        runtime = Runtime(root=tmp_path / machine, threads=1, remote=str(tmp_path / "shared"), push=push)
        done = chain(tiny_preset, Workspace.open(runtime, Quiet()), *SHORT, everything)
        done.report()
        studies.cross_seed(2).run(done, None)
        return done

    first, second = run("a", push=True), run("b", push=False)
    ours, theirs = ({one.name: one.made for one in done.runs} for done in (first, second))
    alone = {name for name, analysis in ANALYSES.items() if "companions" not in analysis.requires}
    assert {"tokenize", "harvest", "train", "survey", *alone, "report", "study", "cross_seed"} <= ours.keys()
    assert {name for name, made in theirs.items() if made.status != "cached"} == set()
    hashes = [{name: one.artifact.manifest_sha256 for name, one in all_of.items()} for all_of in (ours, theirs)]
    assert hashes[0] == hashes[1]
    assert not list((tmp_path / "b").rglob("index.html"))
    for name in ("survey", "density", "cross_seed", "report"):  # what is read comes then
        mine, yours = ours[name].artifact, theirs[name].artifact
        assert all(yours.read_bytes(file) == mine.read_bytes(file) for file in mine.manifest.files)
    assert list((tmp_path / "b").rglob("index.html"))


def test_pushing_needs_a_remote(tmp_path: Path):
    with pytest.raises(ConfigError, match="SPARSEMILL_REMOTE"):
        Workspace.open(Runtime(root=tmp_path, remote=None, push=True), Quiet())


def test_a_notebook_opens_what_the_team_has(
    made: tuple[Workspace, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ours, sae = made
    (tmp_path / "shared").mkdir()
    url = (tmp_path / "shared").as_uri()
    sharing.push(sae, RemoteStore(url), ours, with_parents=True)
    with pytest.raises(ArtifactNotFound):
        sparsemill.open_sae(sae.id, root=tmp_path / "b")
    monkeypatch.setenv("SPARSEMILL_REMOTE", url)
    opened = sparsemill.open_sae(sae.id, root=tmp_path / "b")
    assert torch.equal(opened.W_dec, sparsemill.open_sae(sae.id, root=ours.store.root).W_dec)
    harvest = sae.parents["activations"].id
    rows = sparsemill.open_activations(harvest, root=tmp_path / "b").read(0, 8).rows
    np.testing.assert_array_equal(rows, sparsemill.open_activations(harvest, root=ours.store.root).read(0, 8).rows)


def test_pruning_names_what_it_leaves(tmp_path: Path, command: Callable[..., tuple[str, str]]):
    store = ArtifactStore(tmp_path / "store")
    old, other = (
        store.make(Spec("harvest", 1, {"seed": seed}), lambda _: Result({}), provenance={}).artifact for seed in (0, 1)
    )
    for one in (old, other):
        os.utime(one.folder / "manifest.json", (0, 0))
    with store.lock(old.id):
        out, err = command("artifacts", "prune", "--yes", "--home", store.root)
    assert err == f"  left harvest/{old.id}: another process works on it\n"
    assert f"harvest/{other.id}" in out
    assert store.list() == [old]


def test_it_is_explained_why_a_stage_would_run(made: tuple[Workspace, Artifact], tiny_preset: Path, tmp_path: Path):
    ours, sae = made
    before = [artifact.id for artifact in ours.store.list()]

    def ask(workspace: Workspace, *overrides: str) -> dict[str, StageAnswer]:
        return {one.name: one for one in explain_chain(load_preset(str(tiny_preset), [*SHORT, *overrides]), workspace)}

    changed = ask(ours, "train.autoencoder.l1_coeff=0.07")
    assert [changed[name].place for name in ("tokenize", "harvest", "train")] == ["here", "here", None]
    why = changed["train"].why
    assert why is not None
    assert why.nearest == sae.id
    assert [str(one) for one in why.differences] == ["config.autoencoder.l1_coeff: 0.05 there, 0.07 wanted"]
    assert changed["report"].place is None
    assert list(ask(ours, "harvest.window_prompts=128")) == ["tokenize", "harvest"]  # what follows cannot be known
    assert list(ask(workspace_in(tmp_path / "empty"))) == ["tokenize"]
    assert [artifact.id for artifact in ours.store.list()] == before
    assert not (tmp_path / "empty").exists()
