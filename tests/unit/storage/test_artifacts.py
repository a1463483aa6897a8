import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from storage import atomic
from storage.artifacts import Artifact, ArtifactStore, Made, Parent, Result, Spec, Staging
from storage.errors import (
    AmbiguousReference,
    ArtifactNotFound,
    CorruptArtifact,
    InputError,
    NotAStore,
    StorageFull,
    UnsupportedFormat,
)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def make(store: ArtifactStore, seed: int = 1, stage: str = "harvest", parents: dict[str, Parent] | None = None) -> Made:
    def produce(staging: Staging) -> Result:
        for unit in ("w0", "w1"):
            if unit not in staging.finished:
                staging.write_bytes(f"{unit}/data", f"{seed} {unit}".encode() * 100)
                staging.finish(unit, [f"{unit}/data"], {"rows": 5})
        staging.write_json("summary.json", {"seed": seed})
        return Result({"rows": sum(int(str(data["rows"])) for data in staging.finished.values())})

    return store.make(Spec(stage, 1, {"seed": seed}, parents or {}), produce, provenance={"device": "cpu"})


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def spec_of(seed: int) -> Spec:
    return Spec("harvest", 1, {"seed": seed})


def test_what_was_made_is_found_and_not_made_again(store: ArtifactStore):
    assert store.find(spec_of(1)) is None
    made = make(store)
    assert made.status == "made"
    again = make(store)
    assert (again.status, again.artifact) == ("cached", made.artifact)
    assert store.find(spec_of(1)) == made.artifact


def test_an_artifact_lies_under_its_stage_and_id_and_nothing_else_is_left(store: ArtifactStore):
    made = make(store)
    assert made.artifact.folder == store.root / "harvest" / made.artifact.id
    names = {name for name in contents(store.root) if not name.startswith(".locks/")}
    inside = f"harvest/{made.artifact.id}"
    files = ["manifest.json", "run.json", "summary.json", "w0/data", "w1/data"]
    assert names == {"sparsemill-store.json", *(f"{inside}/{name}" for name in files)}
    assert list((store.root / ".staging").iterdir()) == []


def test_two_stores_make_the_same_bytes_but_for_the_run(tmp_path: Path):
    folders = [make(ArtifactStore(tmp_path / name)).artifact.folder for name in ("a", "b")]
    first, second = ({k: v for k, v in contents(folder).items() if k != "run.json"} for folder in folders)
    assert first == second


def test_run_json_tells_when_and_where_and_is_not_in_the_manifest(store: ArtifactStore):
    artifact = make(store).artifact
    run = json.loads((artifact.folder / "run.json").read_bytes())
    assert run["pid"] == os.getpid()
    assert run["started"] <= run["finished"]
    assert "run.json" not in artifact.manifest.files


def test_a_failed_stage_resumes_from_its_journal(store: ArtifactStore, tmp_path: Path):
    class StopError(Exception): ...

    def fail(staging: Staging) -> Result:
        staging.write_bytes("w0/data", b"1 w0" * 100)
        staging.finish("w0", ["w0/data"], {"rows": 5})
        staging.write_bytes("w1/data", b"half")
        raise StopError

    with pytest.raises(StopError):
        store.make(spec_of(1), fail, provenance={"device": "cpu"})
    assert store.find(spec_of(1)) is None
    assert store.ids() == []
    made = make(store)
    assert made.status == "resumed"
    clean = make(ArtifactStore(tmp_path / "clean")).artifact
    assert made.artifact.manifest_sha256 == clean.manifest_sha256


def test_work_under_another_provenance_is_not_continued(store: ArtifactStore):
    def fail(staging: Staging) -> Result:
        staging.write_bytes("w0/data", b"of the other device")
        staging.finish("w0", ["w0/data"], {"rows": 5})
        raise InputError("stop")

    with pytest.raises(InputError):
        store.make(spec_of(1), fail, provenance={"device": "cuda"})
    made = make(store)
    assert made.status == "made"
    assert made.artifact.read_bytes("w0/data") == b"1 w0" * 100


def full_disk(operation: str, number: int) -> atomic.FaultHook:
    """A hook under which the disk is full at the ``number``-th such operation, and only then."""
    left = [number]

    def hook(current: str, path: Path) -> None:
        if current == operation:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.ENOSPC, "No space left on device")

    return hook


@pytest.mark.parametrize("operation", ["fsync", "rename", "append", "write", "mkdir", "fsync-folder"])
def test_a_disk_full_at_any_step_commits_nothing_and_the_same_call_finishes_later(tmp_path: Path, operation: str):
    clean = make(ArtifactStore(tmp_path / "clean")).artifact.manifest_sha256
    for number in range(100):
        store = ArtifactStore(tmp_path / f"{operation}-{number}")
        atomic.set_fault_hook(full_disk(operation, number))
        try:
            make(store)
        except StorageFull:
            failed = True
        else:
            failed = False
        finally:
            atomic.set_fault_hook(None)
        found = store.find(spec_of(1))
        assert found is None or found.manifest_sha256 == clean
        assert make(store).artifact.manifest_sha256 == clean
        if not failed:
            assert number > 0
            return
    pytest.fail("the operation failed a hundred times")


def test_a_folder_without_a_manifest_is_no_artifact_and_is_replaced(store: ArtifactStore):
    artifact = make(store).artifact
    (artifact.folder / "manifest.json").unlink()
    assert store.find(spec_of(1)) is None
    assert store.ids() == []
    assert make(store).status == "made"
    assert store.verify(artifact) == []


def test_open_and_find_name_a_damaged_manifest(store: ArtifactStore):
    artifact = make(store).artifact
    path = artifact.folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"harvest", b"hervest", 1))
    for opened in (lambda: store.open(artifact.id), lambda: store.find(spec_of(1)), lambda: make(store)):
        with pytest.raises(CorruptArtifact, match=r"manifest\.json"):
            opened()


def test_newest_first_and_latest(store: ArtifactStore):
    artifacts = [make(store, seed).artifact for seed in (1, 2, 3)]
    for age, artifact in zip((30, 10, 20), artifacts, strict=True):
        os.utime(artifact.folder / "manifest.json", (1e9 - age, 1e9 - age))
    other = make(store, stage="train").artifact
    os.utime(other.folder / "manifest.json", (1e9 - 99, 1e9 - 99))
    newest = [artifacts[1].id, artifacts[2].id, artifacts[0].id]
    assert [artifact.id for artifact in store.list("harvest")] == newest
    assert store.ids() == [*newest, other.id]
    assert store.resolve("latest").id == newest[0]
    assert store.resolve("latest", stage="train").id == other.id


def test_ids_prefixes_tags_and_paths_resolve(store: ArtifactStore, tmp_path: Path):
    first, second = (make(store, seed).artifact for seed in (1, 2))
    store.tag("best", first)
    digits = first.id.removeprefix("harvest-")
    for reference in (first.id, first.id[:12], digits[:6], "best", str(first.folder)):
        assert store.resolve(reference) == first
    store.tag("best", second)
    assert store.resolve("best") == second
    assert store.tags() == {"best": second.id}


def test_a_path_in_another_store_resolves(store: ArtifactStore, tmp_path: Path):
    elsewhere = make(ArtifactStore(tmp_path / "elsewhere")).artifact
    assert store.resolve(str(elsewhere.folder)) == elsewhere


def test_a_reference_to_several_artifacts_names_them(store: ArtifactStore):
    ids = sorted(make(store, seed).artifact.id for seed in range(3))
    with pytest.raises(AmbiguousReference) as caught:
        store.resolve("harvest")
    assert all(artifact_id in str(caught.value) for artifact_id in ids)


def test_a_mistyped_reference_is_answered_with_the_nearest_names(store: ArtifactStore):
    artifacts = [make(store, seed).artifact for seed in range(8)]
    oldest = artifacts[0]
    store.tag("baseline", oldest)
    dropped = f"{oldest.id[:10]}{oldest.id[11:]}"
    for mistyped, meant in ((dropped, oldest.id), ("basline", "baseline")):
        with pytest.raises(ArtifactNotFound) as caught:
            store.resolve(mistyped)
        assert str(caught.value.expected).startswith(f"one of {meant}, ")


def test_in_an_empty_store_an_error_says_what_makes_something(store: ArtifactStore):
    with pytest.raises(ArtifactNotFound, match="sparsemill replicate"):
        store.resolve("latest")


@pytest.mark.parametrize("reference", ["", "nothing", "latest", "harvest-0123456789ab", "./nowhere", "../*", "*"])
def test_what_names_nothing_is_not_found(store: ArtifactStore, reference: str):
    with pytest.raises(ArtifactNotFound):
        store.resolve(reference)


def test_another_stage_does_not_answer(store: ArtifactStore):
    artifact = make(store).artifact
    store.tag("best", artifact)
    for reference in (artifact.id, "best", artifact.id[:12], "latest", str(artifact.folder)):
        with pytest.raises(ArtifactNotFound):
            store.resolve(reference, stage="train")


@pytest.mark.parametrize("name", ["", "latest", "a/b", "../x", ".x", "1x", "harvest-0123456789ab", "a b"])
def test_bad_tags_are_refused(store: ArtifactStore, name: str):
    with pytest.raises(InputError):
        store.tag(name, make(store).artifact)


def test_a_damaged_tag_is_an_error(store: ArtifactStore):
    store.tag("best", make(store).artifact)
    (store.root / ".tags/best").write_bytes(b'{"id": "../../x"}')
    with pytest.raises(CorruptArtifact, match="best"):
        store.resolve("best")


def test_a_remote_reference_is_refused_as_such(store: ArtifactStore):
    with pytest.raises(InputError, match="remote"):
        store.resolve("s3://bucket/harvest")


def test_parents_are_followed_and_checked(store: ArtifactStore):
    parent = make(store).artifact
    child = make(store, stage="train", parents={"activations": parent.as_parent()}).artifact
    assert store.parent(child, "activations") == parent
    with pytest.raises(ArtifactNotFound, match="activations"):
        store.parent(child, "tokens")
    wrong = Parent(parent.id, "0" * 64)
    other = make(store, seed=2, stage="train", parents={"activations": wrong}).artifact
    with pytest.raises(CorruptArtifact, match=parent.id):
        store.parent(other, "activations")


def test_a_folder_of_other_things_is_no_store(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(NotAStore):
        ArtifactStore(tmp_path)
    with pytest.raises(NotAStore):
        ArtifactStore(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_or_missing_folder_becomes_a_store_when_written_to(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "a" / "b"):
        store = ArtifactStore(folder)
        assert store.ids() == []
        assert not (folder / "sparsemill-store.json").exists()
        make(store)
        assert json.loads((folder / "sparsemill-store.json").read_bytes()) == {"format_version": 0}


def test_a_store_that_another_process_creates_at_this_moment_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    listing = Path.iterdir

    def list_late(folder: Path) -> Iterator[Path]:
        monkeypatch.undo()
        make(ArtifactStore(folder))
        return listing(folder)

    monkeypatch.setattr(Path, "iterdir", list_late)
    assert len(ArtifactStore(tmp_path).ids()) == 1


def test_a_store_of_another_format_is_refused(tmp_path: Path):
    (tmp_path / "sparsemill-store.json").write_text('{"format_version": 7}')
    with pytest.raises(UnsupportedFormat):
        ArtifactStore(tmp_path)
    (tmp_path / "sparsemill-store.json").write_text("")
    with pytest.raises(NotAStore):
        ArtifactStore(tmp_path)


def test_files_are_found_through_the_manifest_only(store: ArtifactStore):
    artifact = make(store).artifact
    assert artifact.file("w0/data").read_bytes() == b"1 w0" * 100
    assert artifact.read_json("summary.json") == {"seed": 1}
    for name in ("run.json", "manifest.json", "nothing", "../x"):
        with pytest.raises(ArtifactNotFound):
            artifact.file(name)


def damage(artifact: Artifact, kind: str) -> None:
    path = artifact.folder / "w0/data"
    if kind == "missing":
        path.unlink()
    elif kind == "short":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "swapped":
        path.rename(artifact.folder / "swap")
        (artifact.folder / "w1/data").rename(path)
        (artifact.folder / "swap").rename(artifact.folder / "w1/data")
    elif kind == "flipped":
        data = bytearray(path.read_bytes())
        data[7] ^= 16
        path.write_bytes(data)
    elif kind == "link":
        path.rename(artifact.folder.parent / "elsewhere")
        path.symlink_to(artifact.folder.parent / "elsewhere")


@pytest.mark.parametrize("kind", ["missing", "short", "swapped", "flipped", "link"])
def test_damaged_files_are_never_read_silently(store: ArtifactStore, kind: str):
    artifact = make(store).artifact
    damage(artifact, kind)
    for read in (artifact.read_bytes, artifact.checked_file):
        with pytest.raises(CorruptArtifact, match=f"w0/data of {artifact.id}"):
            read("w0/data")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", []),
        ("missing", [("w0/data", "missing")]),
        ("short", [("w0/data", "size")]),
        ("flipped", [("w0/data", "sha256")]),
        ("swapped", [("w0/data", "sha256"), ("w1/data", "sha256")]),
        ("link", [("w0/data", "missing")]),
    ],
)
def test_verify_lists_all_damage(store: ArtifactStore, kind: str, expected: list[tuple[str, str]]):
    artifact = make(store).artifact
    damage(artifact, kind)
    assert [(problem.name, problem.kind) for problem in store.verify(artifact)] == expected


def test_verify_sees_extra_files_and_a_changed_manifest(store: ArtifactStore):
    artifact = make(store).artifact
    (artifact.folder / "w0/more").write_bytes(b"")
    (artifact.folder / "manifest.json").write_bytes(b"{}")
    kinds = [(problem.name, problem.kind) for problem in store.verify(artifact)]
    assert kinds == [("manifest.json", "manifest"), ("w0/more", "extra")]


def test_verify_counts_all_bytes_even_those_of_missing_files(store: ArtifactStore):
    artifact = make(store).artifact
    damage(artifact, "missing")
    calls: list[tuple[int, int]] = []
    store.verify(artifact, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (artifact.manifest.total_bytes, artifact.manifest.total_bytes)


def test_a_superseded_artifact_is_made_again_and_replaced_at_the_commit_only(store: ArtifactStore):
    old = make(store).artifact
    (old.folder / "extra").write_bytes(b"")

    def produce(staging: Staging) -> Result:
        assert store.open(old.id) == old
        staging.write_bytes("data", b"other bytes")
        return Result({})

    with store.superseding(old):
        assert store.find(old.spec) is None
        made = store.make(old.spec, produce, provenance={"device": "other"})
        again = store.make(old.spec, produce, provenance={"device": "other"})
    assert (made.status, again.status) == ("made", "cached")
    assert made.artifact.id == old.id
    assert store.open(old.id) == made.artifact
    assert sorted(contents(made.artifact.folder)) == ["data", "manifest.json", "run.json"]
    assert list((store.root / ".staging").iterdir()) == []
    assert make(store).status == "cached"


def test_a_superseding_that_fails_leaves_the_old_artifact(store: ArtifactStore):
    old = make(store).artifact

    def fail(staging: Staging) -> Result:
        raise StorageFull("no room", needed_bytes=0, free_bytes=0)

    with pytest.raises(StorageFull), store.superseding(old):
        store.make(old.spec, fail, provenance={})
    assert store.find(old.spec) == old
    assert store.verify(old) == []


def make_together(store: ArtifactStore, seeds: Sequence[int]) -> tuple[list[Made], list[str]]:
    computed: list[str] = []

    def produce(stagings: Sequence[Staging]) -> list[Result]:
        for staging in stagings:
            staging.write_bytes("data", str(staging.spec.config["seed"]).encode())
            computed.append(staging.spec.id)
        return [Result({"seed": staging.spec.config["seed"]}) for staging in stagings]

    return store.make_together([spec_of(seed) for seed in seeds], produce, {"device": "cpu"}), computed


def test_artifacts_made_together_are_those_made_alone_and_only_the_missing_are_made(
    store: ArtifactStore, tmp_path: Path
):
    (alone,), _ = make_together(ArtifactStore(tmp_path / "alone"), [2])
    make_together(store, [1])
    made, computed = make_together(store, [3, 1, 2])
    assert [(m.artifact.config["seed"], m.status) for m in made] == [(3, "made"), (1, "cached"), (2, "made")]
    assert computed == [spec_of(3).id, spec_of(2).id]
    assert made[2].artifact.manifest_sha256 == alone.artifact.manifest_sha256
    assert list((store.root / ".staging").iterdir()) == []


def test_locks_are_taken_in_one_order_whatever_the_order_asked_for(store: ArtifactStore):
    taken: list[list[str]] = []
    for seeds in ([1, 2, 3], [3, 2, 1]):
        locks: list[str] = []

        def see(operation: str, path: Path, locks: list[str] = locks) -> None:
            if operation == "lock":
                locks.append(path.name)

        previous = atomic.set_fault_hook(see)
        try:
            make_together(ArtifactStore(store.root.with_name(f"store-{seeds[0]}")), seeds)
        finally:
            atomic.set_fault_hook(previous)
        taken.append(locks)
    assert taken[0] == taken[1] == sorted(taken[0])
    assert len(taken[0]) == 3
