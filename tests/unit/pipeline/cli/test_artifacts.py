import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import app
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.fingerprint import Json

RECORDS = ("manifest.json", "run.json")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def make(store: ArtifactStore, stage: str, config: Mapping[str, Json], **parents: Artifact) -> Artifact:
    def produce(_: Staging) -> Result:
        return Result({})

    spec = Spec(stage, 1, dict(config), {role: parent.as_parent() for role, parent in parents.items()})
    return store.make(spec, produce, provenance={}).artifact


def run(*arguments: object) -> None:
    app(["artifacts", *map(str, arguments)], result_action="return_value")


def test_a_list_says_when_each_was_made_and_what_tells_it_apart(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "40")  # of a terminal: what goes elsewhere has whole lines all the same
    first = make(store, "train", {"l1_coeff": 0.7, "steps": 10})
    second = make(store, "train", {"l1_coeff": 0.4, "steps": 10})
    alone = make(store, "report", {"title": "x"})
    run("tag", "baseline", first.id, "--home", store.root)
    capsys.readouterr()
    run("ls", "--home", store.root)
    head, *lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert head == "artifact made size files told apart by"
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d 0.0 MiB 0"
    for line, expected in zip(
        lines,
        [f"{alone.id} {when}", f"{second.id} {when} l1_coeff 0.4", f"{first.id} {when} tag baseline, l1_coeff 0.7"],
        strict=True,
    ):
        assert re.fullmatch(expected, line)
    run("ls", "train", "--json", "--home", store.root)
    listed: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["artifacts"]
    assert [(one["tags"], one["settings_apart"]) for one in listed] == [
        ([], {"l1_coeff": 0.4}), (["baseline"], {"l1_coeff": 0.7}),
    ]  # fmt: skip
    assert {one["status"] for one in listed} == {"made"}
    assert all(one["finished"] and one["seconds"] >= 0 for one in listed)


def test_where_there_is_nothing_to_list_it_says_what_there_is(store: ArtifactStore, capsys: pytest.CaptureFixture[str]):
    run("ls", "--home", store.root)
    assert "holds no artifacts yet: 'sparsemill replicate' makes" in capsys.readouterr().out
    assert not store.root.exists()
    make(store, "train", {})
    make(store, "harvest", {})
    run("ls", "trian", "--home", store.root)
    assert (
        capsys.readouterr().out.strip().endswith("has no artifact of a stage 'trian'; it has some of: harvest, train")
    )


def test_a_lineage_has_each_artifact_once_where_it_is_nearest(store: ArtifactStore, capsys: pytest.CaptureFixture[str]):
    tokens = make(store, "tokenize", {})
    sae = make(store, "train", {}, tokens=tokens)
    survey = make(store, "survey", {}, sae=sae)
    density = make(store, "analyze", {"analysis": "density"}, sae=sae, survey=survey)
    report = make(store, "report", {}, density=density, sae=sae)
    run("lineage", report.id, "--home", store.root)
    assert capsys.readouterr().out.splitlines() == [
        report.id,
        f"  density: {density.id}",
        f"    survey: {survey.id}",
        f"  sae: {sae.id}",
        f"    tokens: {tokens.id}",
    ]
    run("lineage", report.id, "--full", "--home", store.root)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert sum(tokens.id in line for line in lines) == 3


def test_the_folder_of_another_store_is_a_store_and_one_of_nothing_an_empty_remote(
    store: ArtifactStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    made = make(store, "train", {})
    run("ls", store.root, "--home", tmp_path / "mine")
    assert made.id in capsys.readouterr().out
    (tmp_path / "team").mkdir()
    run("ls", tmp_path / "team", "--home", store.root)
    assert capsys.readouterr().out == f"file://{tmp_path}/team holds no artifacts; 'sparsemill push' publishes some\n"


def test_where_nothing_is_to_be_removed_it_says_why(store: ArtifactStore, capsys: pytest.CaptureFixture[str]):
    make(store, "train", {})
    run("prune", "--home", store.root)
    assert capsys.readouterr().out == "nothing to remove: all is needed, or younger than 30 days\n"


def test_pruning_lists_and_only_with_yes_removes(store: ArtifactStore, capsys: pytest.CaptureFixture[str]):
    made = make(store, "train", {})
    before = everything_below(store.root)
    prune = ("prune", "--older-than", "0", "--home", store.root)
    run(*prune)
    listed = capsys.readouterr().out
    assert f"train/{made.id}" in listed
    assert listed.endswith("would be free; the same command with --yes removes them\n")
    run(*prune, "--json")
    assert [one["path"] for one in json.loads(capsys.readouterr().out)] == [str(made.folder)]
    assert everything_below(store.root) == before
    run(*prune, "--yes")
    assert f"train/{made.id}" in capsys.readouterr().out
    assert store.list() == []
    assert not made.folder.exists()


def everything_below(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_is_taken_of_the_disk_is_told_stage_by_stage_and_a_shared_file_once(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str]
):
    def produce(staging: Staging) -> Result:
        staging.write_bytes("rows", bytes(3 << 20))
        return Result({})

    first = store.make(Spec("harvest", 1, {"windows": 1}), produce, provenance={}).artifact
    longer = store.make(Spec("harvest", 1, {"windows": 2}), produce, provenance={}).artifact
    (longer.folder / "rows").unlink()
    (longer.folder / "rows").hardlink_to(first.folder / "rows")  # as a longer harvest has a shorter one's windows
    make(store, "train", {})
    (store.root / ".staging" / "train-0123456789ab").mkdir(parents=True)
    (store.root / ".staging" / "train-0123456789ab" / "half").write_bytes(bytes(1 << 20))

    run("du", "--home", store.root)
    head, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["stage", "artifacts", "size", "on", "disk"]
    assert lines == [
        ["harvest", "2", "6.0", "MiB", "3.0", "MiB"],
        ["train", "1", "0.0", "MiB", "0.0", "MiB"],
        [".staging", "1", "1.0", "MiB", "1.0", "MiB"],
        ["all", "7.0", "MiB", "4.0", "MiB"],
    ]
    run("du", "--json", "--home", store.root)
    told = {one.pop("name"): one for one in json.loads(capsys.readouterr().out)}
    assert list(told) == ["harvest", "train", ".staging"]
    assert told["harvest"]["count"] == 2
    manifests = sum((one.folder / name).stat().st_size for one in (first, longer) for name in RECORDS)
    assert told["harvest"]["apparent_bytes"] == 2 * (3 << 20) + manifests
    assert 3 << 20 <= told["harvest"]["disk_bytes"] < 4 << 20
