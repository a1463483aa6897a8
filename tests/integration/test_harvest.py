"""Harvests of a tiny model: sites in one pass, longer and shorter ones of a series, windows made again."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import harvest as stage
from pipeline import language_model, tokens, windows
from pipeline.config import Preset, Runtime, load_preset
from pipeline.tokens import TokenTable
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.artifacts import Made
from storage.certificate import Certificate, certify
from storage.errors import MemoryBudgetExceeded, NumericsError, StorageFull, UnknownHook, UnsupportedFormat
from storage.reader import BatchOrder, ShardReader
from storage.shards import WindowBuffer

POST, OUT = "blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out"
SHORT, LONG = "harvest.n_windows=3", "harvest.n_windows=7"


@pytest.fixture
def make(tiny_preset: Path, tmp_path: Path) -> Callable[..., tuple[Made, Workspace]]:
    """Harvests with some overrides, in a store named by ``root`` under the test's folder."""

    def harvest(*overrides: str, root: str = "store", threads: int = 1) -> tuple[Made, Workspace]:
        preset: Preset = load_preset(str(tiny_preset), overrides)
        workspace = Workspace.open(Runtime(root=tmp_path / root, threads=threads))
        parent = tokens.tokenize(preset.tokenize, workspace).artifact
        return stage.harvest(preset.harvest, parent, workspace), workspace

    return harvest


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """Grows by (window, sites) as windows are computed."""
    seen: list[tuple[int, list[str]]] = []
    original = windows.WindowHarvester.compute

    def compute(self: windows.WindowHarvester, window: int, hook_names: Sequence[str], *rest: object):
        seen.append((window, list(hook_names)))
        return original(self, window, hook_names, *rest)

    monkeypatch.setattr(windows.WindowHarvester, "compute", compute)
    return seen


def test_every_row_equals_the_bits_of_the_model_on_the_same_batch(make):
    made, workspace = make("harvest.n_windows=2")
    reader = ShardReader.of(made.artifact)
    table = TokenTable(workspace.store.parent(made.artifact, "tokens"))
    model = language_model.load_recorded(made.artifact)
    config = stage.recorded_config(made.artifact)
    order = stage_order(made.artifact)
    torch.set_num_threads(1)
    for start in range(0, 2 * 256, config.model_batch_prompts):
        prompts = order[start : start + config.model_batch_prompts]
        expected = model.activations(table.ids("train", prompts), POST)[:, 1:].numpy()
        found = reader.rows_at(np.repeat(prompts, 15), np.tile(np.arange(1, 16), len(prompts)))
        np.testing.assert_array_equal(found, expected.reshape(-1, 24))


def stage_order(artifact: Artifact) -> np.ndarray:
    from storage.shuffle import prompt_order

    layout = stage.recorded_layout(artifact)
    return prompt_order(layout.seed, layout.n_prompts)


def test_no_shard_holds_two_rows_of_one_prompt(make):
    artifact = make("harvest.n_windows=2")[0].artifact
    reader = ShardReader.of(artifact)
    for shard in range(facts(artifact)["shards"]):
        prompts = reader.read(shard * 256, (shard + 1) * 256).prompt
        assert len(np.unique(prompts)) == 256


def test_the_number_of_threads_does_not_change_a_byte(make):
    one, two = make(SHORT, root="one", threads=1)[0], make(SHORT, root="two", threads=2)[0]
    assert one.artifact.manifest_sha256 == two.artifact.manifest_sha256


def test_a_longer_harvest_links_the_windows_there_are_and_equals_one_made_in_one_go(make, computed):
    short = make(SHORT)[0].artifact
    computed.clear()
    extended = make(LONG)[0].artifact
    assert [window for window, _ in computed] == [3, 4, 5, 6]
    whole = make(LONG, root="elsewhere")[0].artifact
    assert extended.manifest.files == whole.manifest.files
    assert extended.manifest_sha256 == whole.manifest_sha256
    linked = [name for name in short.manifest.files if "/c/" in name or name.startswith("statistics/")]
    assert len(linked) == 3 * (15 + 3 + 1)
    for name in linked:
        assert (extended.folder / name).samefile(short.folder / name)


def test_a_shorter_harvest_computes_nothing_and_equals_one_made_alone(make, computed):
    make(LONG)
    computed.clear()
    short = make(SHORT)[0].artifact
    assert computed == []
    assert short.manifest_sha256 == make(SHORT, root="elsewhere")[0].artifact.manifest_sha256


def test_a_window_is_written_while_the_next_is_computed(make, monkeypatch: pytest.MonkeyPatch):
    computed_next, seen = threading.Event(), list[bool]()
    compute, write = windows.WindowHarvester.compute, WindowBuffer.write

    def compute_and_tell(self: windows.WindowHarvester, window: int, *rest: object):
        found = compute(self, window, *rest)
        if window == 1:
            computed_next.set()
        return found

    def wait_and_write(self: WindowBuffer, folder: Path):
        if self.window == 0:
            seen.append(computed_next.wait(timeout=30))
        return write(self, folder)

    monkeypatch.setattr(windows.WindowHarvester, "compute", compute_and_tell)
    monkeypatch.setattr(WindowBuffer, "write", wait_and_write)
    make(SHORT)
    assert seen == [True]


def test_a_store_whose_certificate_fails_is_not_committed(
    make, computed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def mixed_badly(reader: ShardReader, order: BatchOrder) -> Certificate:
        return replace(certify(reader, order), pair_ratio=2.0, standard_error=0.01)

    with monkeypatch.context() as patched:
        patched.setattr(stage, "certify", mixed_badly)
        with pytest.raises(NumericsError, match=r"found 2\.0000 of the uniform rate"):
            make(SHORT)
    assert not list(tmp_path.glob("store/harvest/*/manifest.json"))
    computed.clear()
    made = make(SHORT)[0]
    assert computed == []  # its windows were finished
    assert made.status == "resumed"
    assert facts(made.artifact)["certificate"]["passed"] is True
    assert made.artifact.manifest_sha256 == make(SHORT, root="elsewhere")[0].artifact.manifest_sha256


@pytest.mark.parametrize("other", ["harvest.seed=5", 'harvest.encoding="float16"', "harvest.model_batch_prompts=4"])
def test_another_series_takes_nothing_over(make, computed, other: str):
    make(SHORT)
    computed.clear()
    make(LONG, other)
    assert [window for window, _ in computed] == list(range(7))


def test_other_numerics_take_nothing_over(make, computed, monkeypatch: pytest.MonkeyPatch):
    make(SHORT)
    computed.clear()
    provenance = Workspace.provenance
    monkeypatch.setattr(Workspace, "provenance", lambda self, **options: provenance(self, **options) | {"torch": "0"})
    make(LONG)
    assert [window for window, _ in computed] == list(range(7))


def test_a_damaged_window_is_computed_rather_than_taken_over(make, computed):
    short = make(SHORT)[0].artifact
    path = short.folder / f"store.zarr/activations/c/{15 + 4}/0"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    computed.clear()
    extended = make(LONG)[0].artifact
    assert [window for window, _ in computed] == [1, 3, 4, 5, 6]
    assert extended.manifest_sha256 == make(LONG, root="elsewhere")[0].artifact.manifest_sha256


def test_sites_harvested_in_one_pass_are_those_harvested_alone(make, computed):
    both = make(SHORT, f'harvest.also_hook_names=["{OUT}"]')[0].artifact
    assert computed == [(window, [POST, OUT]) for window in range(3)]
    other = make(SHORT, f'harvest.hook_name="{OUT}"')[0]
    assert other.status == "cached"
    assert facts(other.artifact)["d_in"] == 16
    alone = make(SHORT, root="alone")[0].artifact
    other_alone = make(SHORT, f'harvest.hook_name="{OUT}"', root="alone")[0].artifact
    assert both.manifest_sha256 == alone.manifest_sha256
    assert other.artifact.manifest_sha256 == other_alone.manifest_sha256
    first, second = ShardReader.of(both), ShardReader.of(other.artifact)
    rows = slice(0, first.n_rows)
    np.testing.assert_array_equal(first.read(0, first.n_rows).prompt, second.read(0, second.n_rows).prompt)
    np.testing.assert_array_equal(
        first.read(rows.start, rows.stop).position, second.read(rows.start, rows.stop).position
    )


def test_a_site_that_is_there_is_not_computed_again_beside_another(make, computed):
    make(SHORT)
    computed.clear()
    made = make(SHORT, f'harvest.hook_name="{OUT}"', f'harvest.also_hook_names=["{POST}"]')[0]
    assert made.artifact.config["hook_name"] == OUT
    assert computed == [(window, [OUT]) for window in range(3)]


def test_windows_and_shared_files_made_again_have_the_committed_bytes(make, tmp_path: Path):
    made, workspace = make(SHORT)
    artifact = made.artifact
    names = stage.write_window_files(artifact, [2, 0], tmp_path / "again", workspace)
    names += stage.write_shared_files(artifact, tmp_path / "again")
    expected = {name for name in artifact.manifest.files if not name.startswith(_of_window(1))}
    expected -= {name for name in artifact.manifest.files if _window(name) == 1}
    assert set(names) == expected
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (artifact.folder / name).read_bytes(), name


def _of_window(window: int) -> str:
    return f"statistics/window-{window:05d}"


def _window(name: str) -> int | None:
    parts = name.split("/")
    if "c" not in parts:
        return None
    shard = int(parts[parts.index("c") + 1])
    return shard // 15 if parts[1] == "activations" else shard


def test_what_an_older_version_harvested_is_refused_not_misread(make, monkeypatch: pytest.MonkeyPatch):
    artifact = make(SHORT)[0].artifact
    monkeypatch.setattr(stage, "OUTPUT_VERSION", 3)
    with pytest.raises(UnsupportedFormat, match="version 2"):
        stage.recorded_config(artifact)


def test_no_room_on_the_disk_is_told_before_any_work(make, computed, monkeypatch: pytest.MonkeyPatch):
    make("harvest.n_windows=1")
    computed.clear()
    monkeypatch.setattr("storage.atomic.free_bytes", lambda _: 1000)
    with pytest.raises(StorageFull, match="not enough disk space"):
        make(SHORT)
    assert computed == []


def test_no_room_in_memory_is_told_before_any_work_with_the_window_that_fits(
    make, computed, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.memory.available_bytes", lambda: 2**27 + 900_000)
    with pytest.raises(MemoryBudgetExceeded, match=r"harvest\.window_prompts=(\d+)"):
        make(SHORT)
    assert computed == []


def test_an_unknown_further_site_is_named_before_any_work(make, computed):
    with pytest.raises(UnknownHook, match="hook_mlp_out"):
        make(SHORT, 'harvest.also_hook_names=["blocks.0.hook_mlp_outt"]')
    assert computed == []


def test_further_sites_are_no_part_of_the_identity(make):
    artifact = make(SHORT, f'harvest.also_hook_names=["{OUT}"]')[0].artifact
    assert "also_hook_names" not in artifact.config
    assert json.dumps(dict(artifact.config)).count("hook_") == 2  # the key and the site's own name
