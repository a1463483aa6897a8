"""Files made to do harm: refused with a typed error that names them; nothing is run, nothing written elsewhere.

tests/property/test_hostile_manifests.py does the same for what remotes say. Inputs a fuzz tries: ``FUZZED`` each.
"""

import hashlib
import io
import json
import os
import pickle
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from pipeline import cli, language_model
from pipeline.checkpoints import read_checkpoint
from pipeline.config import Runtime, load_preset
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from sae.config import TrainerConfig
from sae.errors import SaeError
from sae.state import state_from
from sae.trainer import Trainer
from storage.artifact import open_folder
from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.errors import ConfigError, CorruptArtifact, InputError, SparsemillError, UnsupportedFormat
from storage.fingerprint import seal_json, unseal_json
from storage.manifest import Manifest
from storage.reader import ShardReader
from storage.remote import RemoteStore
from storage.shared import read_pointer
from tests.faults.lengths import times
from tests.faults.trees import tree
from tests.unit.storage.stores import SMALL, write_store

FUZZED = times(150, 20_000)
QUICK = settings(max_examples=FUZZED, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPEC = Spec("train", 1, {"seed": 1})
DEEP = 100_000

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just(10**400)
    | st.just("../../x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@contextmanager
def nothing_outside(folder: Path) -> Iterator[None]:
    """What lies beside ``folder`` is as before in the end."""
    around = folder.parent
    before = {name: digest for name, digest in tree(around).items() if not name.startswith(f"{folder.name}/")}
    yield
    after = {name: digest for name, digest in tree(around).items() if not name.startswith(f"{folder.name}/")}
    assert after == before


def mutated(value: Any, data: st.DataObject) -> Any:
    """A JSON value with one part, at any depth, replaced, left out or added to."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 3)) == 0:
        return data.draw(JSON)
    if isinstance(value, list):
        place = data.draw(st.integers(0, len(value) - 1))
        return [*value[:place], mutated(value[place], data), *value[place + 1 :]]
    key = data.draw(st.sampled_from(sorted(value)))
    match data.draw(st.integers(0, 5)):
        case 0:
            return {name: item for name, item in value.items() if name != key}
        case 1:
            return {**value, data.draw(st.text(max_size=6)): data.draw(JSON)}
        case _:
            return {**value, key: mutated(value[key], data)}


def sealed(value: Any) -> bytes:
    """Sealed as ours are where that can be, so that a fuzz gets past the checksum."""
    try:
        return seal_json(value)
    except (InputError, TypeError, RecursionError):
        return json.dumps(value).encode()


# ---- checkpoints of other programs


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def zipped(payload: bytes) -> bytes:
    """A .pt file in torch's format with another pickle inside."""
    whole, changed = io.BytesIO(), io.BytesIO()
    torch.save({"W_enc": torch.ones(2, 2)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            target.writestr(name, payload if name.endswith("data.pkl") else source.read(name))
    return changed.getvalue()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("layout", [bytes, zipped])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", ["25.pt", "ae.pt"])
def test_a_pt_file_that_runs_code_when_unpickled_is_refused_and_runs_nothing(
    protocol: int, layout: Callable[[bytes], bytes], hidden: bool, name: str, tmp_path: Path
):
    marker, path = tmp_path / "ran", tmp_path / "folder" / name
    path.parent.mkdir()
    bomb = {"W_enc": torch.ones(2, 2), "more": [Runs(marker)]} if hidden else Runs(marker)
    path.write_bytes(layout(pickle.dumps(bomb, protocol)))
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_checkpoint(str(path))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Runs(marker)))  # what would have run
    assert marker.exists()


@pytest.mark.filterwarnings("ignore:Cyclopts application invoked")
def test_the_command_line_says_so_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any):
    marker, path = tmp_path / "ran", tmp_path / "25.pt"
    path.write_bytes(pickle.dumps(Runs(marker)))
    monkeypatch.setattr("sys.argv", ["sparsemill", "import", str(path), "--home", str(tmp_path / "store")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    stderr = capfd.readouterr().err
    assert caught.value.code == 1
    assert str(path) in stderr
    assert "Traceback" not in stderr
    assert not marker.exists()
    assert not list((tmp_path / "store").rglob("manifest.json"))


def header(**tensors: Mapping[str, Any]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
BAD_TENSORS = {
    "empty": b"",
    "short": b"\x08\0\0",
    "huge header length": struct.pack("<Q", 2**63) + b"{}",
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "100 MB of header": struct.pack("<Q", 100_000_001) + b"{" * 100,
    "no JSON": struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
    "deep": struct.pack("<Q", DEEP) + b"[" * DEEP,
    "a list": struct.pack("<Q", 2) + b"[]",
    "overlapping": header(W_enc=GOOD, W_dec={**GOOD, "data_offsets": [8, 24]}) + bytes(24),
    "a gap": header(W_enc=GOOD, W_dec={**GOOD, "data_offsets": [20, 36]}) + bytes(36),
    "beyond the end": header(W_enc={**GOOD, "data_offsets": [0, 1 << 40]}) + bytes(16),
    "backwards": header(W_enc={**GOOD, "data_offsets": [16, 0]}) + bytes(16),
    "negative": header(W_enc={**GOOD, "data_offsets": [-16, 0]}) + bytes(16),
    "unknown dtype": header(W_enc={**GOOD, "dtype": "F1024"}) + bytes(16),
    "dtype of another size": header(W_enc={**GOOD, "dtype": "F64"}) + bytes(16),
    "shape that overflows": header(W_enc={**GOOD, "shape": [2**33, 2**33, 2**33]}) + bytes(16),
    "negative shape": header(W_enc={**GOOD, "shape": [-2, -2]}) + bytes(16),
    "shape of floats": header(W_enc={**GOOD, "shape": [2.5, 2]}) + bytes(16),
    "trailing bytes": header(W_enc=GOOD) + bytes(17),
    "a tensor missing": header(W_enc=GOOD) + bytes(16),
    "integers": save({name: torch.ones(2, 2, dtype=torch.int32) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}),
    "NaN": save({name: torch.full((2, 2), torch.nan) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}),
    "shapes that disagree": save({name: torch.ones(2, 3) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_safetensors_with_a_bad_header_are_refused_and_named(kind: str, tmp_path: Path):
    (tmp_path / "cfg.json").write_text("{}")
    path = tmp_path / "sae_weights.safetensors"
    path.write_bytes(BAD_TENSORS[kind])
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_checkpoint(str(tmp_path))


MODEL_TENSORS = [kind for kind in BAD_TENSORS if kind not in {"integers", "NaN", "shapes that disagree"}]


@pytest.mark.parametrize("kind", MODEL_TENSORS)
def test_a_language_models_bad_weights_are_refused_and_named(kind: str, tiny_model: Path, tmp_path: Path):
    folder = copied(tiny_model, tmp_path)
    (folder / "model.safetensors").write_bytes(BAD_TENSORS[kind])
    with pytest.raises(SparsemillError, match=re.escape(str(folder))):
        language_model.load(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "contents",
    [b"", b"[]", b"null", b"{}", b"[" * DEEP, b'{"a":' * DEEP, b"\xff\xfe", b'{"n_ctx": 1e999}', b"1" * 5000],
)
def test_a_language_models_bad_config_or_tokenizer_is_refused_and_named(
    name: str, contents: bytes, tiny_model: Path, tmp_path: Path
):
    folder = copied(tiny_model, tmp_path)
    (folder / name).write_bytes(contents)
    with pytest.raises(SparsemillError, match=re.escape(str(folder))):
        language_model.load(str(folder))


def copied(model: Path, folder: Path) -> Path:
    target = folder / "model"
    target.mkdir()
    for path in model.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@QUICK
@given(data=st.data())
def test_fuzzed_checkpoints_are_read_or_refused(data: st.DataObject):
    kind = data.draw(st.sampled_from([".pt", ".safetensors", ".json"]))
    with tempfile.TemporaryDirectory() as name:
        shapes = {"W_enc": (2, 4), "b_enc": (4,), "W_dec": (4, 2), "b_dec": (2,)}
        folder, tensors = Path(name) / "folder", {part: torch.ones(shape) for part, shape in shapes.items()}
        folder.mkdir()
        (folder / "cfg.json").write_text("{}")
        (folder / "sae_weights.safetensors").write_bytes(save(tensors))
        path = {".pt": folder / "25.pt", ".json": folder / "cfg.json"}.get(kind, folder / "sae_weights.safetensors")
        if kind == ".pt":
            torch.save(tensors, path)
        contents = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(contents)))
            contents[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
        if kind == ".json":
            contents = bytearray(json.dumps(data.draw(JSON)).encode()) if data.draw(st.booleans()) else contents
        path.write_bytes(contents)
        with nothing_outside(folder), suppress(InputError):
            read_checkpoint(str(path if kind == ".pt" else folder))


# ---- our own files


def manifest_json() -> dict[str, Any]:
    files = {"a/b.bin": {"bytes": 3, "sha256": "0" * 64}}
    return dict(unseal_json(seal_json({"format_version": 0, "id": SPEC.id, "spec": SPEC.to_json(), "files": files,
                                       "stats": {"rows": 1}, "provenance": {"device": "cpu"}})))  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"files": {name: {"bytes": 1, "sha256": "0" * 64}}}
        for name in ("../x", "/etc/passwd", "a/../../x", "a//b", "", ".", "C:\\x", "a\0b", "manifest.json", "x" * 300)
    ]
    + [{"files": {"a": {"bytes": size, "sha256": "0" * 64}}} for size in (-1, True, 1.5, "8", None, [])]
    + [{"files": {"a": {"bytes": 1, "sha256": digest}}} for digest in ("0" * 63, "Z" * 64, 0, None)]
    + [{"files": files} for files in ([], None, {"a": 1}, {"a": {}})]
    + [{"stats": 1}, {"provenance": []}, {"spec": None}, {"spec": {}}, {"id": "train-000000000000"}, {"surplus": 1}]
    + [
        {"spec": SPEC.to_json() | change}
        for change in ({"stage": "../x"}, {"version": "1"}, {"config": 1}, {"parents": 1})
    ],
    ids=str,
)
def test_a_manifest_that_is_none_is_refused_and_named(change: Mapping[str, Any], tmp_path: Path):
    (tmp_path / "manifest.json").write_bytes(seal_json({**manifest_json(), **change}))
    with pytest.raises(CorruptArtifact, match=re.escape(str(tmp_path / "manifest.json"))):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "data",
    [b"[" * DEEP, b'{"a":' * DEEP + b"1" + b"}" * DEEP, b"1" * 10_000, b'{"format_version":' + b"9" * 10_000 + b"}",
     b"\0" * 99,
     b'{"checksum":"","a":NaN}', b'{"checksum":"","a":1e999}', b'{"checksum":"x","checksum":"y"}'],
    ids=range(8),
)  # fmt: skip
def test_bytes_that_overwhelm_a_parser_are_refused_by_every_reader_of_json(data: bytes, tmp_path: Path):
    """Deep nesting, numbers of ten thousand digits, and numbers that are none."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "manifest.json").write_bytes(data)
    with pytest.raises(CorruptArtifact, match=r"manifest\.json"):
        open_folder(tmp_path / "a")
    place = tmp_path / "remote" / "train" / SPEC.id
    place.mkdir(parents=True)
    (place / "pointer.json").write_bytes(data[:4000])
    with pytest.raises(CorruptArtifact, match=r"pointer\.json"):
        read_pointer(RemoteStore(str(tmp_path / "remote")), SPEC.id)
    root = tmp_path / "store"
    store = ArtifactStore(root)
    store.make(SPEC, lambda _: Result({}), provenance={})
    (root / ".tags").mkdir()
    (root / ".tags" / "best").write_bytes(data)
    with pytest.raises(CorruptArtifact, match="best"):
        store.resolve("best")
    (root / "sparsemill-store.json").write_bytes(data)
    with pytest.raises(SparsemillError, match=r"sparsemill-store\.json"):
        ArtifactStore(root)
    write_store(tmp_path)
    (tmp_path / "store.zarr" / "zarr.json").write_bytes(data)
    with pytest.raises(SparsemillError, match=r"zarr\.json"):
        ShardReader(tmp_path, "harvest-0123456789ab")


@QUICK
@given(data=st.data())
def test_fuzzed_manifests_are_refused(data: st.DataObject):
    value = mutated(manifest_json(), data)
    try:
        found = Manifest.from_bytes(sealed(value), where="here")
    except (CorruptArtifact, UnsupportedFormat) as error:
        assert error.where == "here"  # noqa: PT017 - or it is read
        return
    assert found.to_bytes() == sealed(value)
    assert all(not name.startswith("/") and ".." not in name.split("/") for name in found.files)


@QUICK
@given(value=JSON)
def test_fuzzed_specs_are_refused(value: Any):
    for spec in (value, {**SPEC.to_json(), "config": value}, {**SPEC.to_json(), "parents": value}):
        with suppress(CorruptArtifact, UnsupportedFormat):
            found = Manifest.from_bytes(sealed({**manifest_json(), "spec": spec}), where="here")
            assert found.spec.id == SPEC.id


@QUICK
@given(
    value=JSON, place=st.text(max_size=12) | st.sampled_from(["harvest.seed", "train.autoencoder", "tokenize.sources"])
)
def test_fuzzed_settings_are_config_errors(value: Any, place: str):
    with suppress(ConfigError):
        load_preset("demo", [f"{place}={json.dumps(value)}"])


@QUICK
@given(text=st.text(max_size=60) | st.sampled_from(["[" * 5000, "a = " + "[" * 5000, "a = 1" + "0" * 5000]))
def test_fuzzed_presets_are_config_errors(text: str):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.toml"
        path.write_text(text)
        with pytest.raises(ConfigError):
            load_preset(str(path))


@QUICK
@given(data=st.data())
def test_fuzzed_pointers_are_refused(data: st.DataObject):
    good = {"format_version": 0, "id": SPEC.id, "manifest_sha256": "0" * 64, "files": 1, "bytes": 1}
    value = mutated(good, data)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "train" / SPEC.id
        place.mkdir(parents=True)
        (place / "pointer.json").write_bytes(sealed(value))
        with suppress(CorruptArtifact, UnsupportedFormat):
            pointer = read_pointer(RemoteStore(folder), SPEC.id)
            assert pointer is not None
            assert pointer.id == SPEC.id


def test_a_journal_that_names_a_file_outside_has_it_neither_read_nor_removed(tmp_path: Path):
    place, precious = tmp_path / "store" / ".staging" / SPEC.id, tmp_path / "precious"
    precious.write_text("precious")
    Staging(place, SPEC, {})
    journal = place / "journal.jsonl"
    record = {"bytes": 8, "sha256": hashlib.sha256(b"precious").hexdigest()}
    line = {"unit": "unit", "files": {"../../../../precious": record}, "data": {}}
    journal.write_bytes(journal.read_bytes() + seal_json(line) + b"\n")
    staging = Staging(place, SPEC, {})
    assert not staging.finished
    assert journal.read_bytes().count(b"\n") == 1
    assert precious.read_text() == "precious"


@settings(QUICK, max_examples=times(100, 5000))
@given(data=st.data())
def test_fuzzed_journals_are_taken_for_nothing_and_lead_nowhere(data: st.DataObject):
    """A line with a good checksum, whatever it says: what it names outside is neither read nor removed."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "root" / ".staging" / SPEC.id
        precious = Path(name) / "precious"
        precious.write_text("precious")
        staging = Staging(root, SPEC, {})
        staging.write_bytes("unit", b"1")
        staging.finish("unit", ["unit"])
        journal = root / "journal.jsonl"
        first, own = journal.read_bytes().splitlines()
        outside = {"bytes": 8, "sha256": hashlib.sha256(b"precious").hexdigest()}
        line = unseal_json(own)
        line = data.draw(
            st.sampled_from([line, {**line, "files": {"../../../../precious": outside}}, {"dropped": "unit"}])
        )
        lines = [first, *(sealed(mutated(line, data)) for _ in range(data.draw(st.integers(1, 3))))]
        journal.write_bytes(b"\n".join(lines) + b"\n")
        with nothing_outside(Path(name) / "root"):
            again = Staging(root, SPEC, {})
            for unit in list(again.finished):
                assert unit == "unit" or isinstance(unit, str)
            again.write_bytes("unit", b"1")
            with suppress(InputError):
                again.finish("another", ["unit"])
            again.seal()


def state() -> tuple[TrainerConfig, dict[str, torch.Tensor], dict[str, Any]]:
    config = TrainerConfig(d_sae=4, l1_coeff=0.1, steps=3, batch_rows=8, density_window_rows=64, engine="dense")
    trainer = Trainer.start(config, 2, torch.ones(8, 2), torch.ones(2), threads=1)
    return config, trainer.state_tensors(), trainer.state_json()


@settings(QUICK, max_examples=times(60, 3000))
@given(data=st.data())
def test_fuzzed_checkpoint_states_are_refused(data: st.DataObject):
    config, tensors, said = state()
    key = data.draw(st.sampled_from(sorted(said)))
    value = {**said, key: mutated(said[key], data)}
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensors[name] = data.draw(st.sampled_from([torch.ones(3), torch.ones(4, 2, dtype=torch.int64), torch.ones(())]))
    with suppress(SaeError):
        state_from(config, tensors, value)


def lie(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def apply(group: dict[str, Any]) -> None:
        group["attributes"]["sparsemill"]["layout"].update(changes)

    return apply


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "a thousand million windows": lie(n_windows=10**9, n_prompts=2**31 - 1),
    "more windows": lie(n_windows=4, n_prompts=200),
    "fewer windows": lie(n_windows=2),
    "wider rows": lie(d_in=600),
    "narrower rows": lie(d_in=3),
    "rows of 10^18 columns": lie(d_in=10**18),
    "rows of 10^400 columns": lie(d_in=10**400),
    "other chunks": lie(chunk_rows=8),
    "another type": lie(encoding="float16"),
    "a type of other size": lie(encoding="uint8"),
    "a negative size": lie(d_in=-6),
    "a fraction": lie(d_in=6.0),
    "a word": lie(d_in="6"),
    "a truth": lie(chunk_rows=True),
    "nothing": lie(n_windows=None),
    "a surplus": lie(surplus=1),
    "other positions": lie(first_position=0, positions=6),
    "another shuffle": lie(seed=8),
    "other prompts": lie(n_prompts=101),
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("everywhere", [False, True])
def test_zarr_metadata_that_lies_is_refused_and_named(name: str, everywhere: bool, tmp_path: Path):
    """In the group's attributes alone, or in the arrays' own metadata too, as someone would who knows the format."""
    artifact = ArtifactStore(tmp_path / "s").make(Spec("harvest", 1, {}), _harvested, provenance={}).artifact
    path = artifact.folder / "store.zarr" / "zarr.json"
    group = json.loads(path.read_bytes())
    LIES[name](group)
    path.write_text(json.dumps(group))
    if everywhere:
        with suppress(Exception):
            for array, sharded in ShardReader(artifact.folder, "x").layout.from_json(
                group["attributes"]["sparsemill"]["layout"]
            ).arrays().items():  # fmt: skip
                (path.parent / array / "zarr.json").write_bytes(sharded.metadata())
    with pytest.raises(CorruptArtifact, match=artifact.id):
        ShardReader.of(artifact)


def _harvested(staging: Staging) -> Result:
    staging.finish("all", write_store(staging.folder, SMALL))
    return Result({})


@QUICK
@given(data=st.data())
def test_fuzzed_zarr_metadata_is_refused_or_read_rightly(data: st.DataObject, zarr_store: Path):
    """Of a folder without a manifest, whose hashes would tell at once."""
    expected = ShardReader(zarr_store, "harvest-0123456789ab").read(0, SMALL.n_rows)
    path = data.draw(st.sampled_from(sorted(zarr_store.rglob("zarr.json"))))
    kept = path.read_bytes()
    try:
        path.write_text(json.dumps(mutated(json.loads(kept), data)))
        with suppress(CorruptArtifact, UnsupportedFormat):
            found = ShardReader(zarr_store, "harvest-0123456789ab").read(0, SMALL.n_rows)
            np.testing.assert_array_equal(found.rows, expected.rows)
    finally:
        path.write_bytes(kept)


@pytest.fixture(scope="module")
def zarr_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zarr")
    write_store(folder, SMALL)
    return folder


# ---- the report

SCRIPT = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


def test_no_name_or_token_becomes_script_in_a_report(tiny_preset: Path, tiny_model: Path, tmp_path: Path):
    model = copied(tiny_model, tmp_path)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get)
    tokenizer["model"]["vocab"] = {
        (f"{SCRIPT}{number}" if word.startswith("word_") and word != "word_0" else word): number
        for number, word in enumerate(words)
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    documents = tmp_path / f"{SCRIPT.replace('/', '')}.jsonl"
    numbers = [[2 + (7 * i + i // 60 + j * (1 + i % 7)) % 60 for j in range(40)] for i in range(1200)]
    rows = [{"text": " ".join(f"{SCRIPT}{number}" for number in row)} for row in numbers]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": SCRIPT, "kind": "files", "files": [str(documents)]}
    overrides = [
        f"tokenize.language_model={model}", f"harvest.language_model={model}",
        f"tokenize.sources={json.dumps([source])}", "tokenize.train_tokens=9000", "tokenize.held_out_tokens=200",
        "harvest.n_windows=2", "harvest.window_prompts=128",
        "train.pool_rows=1024", "train.autoencoder.steps=10", 'analyze.analyses=["density", "null_space"]',
    ]  # fmt: skip
    workspace = Workspace.open(Runtime(root=tmp_path / "store", threads=1), Quiet())
    report = Chain(load_preset(str(tiny_preset), overrides), workspace, run_directly).report()
    seen = 0
    for name in report.manifest.files:
        text = report.read_bytes(name).decode("utf-8", errors="replace")
        seen += "alert(1)" in text
        if name.endswith(".html"):
            assert SCRIPT not in text, name
            assert "<img src=x" not in text, name
            assert "<script>alert" not in text, name
        elif "alert(1)" in text and name.endswith(".js"):
            assert "</script" not in text, name
    assert seen, "the names are in the report, escaped"
