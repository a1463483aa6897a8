import shutil
from pathlib import Path

import pytest

from storage import atomic
from storage.artifacts import Artifact, ArtifactStore, Result
from storage.errors import InputError
from storage.manifest import FileRecord, Spec
from storage.staging import Staging

SPEC = Spec("harvest", 1, {"seed": 1})
SHA_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def staging(place: Path, spec: Spec = SPEC, device: str = "cpu") -> Staging:
    return Staging(place, spec, {"device": device})


def with_two_units(place: Path) -> Staging:
    stage = staging(place)
    for unit in ("w0", "w1"):
        stage.write_bytes(f"{unit}/data", unit.encode())
        stage.write_json(f"{unit}/more", {"unit": unit})
        stage.finish(unit, [f"{unit}/data", f"{unit}/more"], {"rows": 3, "mean": 0.1})
    return stage


def test_finished_units_are_there_after_a_restart_in_order_with_their_data(tmp_path: Path):
    with_two_units(tmp_path)
    again = staging(tmp_path)
    assert list(again.finished.items()) == [("w0", {"rows": 3, "mean": 0.1}), ("w1", {"rows": 3, "mean": 0.1})]
    assert (again.folder / "w1/data").read_bytes() == b"w1"


def test_files_of_no_unit_are_gone_after_a_restart(tmp_path: Path):
    stage = with_two_units(tmp_path)
    stage.write_bytes("w2/data", b"half a wind")
    stage.write_bytes("loose", b"x")
    again = staging(tmp_path)
    assert sorted(again.seal()) == ["w0/data", "w0/more", "w1/data", "w1/more"]


@pytest.mark.parametrize("damage", ["flip", "short", "missing", "empty"])
def test_a_unit_whose_files_do_not_match_is_dropped_with_all_its_files(tmp_path: Path, damage: str):
    stage = with_two_units(tmp_path)
    path = stage.folder / "w0/data"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"flip": b"w8", "short": b"w", "empty": b""}[damage])
    again = staging(tmp_path)
    assert list(again.finished) == ["w1"]
    assert not (again.folder / "w0/more").exists()
    again.write_bytes("w0/data", b"w0")
    again.finish("w0", ["w0/data"])
    assert list(staging(tmp_path).finished) == ["w1", "w0"]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_costs_its_unit_only(tmp_path: Path, cut: int):
    with_two_units(tmp_path)
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    again = staging(tmp_path)
    assert list(again.finished) == ["w0"]
    again.write_bytes("w1/data", b"w1")
    again.finish("w1", ["w1/data"])
    assert list(staging(tmp_path).finished) == ["w0", "w1"]


def test_a_flipped_bit_in_the_journal_is_never_believed(tmp_path: Path):
    with_two_units(tmp_path / "whole")
    data = (tmp_path / "whole/journal.jsonl").read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    for i in range(0, len(data), 23):
        shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        flipped = bytearray(data)
        flipped[i] ^= 1
        (tmp_path / str(i) / "journal.jsonl").write_bytes(flipped)
        found = staging(tmp_path / str(i)).finished
        lines_before = sum(end < i for end in ends)
        assert list(found) == ["w0", "w1"][: max(0, lines_before - 1)]
        assert all(value == {"rows": 3, "mean": 0.1} for value in found.values())


@pytest.mark.parametrize(
    ("spec", "device"),
    [(Spec("harvest", 1, {"seed": 2}), "cpu"), (Spec("harvest", 2, {"seed": 1}), "cpu"), (SPEC, "cuda")],
)
def test_work_of_another_spec_or_provenance_is_thrown_away(tmp_path: Path, spec: Spec, device: str):
    with_two_units(tmp_path)
    other = staging(tmp_path, spec, device)
    assert not other.finished
    assert other.seal() == {}


def test_discard_drops_the_unit_and_all_its_files_for_good(tmp_path: Path):
    stage = with_two_units(tmp_path)
    stage.discard("w0/more")
    assert list(stage.finished) == ["w1"]
    assert not (stage.folder / "w0/data").exists()
    assert list(staging(tmp_path).finished) == ["w1"]
    stage.write_bytes("w0/data", b"again")
    stage.finish("w0", ["w0/data"])
    assert list(staging(tmp_path).finished) == ["w1", "w0"]


def test_a_discarded_unit_stays_discarded_even_if_its_files_come_back(tmp_path: Path):
    stage = with_two_units(tmp_path)
    stage.discard("w0/data")
    stage.write_bytes("w0/data", b"w0")
    stage.write_json("w0/more", {"unit": "w0"})
    assert list(staging(tmp_path).finished) == ["w1"]


def test_discard_of_a_loose_file(tmp_path: Path):
    stage = with_two_units(tmp_path)
    stage.write_bytes("loose", b"x")
    stage.discard("loose")
    assert "loose" not in stage.seal()
    assert list(stage.finished) == ["w0", "w1"]


def test_a_unit_is_finished_once_and_owns_its_files(tmp_path: Path):
    stage = with_two_units(tmp_path)
    with pytest.raises(InputError):
        stage.finish("w0", [])
    with pytest.raises(InputError):
        stage.finish("w2", ["w0/data"])


def test_a_unit_of_files_that_are_not_there_is_refused(tmp_path: Path):
    with pytest.raises(InputError):
        staging(tmp_path).finish("w0", ["w0/data"])


@pytest.mark.parametrize("name", ["../x", "/x", "manifest.json", "a/../../x"])
def test_files_stay_inside_the_staging_folder(tmp_path: Path, name: str):
    stage = staging(tmp_path / "place")
    with pytest.raises(InputError):
        stage.write_bytes(name, b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place"]


def test_seal_records_every_file_by_size_and_sha256(tmp_path: Path):
    stage = staging(tmp_path)
    stage.write_bytes("unit", b"abc")
    stage.finish("u", ["unit"])
    stage.path("loose/deep").write_bytes(b"abc")
    assert stage.seal() == {"loose/deep": FileRecord(3, SHA_OF_ABC), "unit": FileRecord(3, SHA_OF_ABC)}


def test_seal_refuses_links_and_lost_files(tmp_path: Path):
    stage = with_two_units(tmp_path)
    stage.path("link").symlink_to(tmp_path / "journal.jsonl")
    with pytest.raises(InputError, match="links"):
        stage.seal()
    stage.discard("link")
    (stage.folder / "w0/data").unlink()
    with pytest.raises(InputError, match="gone"):
        stage.seal()


def test_files_are_durable_before_the_journal_names_them(tmp_path: Path):
    stage = staging(tmp_path)
    stage.write_bytes("a/b/data", b"x")
    steps: list[tuple[str, str]] = []
    atomic.set_fault_hook(lambda operation, path: steps.append((operation, path.name)))
    stage.finish("u", ["a/b/data"])
    atomic.set_fault_hook(None)
    synced = [("fsync", "data"), ("fsync-folder", "files"), ("fsync-folder", "a"), ("fsync-folder", "b")]
    journaled = [("append", "journal.jsonl"), ("write", "journal.jsonl"), ("fsync", "journal.jsonl")]
    assert steps[:7] == synced + journaled


def committed(root: Path) -> Artifact:
    def produce(stage: Staging) -> Result:
        for unit in ("w0", "w1"):
            stage.write_bytes(f"{unit}/data", unit.encode())
        return Result({})

    return ArtifactStore(root).make(Spec("harvest", 1, {"seed": 2}), produce, provenance={"device": "cpu"}).artifact


def test_a_unit_is_adopted_from_an_artifact_by_a_link_and_survives_a_restart(tmp_path: Path):
    artifact = committed(tmp_path / "store")
    assert staging(tmp_path / "new").adopt("w0", ["w0/data"], artifact)
    again = staging(tmp_path / "new")
    assert list(again.finished) == ["w0"]
    assert (again.folder / "w0/data").samefile(artifact.folder / "w0/data")
    again.discard("w0/data")
    assert (artifact.folder / "w0/data").read_bytes() == b"w0"


@pytest.mark.parametrize("damage", [b"w8", b"w", None])
def test_nothing_is_adopted_that_is_not_as_it_was_committed(tmp_path: Path, damage: bytes | None):
    artifact = committed(tmp_path / "store")
    (artifact.folder / "w0/data").unlink()
    if damage is not None:
        (artifact.folder / "w0/data").write_bytes(damage)
    stage = staging(tmp_path / "new")
    assert not stage.adopt("w0", ["w0/data"], artifact)
    assert not stage.adopt("w0", ["w0/data", "w0/more"], artifact)
    assert list(stage.finished) == []
    assert not (stage.folder / "w0").exists()


def test_records_given_with_a_unit_are_taken_and_checked_when_resuming(tmp_path: Path):
    stage = staging(tmp_path)
    for unit, digest in (("good", SHA_OF_ABC), ("bad", "0" * 64)):
        stage.write_bytes(unit, b"abc")
        stage.finish(unit, {unit: FileRecord(3, digest)})
    assert list(stage.finished) == ["good", "bad"]
    assert list(staging(tmp_path).finished) == ["good"]
