import os
import shutil
import time
from pathlib import Path

import pytest

from storage import atomic
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.errors import CorruptArtifact
from storage.housekeeping import plan_pruning, prune, usage


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def make(store: ArtifactStore, stage: str, *parents: Artifact, seed: int = 0, data: bytes = b"x" * 5000) -> Artifact:
    def produce(staging: Staging) -> Result:
        staging.write_bytes("data", data)
        return Result({})

    spec = Spec(stage, 1, {"seed": seed}, {parent.stage: parent.as_parent() for parent in parents})
    return store.make(spec, produce, provenance={}).artifact


def begin(store: ArtifactStore, *parents: Artifact) -> str:
    """Leaves a staging folder behind, as a killed stage does."""
    spec = Spec("train", 1, {"seed": "begun"}, {parent.stage: parent.as_parent() for parent in parents})

    def die(staging: Staging) -> Result:
        staging.write_bytes("unit", b"y" * 5000)
        staging.finish("unit", ["unit"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.make(spec, die, provenance={})
    return spec.id


def age(path: Path, days: float = 100) -> None:
    then = time.time() - days * 86400
    for one in (path, *path.rglob("*")):
        os.utime(one, (then, then))


def planned(store: ArtifactStore, days: float = 30) -> list[str]:
    return [removal.artifact_id for removal in plan_pruning(store, older_than_days=days)]


def test_what_a_tag_or_something_young_was_made_from_is_needed(store: ArtifactStore):
    tokens = make(store, "tokenize")
    harvest = make(store, "harvest", tokens)
    kept, young, old = (make(store, "train", harvest, seed=seed) for seed in range(3))
    analysis = make(store, "analyze", old)
    lonely = make(store, "harvest", tokens, seed=1)
    age(store.root)
    os.utime(young.folder / "manifest.json")
    assert set(planned(store)) == {analysis.id, old.id, lonely.id, kept.id}
    store.tag("good", kept)
    found = planned(store)
    assert set(found) == {analysis.id, old.id, lonely.id}
    assert found.index(analysis.id) < found.index(old.id)  # children first
    assert planned(store, days=200) == []


def test_a_plan_removes_nothing_and_pruning_removes_just_that(store: ArtifactStore):
    tokens = make(store, "tokenize")
    old = make(store, "train", tokens)
    age(store.root)
    plan = plan_pruning(store, older_than_days=30)
    assert {artifact.id for artifact in store.list()} == {tokens.id, old.id}
    store.tag("text", tokens)
    assert [one.artifact_id for one in prune(store, older_than_days=30)] == [old.id]
    assert [one.artifact_id for one in plan] == [old.id, tokens.id]
    assert store.list() == [tokens]
    assert not list((store.root / ".removed").iterdir())
    assert store.verify(tokens) == []


def test_stale_work_goes_and_what_unfinished_work_needs_stays(store: ArtifactStore):
    harvest = make(store, "harvest")
    begun = begin(store, harvest)
    assert planned(store, days=30) == []
    age(store.root / "harvest")
    assert planned(store) == []  # what is begun needs it
    age(store.root)
    removed = prune(store, older_than_days=30)
    assert [(one.artifact_id, one.committed) for one in removed] == [(begun, False)]
    assert not (store.root / ".staging" / begun).exists()
    assert planned(store) == [harvest.id]


def test_what_someone_works_on_is_left_with_all_it_was_made_from(store: ArtifactStore):
    tokens = make(store, "tokenize")
    harvest = make(store, "harvest", tokens)
    age(store.root)
    with store.lock(harvest.id):
        assert prune(store, older_than_days=30) == []
    assert len(prune(store, older_than_days=30)) == 2


def test_what_is_needed_by_the_time_it_would_go_is_left_and_told(store: ArtifactStore):
    tokens = make(store, "tokenize")
    made = [make(store, "harvest", tokens, seed=seed) for seed in range(6)]
    first, tagged, trained_on, begun_on, touched, gone = sorted(made, key=lambda one: one.id)  # as they would go
    age(store.root)

    def meanwhile(_operation: str, path: Path) -> None:
        if path == store.root / ".removed" / first.id:
            atomic.set_fault_hook(None)
            store.tag("good", tagged)
            make(store, "train", trained_on)
            begin(store, begun_on)
            os.utime(touched.folder / "manifest.json")

    left: dict[str, str] = {}
    atomic.set_fault_hook(meanwhile)
    try:
        removed = prune(store, older_than_days=30, on_left=lambda one, why: left.update({one.artifact_id: why}))
    finally:
        atomic.set_fault_hook(None)
    assert [one.artifact_id for one in removed] == [first.id, gone.id]
    needed = [tagged, trained_on, begun_on, tokens]
    assert left == {one.id: "it is needed by now" for one in needed} | {touched.id: "it was changed meanwhile"}
    assert {one.id for one in store.list("harvest")} == {one.id for one in made} - {first.id, gone.id}


def test_what_another_removed_or_made_again_meanwhile_is_no_error(store: ArtifactStore):
    tokens = make(store, "tokenize")
    seeds = {make(store, "harvest", tokens, seed=seed).id: seed for seed in range(2)}
    first, second = sorted(seeds)  # as they would go
    age(store.root)

    def meanwhile(_operation: str, path: Path) -> None:
        if path == store.root / ".removed" / second:
            atomic.set_fault_hook(None)
            make(store, "harvest", tokens, seed=seeds[first])
            shutil.rmtree(tokens.folder)

    left: list[tuple[str, str]] = []
    atomic.set_fault_hook(meanwhile)
    try:
        removed = prune(store, older_than_days=30, on_left=lambda one, why: left.append((one.artifact_id, why)))
    finally:
        atomic.set_fault_hook(None)
    assert [one.artifact_id for one in removed] == [first, second]
    assert left == [(tokens.id, "it has gone already")]
    assert [one.id for one in store.list()] == [first]


def test_a_damaged_manifest_stops_it_all(store: ArtifactStore):
    make(store, "tokenize")
    broken = make(store, "harvest")
    age(store.root)
    (broken.folder / "manifest.json").write_bytes(b"{}")
    with pytest.raises(CorruptArtifact):
        prune(store, older_than_days=0)
    assert len(store.ids()) == 2


def test_a_shared_file_is_counted_once_and_freed_with_its_last_name(store: ArtifactStore):
    first, second = make(store, "harvest"), make(store, "harvest", seed=1)
    (second.folder / "data").unlink()
    (second.folder / "data").hardlink_to(first.folder / "data")
    (one,) = usage(store)
    assert (one.name, one.count) == ("harvest", 2)
    sizes = [path.stat() for path in store.root.glob("harvest/*/*")]
    assert one.apparent_bytes == sum(stat.st_size for stat in sizes)
    assert one.disk_bytes == sum({stat.st_ino: stat.st_blocks * 512 for stat in sizes}.values())
    age(store.root)
    store.tag("kept", second)
    (removal,) = plan_pruning(store, older_than_days=30)
    assert removal.disk_bytes == sum(stat.st_blocks * 512 for stat in sizes if stat.st_nlink == 1) // 2


def test_usage_names_what_is_unfinished_and_what_was_pulled(store: ArtifactStore):
    begin(store)
    (store.root / ".pulled" / "train-000000000000" / "x").mkdir(parents=True)
    (store.root / ".pulled" / "train-000000000000" / "x" / "f").write_bytes(b"z" * 10)
    assert [(one.name, one.count) for one in usage(store)] == [(".staging", 1), (".pulled", 1)]
    assert usage(store)[1].apparent_bytes == 10
