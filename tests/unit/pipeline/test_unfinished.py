import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import app
from pipeline.unfinished import so_far
from storage import atomic
from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.errors import InputError
from storage.fingerprint import Json
from storage.unfinished import Unfinished, note_failure

TOKENS: dict[str, Json] = {
    "train_tokens": 65_536 * 128 * 2 + 128, "held_out_tokens": 1000, "prompt_tokens": 128,
    "sources": [{"share": 0.5}, {"share": 0.5}],
}  # fmt: skip


def work(stage: str, units: list[str], **config: Json) -> Unfinished:
    spec = Spec(stage, 1, config)
    return Unfinished(spec.id, Path("x"), spec, tuple(units), 0, working=False, committed=False)


@pytest.mark.parametrize(
    ("unfinished", "expected"),
    [
        (work("harvest", ["window-00000", "window-00003"], n_windows=6), "2 of 6 windows"),
        (work("harvest", [], n_windows=1234), "0 of 1,234 windows"),
        (work("tokenize", ["train-00000"], **TOKENS), "1 of 3 rounds"),
        (work("train", [], autoencoder={"steps": 4000}), "0 of 4,000 steps"),
        (work("train", ["checkpoint-000001100", "checkpoint-000001200"], autoencoder={"steps": 4000}),
         "1,200 of 4,000 steps"),
        (work("train", ["checkpoint-000004000", "result"], autoencoder={"steps": 4000}), "4,000 of 4,000 steps"),
        (work("survey", []), "nothing yet"),
        (work("survey", ["state-000000098304.safetensors"]), "98,304 rows"),
        (work("survey", ["survey.safetensors"]), "1 of 1 passes"),
        (work("analyze", []), "nothing yet"),
        (work("analyze", ["a", "b"]), "2 parts"),
    ],
)  # fmt: skip
def test_units_are_those_of_the_stage(unfinished: Unfinished, expected: str):
    assert str(so_far(unfinished)) == expected


@pytest.mark.parametrize(
    "config",
    [
        {}, {"n_windows": None, "autoencoder": None}, {"n_windows": "many", "autoencoder": {"steps": []}},
        TOKENS | {"prompt_tokens": 0}, TOKENS | {"sources": [3]}, TOKENS | {"train_tokens": 10**400},
    ],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["tokenize", "harvest", "train", "survey"])
def test_of_a_config_or_units_that_are_others_only_the_parts_are_told(stage: str, config: dict[str, Json]):
    assert str(so_far(work(stage, ["other-x", "y"], **config))) == "2 parts"


def test_a_journal_that_cannot_be_read_tells_nothing():
    assert so_far(Unfinished("train-0123456789ab", Path("x"), None, (), 0, working=None, committed=False)) is None


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """With a tokens artifact, an interrupted harvest and a training of which nothing can be read."""
    store = ArtifactStore(tmp_path / "store")

    def produce_nothing(_: Staging) -> Result:
        return Result({})

    store.make(Spec("tokenize", 1, {}), produce_nothing, provenance={})

    def produce(staging: Staging) -> Result:
        staging.write_bytes("rows", b"x" * 3_000_000)
        staging.finish("window-00000", ["rows"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.make(Spec("harvest", 1, {"n_windows": 6}), produce, provenance={})
    (store.root / ".staging/train-0123456789ab").mkdir()
    return store


@pytest.fixture(autouse=True)
def locks_tell(tmp_path: Path) -> None:
    with atomic.exclusive_lock(tmp_path / "asked"):
        if atomic.is_locked(tmp_path / "asked") is None:
            pytest.skip("the system does not tell who holds a lock")


def listed(*arguments: object) -> None:
    app(["artifacts", "ls", *map(str, arguments)], result_action="return_value")


def test_the_list_ends_with_what_is_unfinished(store: ArtifactStore, capsys: pytest.CaptureFixture[str]):
    listed("--home", store.root)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    harvest = Spec("harvest", 1, {"n_windows": 6}).id
    assert lines[1].startswith("tokenize-")
    assert [" ".join(line.split()) for line in lines[3:6]] == [
        "unfinished kept on disk now",
        f"{harvest} 1 of 6 windows 2.9 MiB interrupted",
        "train-0123456789ab unreadable 0.0 MiB interrupted",
    ]
    assert lines[-1].startswith("The command that began it, given again, goes on with what is unfinished; ")
    with store.lock("train-0123456789ab"):
        listed("train", "--home", store.root)
    shown = capsys.readouterr().out
    assert "being made" in shown
    assert "goes on" not in shown
    assert harvest not in shown
    listed("tokenize", "--home", store.root)
    assert "unfinished" not in capsys.readouterr().out


def test_as_json_both_are_told_apart(store: ArtifactStore, capsys: pytest.CaptureFixture[str]):
    listed("--json", "--home", store.root)
    told: dict[str, list[dict[str, Any]]] = json.loads(capsys.readouterr().out)
    assert [one["stage"] for one in told["artifacts"]] == ["tokenize"]
    harvest, training = told["unfinished"]
    size = harvest.pop("disk_bytes")
    assert 3_000_000 < size < 3_100_000
    spec = Spec("harvest", 1, {"n_windows": 6})
    assert harvest == {
        "id": spec.id, "stage": "harvest", "folder": str(store.root / ".staging" / spec.id), "done": 1, "of": 6,
        "unit": "windows", "working": False, "committed": False, "failure": None,
    }  # fmt: skip
    assert (training["done"], training["of"], training["unit"]) == (None, None, None)


def test_an_artifact_that_is_made_again_is_told_to_be_there(store: ArtifactStore, capsys: pytest.CaptureFixture[str]):
    (artifact,) = store.list()
    (store.root / ".staging" / artifact.id / "files").mkdir(parents=True)
    listed("tokenize", "--home", store.root)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count(artifact.id) == 2
    assert "interrupted (an artifact of this id is there)" in shown


def test_what_an_error_ended_is_told_with_the_error(store: ArtifactStore, capsys: pytest.CaptureFixture[str]):
    harvest = Spec("harvest", 1, {"n_windows": 6}).id
    note_failure(store.root, harvest, InputError("not JSON", where="documents.jsonl:7"))
    listed("--home", store.root)
    shown = capsys.readouterr().out.splitlines()
    assert " ".join(shown[4].split()) == f"{harvest} 1 of 6 windows 2.9 MiB failed"
    assert f"{harvest} failed: not JSON; where: documents.jsonl:7" in shown
    listed("--json", "harvest", "--home", store.root)
    assert json.loads(capsys.readouterr().out)["unfinished"][0]["failure"] == "not JSON; where: documents.jsonl:7"
    with store.lock(harvest):  # somebody goes on with it
        listed("--home", store.root)
    assert "failed" not in capsys.readouterr().out
