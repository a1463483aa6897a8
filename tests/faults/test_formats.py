"""Files of other format versions, checked in: refused naming both versions, and nothing is touched; ours stays read.

``tests/data/formats/version-0`` holds what this version writes (a harvest of 16 rows, the store's marker, a remote's
pointer), and a later version must read or refuse it; ``version-1`` the same files as a version to come might write
them: whole, sealed, and with the number raised.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import harvest, surveying, tokens, training
from pipeline.config import Runtime, load_preset
from pipeline.workspace import Workspace
from sae.config import TrainerConfig
from sae.trainer import Trainer
from storage.artifact import Artifact, open_folder
from storage.artifacts import ArtifactStore, Parent, Result, Spec, Staging
from storage.errors import UnsupportedFormat
from storage.fingerprint import seal_json, unseal_json
from storage.manifest import FORMAT_VERSION
from storage.reader import ShardReader
from storage.remote import RemoteStore
from storage.shared import read_pointer
from tests.faults.trees import tree
from tests.unit.storage.stores import activations

FORMATS = Path(__file__).parents[1] / "data" / "formats"
OURS, NEXT = FORMATS / "version-0", FORMATS / "version-1"
HARVEST = "harvest-43f65c6aa5c4"
BOTH = r"found version 1; expected 0"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return shutil.copytree(OURS, tmp_path / "store", ignore=shutil.ignore_patterns("pointer.json"))


def test_what_this_version_wrote_is_read(root: Path):
    assert FORMAT_VERSION == 0, (
        "a new format needs its own folder beside this one, and a refusal or a migration of this"
    )
    store = ArtifactStore(root)
    artifact = store.open(HARVEST)
    assert store.verify(artifact) == []
    batch = ShardReader.of(artifact).read(0, 16)
    expected = activations(ShardReader.of(artifact).layout)[batch.prompt, batch.position]
    np.testing.assert_allclose(batch.rows, expected, atol=0.05)
    assert sorted(zip(batch.prompt.tolist(), batch.position.tolist(), strict=True)) == [
        (prompt, position) for prompt in range(8) for position in (1, 2)
    ]


def marker(root: Path) -> None:
    shutil.copy(NEXT / "sparsemill-store.json", root)
    ArtifactStore(root)


def manifest(root: Path) -> None:
    shutil.copy(NEXT / "manifest.json", root / "harvest" / HARVEST)
    ArtifactStore(root).open(HARVEST)


def shards(root: Path) -> None:
    group = root / "harvest" / HARVEST / "store.zarr"
    shutil.copy(NEXT / "zarr.json", group)
    ShardReader(group.parent, HARVEST)


def pointer(root: Path) -> None:
    place = root / "remote" / "harvest" / HARVEST
    place.mkdir(parents=True)
    shutil.copy(NEXT / "pointer.json", place)
    read_pointer(RemoteStore(str(root / "remote")), HARVEST)


@pytest.mark.parametrize("read", [marker, manifest, shards, pointer])
def test_a_format_to_come_is_refused_naming_both_versions(read: Callable[[Path], None], root: Path):
    with pytest.raises(UnsupportedFormat, match=BOTH) as caught:
        read(root)
    assert caught.value.where is not None
    assert str(root) in caught.value.where


def test_a_store_to_come_is_not_written_to(root: Path):
    shutil.copy(NEXT / "sparsemill-store.json", root)
    before = tree(root)
    for _ in range(2):
        with pytest.raises(UnsupportedFormat, match=BOTH):
            Workspace.open(Runtime(root=root)).store.tags()
    assert tree(root) == before


@pytest.mark.parametrize("version", [FORMAT_VERSION, FORMAT_VERSION + 1])
def test_unfinished_work_of_a_format_to_come_begins_anew(version: int, tmp_path: Path):
    def first_unit(staging: Staging) -> Result:
        staging.write_bytes("w0", b"of another format")
        staging.finish("w0", ["w0"])
        raise _Trained

    def noted(staging: Staging) -> Result:
        begun.append((list(staging.finished), (staging.folder / "w0").exists()))
        return Result({})

    begun, store, spec = list[tuple[list[str], bool]](), ArtifactStore(tmp_path), Spec("train", 1, {})
    with pytest.raises(_Trained):
        store.make(spec, first_unit, provenance={})
    journal = tmp_path / ".staging" / spec.id / "journal.jsonl"
    header, line = journal.read_bytes().splitlines()
    header = unseal_json(header) | {"format_version": version}
    journal.write_bytes(seal_json(header) + b"\n" + line + b"\n")
    store.make(spec, noted, provenance={})
    assert begun == ([(["w0"], True)] if version == FORMAT_VERSION else [([], False)])


class _Trained(Exception):  # noqa: N818 - a signal
    pass


def test_a_checkpoint_to_come_is_refused_and_kept(root: Path, tiny_preset: Path, monkeypatch: pytest.MonkeyPatch):
    config = load_preset(str(tiny_preset)).train
    store = ArtifactStore(root)
    spec = training.spec(config, store.open(HARVEST))
    state: dict[str, Any] = json.loads((NEXT / "training-state.json").read_bytes())
    trainer = Trainer.start(TrainerConfig(**state["config"]), 2, torch.ones(8, 2), torch.ones(2), threads=1)
    workspace = Workspace.open(Runtime(root=root, threads=1))
    with pytest.raises(_Trained):
        store.make(spec, _saved(trainer, state), provenance=workspace.provenance())
    before = tree(root / ".staging")
    with pytest.raises(UnsupportedFormat, match=BOTH):
        training.train(config, store.open(HARVEST), workspace)
    after = tree(root / ".staging")
    assert {name: after.get(name) for name in before} == before


def _saved(trainer: Trainer, state: Mapping[str, Any]) -> Callable[[Staging], Result]:
    """A training that is stopped after its first checkpoint."""

    def produce(staging: Staging) -> Result:
        progress = training.Progress(training.ReadState(epoch=0, batch=1))
        training.Checkpoints(staging).save(_Stating(trainer, state), progress)  # type: ignore[arg-type]
        raise _Trained

    return produce


class _Stating:
    """A trainer that says something else of itself."""

    def __init__(self, trainer: Trainer, state: Mapping[str, Any]):
        self._trainer, self._state = trainer, state
        self.steps_taken = trainer.steps_taken

    def state_tensors(self) -> Mapping[str, torch.Tensor]:
        return self._trainer.state_tensors()

    def state_json(self) -> Mapping[str, Any]:
        return self._state


def _committed(root: Path, stage: str, version: int) -> Artifact:
    def produce(staging: Staging) -> Result:
        staging.write_bytes("nothing", b"")
        return Result({})

    parents = {"activations": Parent(HARVEST, open_folder(root / "harvest" / HARVEST).manifest_sha256)}
    return ArtifactStore(root).make(Spec(stage, version, {}, parents), produce, provenance={}).artifact


@pytest.mark.parametrize(
    ("stage", "current", "read"),
    [
        ("tokenize", tokens.OUTPUT_VERSION, tokens.TokenTable),
        ("harvest", harvest.OUTPUT_VERSION, harvest.recorded_config),
        ("train", training.OUTPUT_VERSION, training.load_autoencoder),
        ("survey", surveying.OUTPUT_VERSION, surveying.load_survey),
    ],
)
@pytest.mark.parametrize("off", [-1, 1])
def test_what_another_version_of_a_stage_wrote_is_refused_naming_both(
    stage: str, current: int, read: Callable[[Artifact], object], off: int, root: Path
):
    artifact = _committed(root, stage, current + off)
    with pytest.raises(UnsupportedFormat, match=f"{artifact.id}; found version {current + off}; expected {current}"):
        read(artifact)
