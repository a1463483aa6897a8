"""What a remote says is hostile until checked: nothing leads out of the store, or is taken for something else."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storage.artifacts import ArtifactStore, Spec
from storage.borrowing import Borrowing
from storage.errors import CorruptArtifact, RemoteError, SparsemillError
from storage.fingerprint import Json, seal_json
from storage.manifest import FORMAT_VERSION, MANIFEST_NAME, FileRecord, Manifest
from storage.remote import RemoteStore
from storage.shared import MAX_FILES, MAX_TOTAL_BYTES, Pointer, check_untrusted
from storage.transfers import fetch, missing_files

SPEC = Spec("train", 1, {"seed": 1})
CONTENTS = b"contents"
RECORD: Mapping[str, Json] = {"bytes": len(CONTENTS), "sha256": hashlib.sha256(CONTENTS).hexdigest()}

HOSTILE_PARTS = st.sampled_from(
    ["..", ".", "", "/", "a", "A", "b.bin", "\0", "\\", "C:", "~", "ä", "a\u0308", "ß", "SS", "ss", "manifest.json",
     "run.json", "..\\..", "x" * 300, "\n", "%2e%2e", "store.zarr"]
)  # fmt: skip
NAMES = st.lists(HOSTILE_PARTS, min_size=1, max_size=4).map("/".join) | st.text(max_size=30)


class Place:
    """A store in a folder, with a precious file beside it, and a remote that says whatever it is told to."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "remote").mkdir()
        (folder / "precious").write_text("precious")
        self.store = ArtifactStore(folder / "machine" / "store")
        self.remote = RemoteStore(str(folder / "remote"))

    def publish(self, manifest: bytes, files: Mapping[str, bytes] = {}, artifact_id: str = SPEC.id) -> None:
        digest = hashlib.sha256(manifest).hexdigest()
        pointer = Pointer(artifact_id, digest, 1, 1)
        self.write(pointer.key, pointer.to_bytes())
        self.write(f"train/{artifact_id}/{digest}/{MANIFEST_NAME}", manifest)
        for name, data in files.items():
            self.write(f"train/{artifact_id}/{digest}/{name}", data)

    def write(self, key: str, data: bytes) -> None:
        path = self.folder / "remote" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def pull(self, artifact_id: str = SPEC.id) -> None:
        artifact = Borrowing(self.remote, self.store.root).find(artifact_id)
        assert artifact is not None
        fetch(artifact, missing_files(artifact), self.remote)
        self.store.adopt(artifact)

    def nothing_has_happened(self) -> None:
        assert self.store.list() == []
        assert (self.folder / "precious").read_text() == "precious"
        assert {path.name for path in self.folder.iterdir()} <= {"remote", "precious", "machine"}


def manifest_of(files: Mapping[str, Json], **changes: Json) -> bytes:
    """A manifest with these files, sealed, whatever they are."""
    body: dict[str, Json] = {
        "format_version": FORMAT_VERSION, "id": SPEC.id, "spec": SPEC.to_json(), "files": files, "stats": {},
        "provenance": {},
    }  # fmt: skip
    return seal_json({**body, **changes})


@settings(max_examples=150, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=3, unique=True))
@example(names=["../precious"])
@example(names=["/etc/passwd"])
@example(names=["a", "A"])
@example(names=["a", "a/b"])
@example(names=["A/x", "a/y"])
@example(names=["ä", "a\u0308"])
@example(names=["a\0b"])
@example(names=["a/manifest.json"])
@example(names=["manifest.json/a"])
@example(names=["Manifest.json"])
def test_whatever_files_are_called_nothing_leaves_the_store(names: list[str]):
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        try:
            data = manifest_of(dict.fromkeys(names, RECORD))
        except SparsemillError:
            return  # not even JSON of ours
        place.publish(data)
        # A folder cannot hold most of these names, so what is asked for is served, whatever its key.
        pointer = Pointer(SPEC.id, hashlib.sha256(data).hexdigest(), 1, 1)
        served = {pointer.key: pointer.to_bytes(), f"train/{SPEC.id}/{pointer.manifest_sha256}/{MANIFEST_NAME}": data}
        place.remote._stream = lambda key: iter([served.get(key, CONTENTS)])  # type: ignore[method-assign]
        try:
            place.pull()
        except CorruptArtifact:
            place.nothing_has_happened()
            return
        artifact = place.store.open(SPEC.id)
        assert sorted(artifact.manifest.files) == sorted(names)
        assert place.store.verify(artifact) == []
        assert (place.folder / "precious").read_text() == "precious"
        outside = [path for path in place.folder.rglob("*") if path.is_file() and place.store.root not in path.parents]
        assert all(path.name == "precious" or place.folder / "remote" in path.parents for path in outside)


@pytest.mark.parametrize(
    "files",
    [
        {"a": {"bytes": -1, "sha256": "0" * 64}},
        {"a": {"bytes": True, "sha256": "0" * 64}},
        {"a": {"bytes": 1.5, "sha256": "0" * 64}},
        {"a": {"bytes": "8", "sha256": "0" * 64}},
        {"a": {"bytes": MAX_TOTAL_BYTES + 1, "sha256": "0" * 64}},
        {"a": {"bytes": MAX_TOTAL_BYTES, "sha256": "0" * 64}, "b": {"bytes": 1, "sha256": "0" * 64}},
        {"a": {"bytes": 8, "sha256": "0" * 63 + "/"}},
        {"a": {"bytes": 8, "sha256": 7}},
        {"a": {"bytes": 8}},
        {"a": 8},
        ["a"],
        {"/".join(["x" * 200] * 6): RECORD},
    ],
)
def test_sizes_and_hashes_that_are_none_are_refused(files: Json, tmp_path: Path):
    place = Place(tmp_path)
    place.publish(manifest_of(files), {"a": CONTENTS})  # type: ignore[arg-type]
    with pytest.raises(CorruptArtifact):
        place.pull()
    place.nothing_has_happened()


def test_too_many_files_are_refused():
    files = {str(i): FileRecord(0, "0" * 64) for i in range(MAX_FILES + 1)}
    with pytest.raises(CorruptArtifact, match="too many files"):
        check_untrusted(Manifest(SPEC, files, {}, {}), "here")


@pytest.mark.parametrize(
    "change",
    [
        {"id": "train-000000000000"},
        {"spec": Spec("train", 1, {"seed": 2}).to_json()},
        {"spec": Spec("tr", 1, {}).to_json() | {"stage": "../x"}},
        {"format_version": 99},
        {"surplus": 1},
    ],
)
def test_a_manifest_that_answers_another_question_is_refused(change: Mapping[str, Json], tmp_path: Path):
    place = Place(tmp_path)
    place.publish(manifest_of({"a": RECORD}, **change), {"a": CONTENTS})
    with pytest.raises(SparsemillError):
        place.pull()
    place.nothing_has_happened()


def test_another_artifact_under_an_id_is_refused(tmp_path: Path):
    place, other = Place(tmp_path), Spec("train", 1, {"seed": 2})
    place.publish(manifest_of({"a": RECORD}), {"a": CONTENTS}, artifact_id=other.id)
    with pytest.raises(CorruptArtifact, match="another artifact's"):
        place.pull(other.id)
    assert ArtifactStore(place.store.root, remote=place.remote).root == place.store.root
    with pytest.raises(CorruptArtifact):
        ArtifactStore(place.store.root, remote=place.remote).find(other)
    place.nothing_has_happened()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_in_the_remote_is_seen_before_anything_counts(data: st.DataObject):
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        place.publish(manifest_of({"a": RECORD}), {"a": CONTENTS})
        path = data.draw(
            st.sampled_from(sorted(path for path in (place.folder / "remote").rglob("*") if path.is_file()))
        )
        contents = bytearray(path.read_bytes())
        contents[data.draw(st.integers(0, len(contents) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(contents)
        with pytest.raises((CorruptArtifact, RemoteError)):
            place.pull()
        place.nothing_has_happened()


@pytest.mark.parametrize(
    "pointer",
    [b"", b"{}", b"[]", b"null", b"{" * 5000, b"x" * 5000, b"\x80\x04\x95", json.dumps({"id": 1}).encode(),
     b"[" * 4000]
)  # fmt: skip
def test_what_is_no_pointer_is_refused(pointer: bytes, tmp_path: Path):
    place = Place(tmp_path)
    place.write(Pointer(SPEC.id, "", 0, 0).key, pointer)
    with pytest.raises((CorruptArtifact, RemoteError)):
        place.pull()
    place.nothing_has_happened()


def test_a_link_in_the_way_of_a_pull_is_not_followed(tmp_path: Path):
    place = Place(tmp_path)
    place.publish(manifest_of({"sub/a": RECORD}), {"sub/a": CONTENTS})
    artifact = Borrowing(place.remote, place.store.root).find(SPEC.id)
    assert artifact is not None
    artifact.folder.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (artifact.folder / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptArtifact, match="leads out"):
        fetch(artifact, ["sub/a"], place.remote)
    assert list((tmp_path / "elsewhere").iterdir()) == []
