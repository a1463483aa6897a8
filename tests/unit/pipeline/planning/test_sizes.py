from pathlib import Path

import numpy as np
import pytest

from pipeline.config import Preset, load_preset
from pipeline.planning.sizes import RunPlan, Site, Subject, TokensPlan, planned_batches
from storage.errors import InputError
from storage.order import BatchOrder
from storage.reader import ShardReader
from storage.shards import Layout, WindowBuffer, create_group

POST = Site(hook_name="blocks.0.mlp.hook_post", d_in=24)
OUT = Site(hook_name="blocks.0.hook_mlp_out", d_in=16)


@pytest.fixture
def preset(tiny_preset: Path) -> Preset:
    return load_preset(str(tiny_preset))


def subject(preset: Preset, *sites: Site) -> Subject:
    return Subject(preset, sites or (POST,))


def test_a_remainder_smaller_than_a_window_is_left_out_and_told(preset: Preset):
    # 40,000 tokens are 2,500 prompts of 16: nine windows of 256, and 196 prompts over.
    plan = subject(preset).plan()
    (store,) = plan.stores
    assert (plan.tokens.train_prompts, plan.tokens.train_tokens, plan.tokens.exact) == (2500, 40_000, False)
    assert (store.windows, store.rows, store.shards) == (9, 9 * 256 * 15, 9 * 15)
    assert (store.prompts_left_out, store.tokens_left_out) == (196, 196 * 16)


def test_prompts_counted_in_the_artifact_replace_those_asked_for(preset: Preset):
    tokens = TokensPlan(train_prompts=600, train_tokens=9600, bytes=42_000, exact=True)
    plan = Subject(preset, (POST,), tokens, ("tokenize",)).plan()
    assert (plan.tokens, plan.stores[0].windows, plan.stores[0].prompts_left_out) == (tokens, 2, 88)
    assert plan.disk_bytes == plan.stores[0].bytes + plan.training.working_bytes


def test_sites_harvested_together_are_added_up(preset: Preset):
    alone = [subject(preset, site).plan() for site in (POST, OUT)]
    both = subject(preset, POST, OUT).plan()
    assert [store.bytes for store in both.stores] == [plan.stores[0].bytes for plan in alone]
    assert both.bytes_by_stage["harvest"] == sum(plan.stores[0].bytes for plan in alone)
    assert both.training == alone[0].training


def test_training_is_counted_in_steps_and_passes(preset: Preset):
    training = subject(preset).plan().training
    assert training.steps == 60
    assert training.passes == pytest.approx(60 * 256 / (9 * 256 * 15))
    assert training.working_bytes > 3 * training.bytes


def test_too_few_prompts_for_a_window_are_an_error(preset: Preset):
    with pytest.raises(InputError, match="2,500 prompts, 0 whole windows"):
        subject(preset).changed(harvest={"window_prompts": 4096, "chunk_rows": 32}).plan()
    with pytest.raises(InputError, match="expected 10 windows of 256"):
        subject(preset).changed(harvest={"n_windows": 10}).plan()


def test_a_scaled_run_grows_with_its_tokens_and_keeps_its_passes(preset: Preset):
    base = subject(preset)
    once, ten = (base.scaled(n * 256 * 16 * 100).plan() for n in (1, 10))
    assert (once.stores[0].rows, ten.stores[0].rows) == (100 * 256 * 15, 1000 * 256 * 15)
    assert ten.training.passes == pytest.approx(base.plan().training.passes, rel=0.01)
    for figure in ("rows", "shards", "bytes", "files"):  # but for the few files that belong to no window
        assert getattr(ten.stores[0], figure) == pytest.approx(10 * getattr(once.stores[0], figure), rel=5e-3)
    assert ten.tokens.train_tokens == 10 * once.tokens.train_tokens
    assert ten.training.steps == pytest.approx(10 * once.training.steps, rel=0.01)


def test_a_scaled_run_forgets_the_windows_and_artifacts_of_the_small_one(preset: Preset):
    tokens = TokensPlan(train_prompts=600, train_tokens=9600, bytes=42_000, exact=True)
    small = Subject(preset, (POST,), tokens, ("tokenize", "harvest")).changed(harvest={"n_windows": 1})
    scaled = small.scaled(256 * 16 * 7)
    assert (scaled.plan().stores[0].windows, scaled.plan().made) == (7, ())


def test_uint8_takes_a_quarter_of_float32_and_half_of_float16(preset: Preset):
    wide = subject(preset, Site(hook_name="blocks.0.mlp.hook_post", d_in=2048))
    sizes = {
        encoding: wide.changed(harvest={"encoding": encoding}).scaled(10**9).plan().stores[0]
        for encoding in ("float32", "float16", "bfloat16", "uint8")
    }
    rows = sizes["uint8"].rows
    assert sizes["bfloat16"].bytes == pytest.approx(sizes["float16"].bytes, rel=1e-6)
    statistics = sizes["uint8"].windows * 4 * 2048**2
    assert 2048 <= (sizes["uint8"].bytes - statistics) / rows < 2048 * 1.02
    assert 4096 <= (sizes["float16"].bytes - statistics) / rows < 4096 * 1.01
    assert 8192 <= (sizes["float32"].bytes - statistics) / rows < 8192 * 1.01


def test_a_plan_prints_as_json_and_reads_back(preset: Preset):
    plan = subject(preset, POST, OUT).plan()
    assert RunPlan.model_validate_json(plan.model_dump_json()) == plan


def test_the_planned_order_of_prompts_and_its_pools_are_those_of_the_store(tmp_path: Path):
    layout = Layout(
        n_windows=3, window_prompts=32, positions=5, d_in=4, chunk_rows=8, encoding="uint8", seed=3, n_prompts=100
    )
    create_group(tmp_path, layout)
    rows = np.ones((32, 5, 4), np.float32)
    for window in range(3):
        buffer = WindowBuffer(layout, window)
        buffer.add(0, rows)
        buffer.write(tmp_path)
    order = BatchOrder(seed=1, batch_rows=48, pool_rows=160, lanes=4)
    reader, planned = ShardReader(tmp_path, "store"), planned_batches(layout)
    expected = list(reader.prompts(order))
    for found, wanted in zip(planned.prompts(order), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert planned.pool_bytes(order) == reader.pool_bytes(order)


def test_live_training_counts_its_passes_over_all_prompts_and_its_own_pools(preset: Preset):
    live = subject(preset).changed(harvest={"n_windows": 1, "model_batch_prompts": 3}, train={"source": "live"})
    plan = live.plan()
    assert plan.training.passes == pytest.approx(60 * 256 / (2499 * 15))
    row_bytes = 24 * 4 + 4 + 2
    pools = live.memory_needs(model_width=96, d_vocab=64, workers=1)["train"]["shuffling pools"]
    assert 2 * 1024 * row_bytes < pools < 4 * 1024 * row_bytes
    with pytest.raises(NotImplementedError):
        next(iter(live.batches().batches(live.order, prefetch=0)))
