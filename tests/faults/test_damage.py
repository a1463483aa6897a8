"""Damage to every kind of file of every kind of artifact: named by whoever reads it, and by ``verify``; never believed.

A *kind of file* is a name with its numbers left out. Damage is a flipped bit, a file cut short, emptied, made longer,
filled with zeros, swapped with another, removed, or one too many. Whoever reads an artifact is every reader that the
pipeline has for its stage; each says what it read, to be compared with what it read before.
"""

import hashlib
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import analyzing, directions, harvest, studies, surveying, training
from pipeline.checkpoints.exporting import export_autoencoder
from pipeline.checkpoints.importing import import_checkpoint
from pipeline.config import Runtime, load_preset
from pipeline.progress import Quiet
from pipeline.repair import repair
from pipeline.stages import Chain, run_directly
from pipeline.tokens import TokenTable
from pipeline.workspace import Workspace
from storage.artifact import Artifact, open_folder
from storage.errors import CorruptArtifact, SparsemillError
from storage.reader import BatchOrder, ShardReader
from tests.faults.lengths import times
from tests.faults.trees import tree

SETTINGS = (
    "harvest.encoding=uint8", "harvest.n_windows=2", "harvest.window_prompts=64", "harvest.chunk_rows=16",
    "train.pool_rows=512", "train.autoencoder.steps=5", "train.autoencoder.density_window_rows=512",
    'analyze.analyses=["density", "loss_recovered", "null_space"]',
)  # fmt: skip
STAGES = ("tokenize", "harvest", "train", "survey", "analyze", "report", "import", "directions", "study")
DAMAGES = ("flip", "cut", "empty", "longer", "zeros", "swap", "remove")
ORDER = BatchOrder(seed=0, batch_rows=96, pool_rows=512, lanes=8)


@pytest.fixture(scope="module")
def whole(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace.open(Runtime(root=tmp_path_factory.mktemp("run") / "store", threads=1), Quiet())
    chain = Chain(load_preset(str(tiny_preset), SETTINGS), workspace, run_directly)
    chain.report()
    activations, sae = chain.harvest(), chain.train()
    exported = tmp_path_factory.mktemp("exported")
    export_autoencoder(sae, "safetensors", exported, workspace)
    import_checkpoint(str(exported), workspace, activations=activations)
    directions.mean_direction(sae, [0, 1], workspace)
    varied = studies.cross_seed(2).trainings(chain, sae)
    studies._record("cross_seed", sae, varied, workspace)  # pyright: ignore[reportPrivateUsage]
    return workspace


@pytest.fixture
def workspace(whole: Workspace, tmp_path: Path) -> Workspace:
    root = shutil.copytree(whole.store.root, tmp_path / "store")
    return Workspace.open(Runtime(root=root, threads=1), Quiet())


def one_of(stage: str, workspace: Workspace) -> list[Artifact]:
    found = workspace.store.list(stage)
    assert found
    return found


def read_tokens(artifact: Artifact, _: Path) -> Any:
    table = TokenTable(artifact)
    splits = [[table.prompts(s), table.column(s, "source"), table.column(s, "document")] for s in ("train", "held_out")]
    return [splits, table.documents()]


def read_harvest(artifact: Artifact, scratch: Path) -> Any:
    reader = ShardReader.of(artifact)
    batches = [*reader.sequential(128, prefetch=0), *reader.epoch(ORDER, prefetch=0)]
    harvest.write_shared_files(artifact, scratch / "shared")  # what a repair, or a longer harvest, folds them into
    shutil.rmtree(scratch / "shared")
    config, layout = harvest.recorded_config(artifact), harvest.recorded_layout(artifact)
    seen = [[batch.rows, batch.prompt, batch.position] for batch in batches]
    at = reader.rows_at(batches[0].prompt, batches[0].position)
    return [
        seen,
        at,
        harvest.mean_activation(artifact),
        config,
        layout,
    ]


def read_autoencoder(artifact: Artifact, _: Path) -> Any:
    sae = training.load_autoencoder(artifact)
    return [[t.detach().numpy() for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)], training.settings(artifact)]


def read_training(artifact: Artifact, _: Path) -> Any:
    said = [training.training_log(artifact), training.read_directions(artifact)]
    return [read_autoencoder(artifact, _), said, training.training_densities(artifact)._asdict()]


def read_directions(artifact: Artifact, _: Path) -> Any:
    found = training.read_directions(artifact)
    return None if found is None else found.numpy()


def read_survey(artifact: Artifact, _: Path) -> Any:
    return vars(surveying.load_survey(artifact))


def read_analysis(artifact: Artifact, _: Path) -> Any:
    found = analyzing.load_result(artifact)
    return [found.numbers, found.tables, {name: str(figure) for name, figure in found.figures.items()}, found.reading]


def read_all(artifact: Artifact, _: Path) -> Any:
    return {name: artifact.read_bytes(name) for name in artifact.manifest.files}


READERS: Mapping[str, Callable[[Artifact, Path], Any]] = {
    "tokenize": read_tokens, "harvest": read_harvest, "train": read_training, "survey": read_survey,
    "analyze": read_analysis, "report": read_all, "import": read_autoencoder, "directions": read_directions,
    "study": read_all,
}  # fmt: skip


def digest(value: Any) -> str:
    """Of anything that a reader returns."""
    found = hashlib.sha256()

    def add(one: Any) -> None:
        if isinstance(one, np.ndarray):
            found.update(f"{one.shape}{one.dtype}".encode() + np.ascontiguousarray(one).tobytes())
        elif isinstance(one, pa.Table):
            found.update(repr(one.to_pylist()).encode())
        elif isinstance(one, dict):
            add([part for item in sorted(one.items(), key=str) for part in item])
        elif isinstance(one, list | tuple):
            found.update(str(len(one)).encode())
            for part in one:
                add(part)
        else:
            found.update(repr(one).encode())

    add(value)
    return found.hexdigest()


def kind_of(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def by_kind(artifact: Artifact) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in sorted(artifact.manifest.files):
        kinds.setdefault(kind_of(name), []).append(name)
    return kinds


def damage(path: Path, kind: str, other: Path, offset: int) -> set[Path]:
    """Damages a file; returns those that are not what they were."""
    data = path.read_bytes()
    wrong: bytes | None = {
        "flip": data[:offset] + bytes([data[offset] ^ 1 << offset % 8]) + data[offset + 1 :] if data else b"\x01",
        "cut": data[:offset], "empty": b"", "longer": data + b"\0", "zeros": bytes(len(data)),
        "swap": other.read_bytes(),
    }.get(kind)  # fmt: skip
    if kind == "swap":
        other.write_bytes(data)
    path.unlink()
    if wrong is not None:
        path.write_bytes(wrong)
    return set() if wrong == data else {path, other} if kind == "swap" else {path}


def is_named(name: str, text: str) -> bool:
    """Whether a message has this file's name, not as a part of another's."""
    return re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w/.-])", text) is not None


def read_or_refuse(artifact: Artifact, expected: str, wrong: set[str], scratch: Path) -> bool:
    """Whether the artifact is refused, naming itself and a wrong file and no other; what is read must be right."""
    try:
        found = digest(READERS[artifact.stage](artifact, scratch))
    except SparsemillError as error:
        text = f"{error}"
        named = {name for name in artifact.manifest.files if is_named(name, text)}
        assert artifact.id in text, text
        assert named, f"{wrong}: {text}"
        assert named <= wrong, f"{wrong}: {text}"
        return True
    assert found == expected, f"{artifact.id}: read wrongly with {wrong}"
    return False


def test_every_damage_to_every_kind_of_file_is_named_and_none_is_believed(whole: Workspace, tmp_path: Path):
    tried, refused, rng = Counter[str](), Counter[str](), random.Random(0)
    for stage in STAGES:
        for artifact in one_of(stage, whole):
            expected = digest(READERS[stage](artifact, tmp_path))
            names = sorted(artifact.manifest.files)
            for same_kind in by_kind(artifact).values():
                for kind in DAMAGES:
                    for _ in range(times(1, 25) if kind in {"flip", "cut", "swap"} else 1):
                        name = rng.choice(same_kind)
                        others = [other for other in same_kind if other != name] or [n for n in names if n != name]
                        others = others or [name]
                        path, other = artifact.folder / name, artifact.folder / rng.choice(others)
                        kept = {place: place.read_bytes() for place in (path, other)}
                        try:
                            changed = damage(path, kind, other, rng.randrange(max(1, len(kept[path]))))
                            wrong = {place.relative_to(artifact.folder).as_posix() for place in changed}
                            assert {problem.name for problem in whole.store.verify(artifact)} == wrong
                            if wrong:
                                tried[f"{stage} {kind}"] += 1
                                refused[stage] += read_or_refuse(artifact, expected, wrong, tmp_path)
                        finally:
                            for place, data in kept.items():
                                place.write_bytes(data)
            assert whole.store.verify(artifact) == []
    print(f"{sum(tried.values())} damages of {len(tried)} sorts, {sum(refused.values())} refused: {dict(tried)}")
    assert len(tried) == len(STAGES) * len(DAMAGES) - 3  # three are one file, which has none to be swapped with
    assert sum(refused.values()) == sum(tried.values())


@pytest.mark.parametrize("stage", STAGES)
def test_verify_lists_all_that_is_wrong(stage: str, workspace: Workspace):
    (artifact, *_) = one_of(stage, workspace)
    for number, name in enumerate(sorted(artifact.manifest.files)):
        damage(artifact.folder / name, ("flip", "cut", "remove", "longer")[number % 4], artifact.folder / name, 0)
    (artifact.folder / "extra").mkdir()
    (artifact.folder / "extra" / "file").write_bytes(b"x")
    expected = dict.fromkeys(("extra/file",), "extra") | dict.fromkeys(artifact.manifest.files, "damaged")
    found = {problem.name: problem.kind for problem in workspace.store.verify(artifact)}
    assert found.keys() == expected.keys()
    assert found["extra/file"] == "extra"


@pytest.mark.parametrize("stage", STAGES)
@settings(max_examples=times(15, 1000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=st.data())
def test_no_bit_of_a_manifest_can_be_flipped_unseen(stage: str, whole: Workspace, choice: st.DataObject):
    path = one_of(stage, whole)[0].folder / "manifest.json"
    data = path.read_bytes()
    bit = choice.draw(st.integers(0, 8 * len(data) - 1))
    try:
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        with pytest.raises(SparsemillError, match=re.escape(str(path))):
            open_folder(path.parent)
        with pytest.raises(SparsemillError, match=re.escape(str(path))):
            whole.store.resolve("latest", stage=stage)
    finally:
        path.write_bytes(data)


@settings(max_examples=times(6, 150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=st.data())
def test_a_damaged_harvest_is_mended_to_its_first_bytes(whole: Workspace, choice: st.DataObject):
    (artifact,) = one_of("harvest", whole)
    before, kinds = tree(artifact.folder), by_kind(artifact)
    kept = {name: (artifact.folder / name).read_bytes() for name in artifact.manifest.files}
    try:
        for kind in choice.draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=3, unique=True)):
            name, other = (choice.draw(st.sampled_from(kinds[kind])) for _ in range(2))
            offset = choice.draw(st.integers(0, max(0, len(kept[name]) - 1)))
            damage(artifact.folder / name, choice.draw(st.sampled_from(DAMAGES)), artifact.folder / other, offset)
        problems = whole.store.verify(artifact)
        repair(artifact, problems, whole)
        assert whole.store.verify(artifact) == []
        assert tree(artifact.folder) == before
    finally:
        for name, data in kept.items():
            (artifact.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (artifact.folder / name).write_bytes(data)


def test_a_stage_that_meets_damage_makes_nothing_of_it(workspace: Workspace, tiny_preset: Path):
    """Another autoencoder over each damaged parent: refused, and nothing new is committed."""
    preset = load_preset(str(tiny_preset), (*SETTINGS, "train.reader_seed=9"))
    (activations,) = one_of("harvest", workspace)
    kinds = by_kind(activations)
    for kind in (kind for kind in kinds if "zarr.json" not in kind and "window" not in kind):
        path = activations.folder / kinds[kind][0]
        data, before = path.read_bytes(), workspace.store.ids()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(CorruptArtifact, match=activations.id):
            training.train(preset.train, activations, workspace)
        assert workspace.store.ids() == before
        path.write_bytes(data)
