"""docs/storage-format.md against the code: what a reader written from that page finds is what ours finds."""

import hashlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.encoding import ENCODINGS, Encoding
from storage.reader import BatchOrder, ReadState, ShardReader
from storage.shards import GROUP_NAME, Layout, create_group
from tests.unit.storage import specified_reader
from tests.unit.storage.stores import ID, SMALL, activations, encoded_as, write_store

LAYOUTS = [
    SMALL,
    replace(SMALL, n_windows=1, first_position=0, positions=1, seed=-3, chunk_rows=32),
    replace(SMALL, n_windows=2, window_prompts=24, positions=7, chunk_rows=3, n_prompts=48),
]


def test_the_metadata_shown_is_what_is_written(tmp_path: Path):
    page = Path(__file__).parents[3] / "docs" / "storage-format.md"
    group, array = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL))
    create_group(tmp_path, Layout(**group["attributes"]["sparsemill"]["layout"]))
    assert json.loads((tmp_path / GROUP_NAME / "zarr.json").read_text()) == group
    assert json.loads((tmp_path / GROUP_NAME / "activations" / "zarr.json").read_text()) == array


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_is_in_the_row_that_the_specification_computes(tmp_path: Path, layout: Layout):
    write_store(tmp_path, layout)
    group = tmp_path / GROUP_NAME
    attributes = json.loads((group / "zarr.json").read_text())["attributes"]["sparsemill"]
    assert attributes["format_version"] == 0
    prompt, position = (specified_reader.read_array(group / name) for name in ("prompt", "position"))
    rows = specified_reader.decode(group, specified_reader.read_array(group / "activations"))
    found = list(specified_reader.places(attributes["layout"]))
    assert sorted(row for _, _, row in found) == list(range(layout.n_rows))
    values = activations(layout)
    for p, t, row in found:
        assert (prompt[row], position[row]) == (p, t)
        np.testing.assert_array_equal(rows[row], values[p, t])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_codes_decode_as_specified(tmp_path: Path, encoding: Encoding):
    write_store(tmp_path, encoded_as(encoding))
    group = tmp_path / GROUP_NAME
    stored = specified_reader.read_array(group / "activations")
    reader = ShardReader(tmp_path, ID)
    np.testing.assert_array_equal(specified_reader.decode(group, stored), reader.read(0, reader.n_rows).rows)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_table_of_checksums_is_that_of_the_chunks(tmp_path: Path, encoding: Encoding):
    write_store(tmp_path, encoded_as(encoding))
    group = tmp_path / GROUP_NAME
    specified_reader.check_places(group)
    names = json.loads((group / "checksum" / "zarr.json").read_text())["attributes"]["columns"]
    assert names == ["activations", "prompt", "position", "scale"][: 4 if encoding == "uint8" else 3]


def test_swapped_shards_have_another_place_s_checksum(tmp_path: Path):
    write_store(tmp_path)
    shards = tmp_path / GROUP_NAME / "activations" / "c"
    (shards / "0").rename(shards / "away")
    (shards / "1").rename(shards / "0")
    (shards / "away").rename(shards / "1")
    specified_reader.read_array(shards.parent)
    with pytest.raises(AssertionError):
        specified_reader.check_places(tmp_path / GROUP_NAME)


@pytest.mark.parametrize(
    "order",
    [
        BatchOrder(seed=3, batch_rows=40, pool_rows=96, lanes=8),
        BatchOrder(seed=-1, batch_rows=33, pool_rows=80, lanes=3),
        BatchOrder(seed=0, batch_rows=7, pool_rows=123, lanes=1),
        BatchOrder(seed=5, batch_rows=64, pool_rows=10_000, lanes=4),
    ],
)
@pytest.mark.parametrize("epoch", [0, 2])
def test_batches_come_in_the_order_specified(tmp_path: Path, order: BatchOrder, epoch: int):
    write_store(tmp_path)
    reader = ShardReader(tmp_path, ID)
    whole = reader.read(0, reader.n_rows)
    expected = list(specified_reader.batches(SMALL.n_chunks, SMALL.chunk_rows, epoch, **asdict(order)))
    found = list(reader.epoch(order, start=ReadState(epoch, 0)))
    assert len(found) == len(expected)
    for batch, rows in zip(found, expected, strict=True):
        np.testing.assert_array_equal(batch.prompt, whole.prompt[rows])
        np.testing.assert_array_equal(batch.position, whole.position[rows])


def test_manifest_and_journal_are_sealed_and_the_id_is_the_specs_hash(tmp_path: Path):
    spec = Spec("harvest", 2, {"seed": 1, "share": 0.1, "name": "naïve"})
    journals: list[bytes] = []

    def produce(staging: Staging) -> Result:
        staging.write_bytes("a.bin", b"abc")
        staging.finish("window-00000", ["a.bin"], {"rows": 3})
        staging.write_bytes("b.bin", b"")
        staging.finish("window-00001", ["b.bin"])
        staging.discard("b.bin")
        journals.append((staging.folder.parent / "journal.jsonl").read_bytes())
        return Result({"rows": 3})

    artifact = ArtifactStore(tmp_path / "store").make(spec, produce, provenance={"device": "cpu"}).artifact
    manifest = specified_reader.unseal((artifact.folder / "manifest.json").read_bytes())
    assert manifest["id"] == artifact.folder.name
    assert manifest["id"] == "harvest-" + hashlib.sha256(specified_reader.canonical(manifest["spec"])).hexdigest()[:12]
    record = {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert manifest["files"] == {"a.bin": record}
    assert sorted(manifest) == ["files", "format_version", "id", "provenance", "spec", "stats"]
    first, *lines = (specified_reader.unseal(line) for line in journals[0].splitlines())
    assert first == {"format_version": 0, "spec": manifest["spec"], "provenance": {"device": "cpu"}}
    assert lines[0] == {"unit": "window-00000", "files": {"a.bin": record}, "data": {"rows": 3}}
    assert lines[2] == {"dropped": "window-00001"}
