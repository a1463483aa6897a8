import dataclasses
import json
from pathlib import Path

import pytest

from storage.errors import ConfigError, CorruptArtifact, InputError, UnsupportedFormat
from storage.fingerprint import fingerprint, seal_json
from storage.manifest import FileRecord, Manifest, Parent, Spec, safe_name, stage_of

PARENT = Parent("tokenize-0123456789ab", "a" * 64)
SPEC = Spec("harvest", 2, {"seed": 3, "rate": 0.5}, {"tokens": PARENT})
MANIFEST = Manifest(SPEC, {"a/b.bin": FileRecord(3, "b" * 64)}, {"rows": 12}, {"device": "cpu"})


def test_id_is_stage_and_twelve_digits_of_the_spec_fingerprint():
    body = {
        "stage": "harvest",
        "version": 2,
        "config": {"seed": 3, "rate": 0.5},
        "parents": {"tokens": {"id": PARENT.id, "manifest_sha256": PARENT.manifest_sha256}},
    }
    assert SPEC.id == "harvest-" + fingerprint(body)[:12]


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "train"},
        {"version": 3},
        {"config": {"seed": 4, "rate": 0.5}},
        {"config": {"seed": 3, "rate": 0.5, "more": None}},
        {"parents": {}},
        {"parents": {"tokens": Parent(PARENT.id, "c" * 64)}},
        {"parents": {"tokens": Parent("tokenize-ffffffffffff", PARENT.manifest_sha256)}},
        {"parents": {"others": PARENT}},
    ],
)
def test_each_part_of_the_question_changes_the_id(change: dict[str, object]):
    assert dataclasses.replace(SPEC, **change).id != SPEC.id


@pytest.mark.parametrize("stage", ["", "Harvest", "a-b", "../x", "1x", "a b"])
def test_bad_stage_names_are_refused(stage: str):
    with pytest.raises(ConfigError):
        Spec(stage, 1, {})


def test_bad_parents_are_refused():
    with pytest.raises(ConfigError):
        Spec("harvest", 1, {}, {"tokens": Parent("latest", "a" * 64)})
    with pytest.raises(ConfigError):
        Spec("harvest", 1, {}, {"tokens": Parent(PARENT.id, "abc")})


def test_manifest_reads_back_and_is_canonical():
    data = MANIFEST.to_bytes()
    assert Manifest.from_bytes(data, where="here") == MANIFEST
    assert json.loads(data)["id"] == SPEC.id
    assert Manifest.from_bytes(data, where="here").to_bytes() == data


def test_every_flipped_bit_of_a_manifest_is_seen():
    data = MANIFEST.to_bytes()
    for i in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        with pytest.raises(CorruptArtifact):
            Manifest.from_bytes(bytes(flipped), where="here")


@pytest.mark.parametrize("data", [b"", b"null", b"{}", b"[1]", b"\x00" * 40, MANIFEST.to_bytes()[:-1]])
def test_what_is_no_manifest_is_corrupt_and_names_the_file(data: bytes):
    with pytest.raises(CorruptArtifact, match="some/manifest"):
        Manifest.from_bytes(data, where=Path("some/manifest.json"))


def test_a_whole_manifest_of_another_format_is_refused_as_such():
    body = json.loads(MANIFEST.to_bytes())
    del body["checksum"]
    with pytest.raises(UnsupportedFormat):
        Manifest.from_bytes(seal_json(body | {"format_version": 1}), where="here")


@pytest.mark.parametrize(
    "change",
    [{"id": "harvest-000000000000"}, {"files": {"../x": {"bytes": 1, "sha256": "0"}}}, {"spec": {}}, {"more": 1}],
)
def test_a_sealed_manifest_that_contradicts_itself_is_corrupt(change: dict[str, object]):
    body = json.loads(MANIFEST.to_bytes())
    del body["checksum"]
    with pytest.raises(CorruptArtifact):
        Manifest.from_bytes(seal_json(body | change), where="here")


@pytest.mark.parametrize("name", ["a", "a/b", "a.b/c-d_e", "store.zarr/activations/c/17/0", "é/ü"])
def test_safe_names_pass(name: str):
    assert safe_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/a",
        "a/",
        "a//b",
        "./a",
        "a/../b",
        "../a",
        "a\\b",
        "c:",
        "a\nb",
        "a\0",
        "manifest.json",
        "run.json",
        "x" * 300,
    ],
)
def test_unsafe_names_are_refused(name: str):
    with pytest.raises(InputError):
        safe_name(name)


def test_stage_of_an_id():
    assert stage_of("harvest-0123456789ab") == "harvest"
    for text in ("harvest", "harvest-xyz", "harvest-0123456789abc", "../harvest-0123456789ab"):
        with pytest.raises(InputError):
            stage_of(text)
