from pathlib import Path

import numpy as np
import pytest

from pipeline import language_model
from pipeline.config import Runtime, load_preset
from pipeline.live import live_activations
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.tokens import TokenTable
from pipeline.training import load_autoencoder, training_log
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.reader import BatchOrder, ShardReader

OVERRIDES = (
    "harvest.n_windows=1",
    "harvest.model_batch_prompts=8",
    "harvest.encoding=float16",
    "train.source=live",
    "train.pool_rows=2400",
)


@pytest.fixture(scope="module")
def made(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    workspace = Workspace.open(Runtime(root=tmp_path_factory.mktemp("home") / "store", threads=1), Quiet())
    run = Chain(load_preset(str(tiny_preset), OVERRIDES), workspace, run_directly)
    run.train()
    return {stage.name: stage.made.artifact for stage in run.runs}


def test_rows_are_those_of_the_store_and_go_on_beyond_it(made: dict[str, Artifact], tiny_model: Path):
    table, reader = TokenTable(made["tokenize"]), ShardReader.of(made["harvest"])
    source = live_activations(made["harvest"], table, language_model.load(str(tiny_model)))
    stored = set(reader.read(0, reader.n_rows).prompt.tolist())
    found: set[int] = set()
    for batch in source.epoch(BatchOrder(seed=0, batch_rows=400, pool_rows=2400)):
        known = np.isin(batch.prompt, list(stored))
        expected = reader.rows_at(batch.prompt[known], batch.position[known])
        np.testing.assert_array_equal(batch.rows[known], expected)
        found |= set(batch.prompt.tolist())
    assert stored < found
    assert len(found) == table.n_prompts("train") // 8 * 8


def test_a_training_says_where_its_rows_came_from_and_how_mixed_they_were(made: dict[str, Artifact]):
    stats = facts(made["train"])
    prompts = TokenTable(made["tokenize"]).n_prompts("train")
    assert stats["source"] == "live"
    assert stats["rows"] == prompts // 8 * 8 * 15
    assert stats["prompts_left_out"] == prompts % 8
    certificate = stats["certificate"]
    assert certificate["order"] == {"seed": 0, "batch_rows": 256, "pool_rows": 2400, "lanes": 8}
    assert certificate["pair_ratio"] == pytest.approx(stats["rows"] / (1.5 * 2400), rel=0.25)


def test_a_live_training_learns(made: dict[str, Artifact]):
    log = training_log(made["train"]).to_pylist()
    assert log[-1]["l2"] < 0.5 * log[0]["l2"]
    assert load_autoencoder(made["train"]).d_in == 24
