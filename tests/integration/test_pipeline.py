import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline import language_model
from pipeline.config import Runtime, load_preset
from pipeline.progress import Advance, Quiet
from pipeline.stages import Chain, run_directly
from pipeline.tokens import TokenTable
from pipeline.training import load_autoencoder, training_log
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.errors import TrainingDiverged
from storage.reader import BatchOrder, ReadState, ShardReader


def chain(preset: Path, root: Path, *overrides: str) -> Chain:
    workspace = Workspace.open(Runtime(root=root, threads=1), Quiet())
    return Chain(load_preset(str(preset), overrides), workspace, run_directly)


def statuses(run: Chain) -> dict[str, str]:
    return {stage.name: stage.made.status for stage in run.runs}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home") / "store"


@pytest.fixture(scope="module")
def finished(tiny_preset: Path, root: Path) -> Chain:
    run = chain(tiny_preset, root)
    run.report()
    return run


@pytest.fixture
def made(finished: Chain) -> dict[str, Artifact]:
    return {stage.name: stage.made.artifact for stage in finished.runs}


def test_every_stage_is_made_once_and_then_found(finished: Chain, tiny_preset: Path, root: Path):
    assert set(statuses(finished).values()) == {"made"}
    again = chain(tiny_preset, root)
    again.report()
    assert set(statuses(again).values()) == {"cached"}
    assert [stage.made.artifact.id for stage in again.runs] == [stage.made.artifact.id for stage in finished.runs]


def test_another_option_of_one_analysis_makes_that_one_and_the_report(finished: Chain, tiny_preset: Path, root: Path):
    again = chain(tiny_preset, root, "analyze.options.kurtosis.clip=7")
    again.report()
    assert {name for name, status in statuses(again).items() if status == "made"} == {"kurtosis", "report"}


def test_the_same_config_elsewhere_gives_the_same_bytes(made: dict[str, Artifact], tiny_preset: Path, tmp_path: Path):
    again = chain(tiny_preset, tmp_path / "elsewhere")
    again.report()
    for stage in again.runs:
        assert stage.made.artifact.manifest_sha256 == made[stage.name].manifest_sha256, stage.name


def test_every_row_is_in_the_store_once_and_equals_the_models_activation(made: dict[str, Artifact], tiny_model: Path):
    activations = made["harvest"]
    reader, table = ShardReader.of(activations), TokenTable(made["tokenize"])
    whole = reader.read(0, reader.n_rows)
    places = np.stack([whole.prompt, whole.position], axis=1)
    assert len(np.unique(places, axis=0)) == reader.n_rows == facts(activations)["rows"]
    assert set(whole.position.tolist()) == set(range(1, 16))
    model = language_model.load(str(tiny_model))
    for prompt in np.unique(whole.prompt)[::50]:
        expected = model.activations(table.ids("train", [int(prompt)]), "blocks.0.mlp.hook_post")[0, 1:]
        got = reader.rows_at(np.full(15, prompt), np.arange(1, 16))
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=0, atol=1e-5)


def test_statistics_equal_a_float64_recomputation(made: dict[str, Artifact]):
    from pipeline.harvest import mean_activation, moments

    reader = ShardReader.of(made["harvest"])
    rows = reader.read(0, reader.n_rows).rows.astype(np.float64)
    np.testing.assert_allclose(mean_activation(made["harvest"]), rows.mean(0), rtol=1e-6, atol=1e-7)
    found = moments(made["harvest"])
    np.testing.assert_array_equal(found.low, rows.min(0))
    np.testing.assert_array_equal(found.high, rows.max(0))
    assert facts(made["harvest"])["certificate"]["passed"] is True


def test_training_improves_and_logs_what_it_does(made: dict[str, Artifact]):
    log = training_log(made["train"]).to_pylist()
    assert [row["step"] for row in log] == [10, 20, 30, 40, 50, 60]
    assert log[-1]["l2"] < 0.5 * log[0]["l2"]
    assert [row["loss_recovered"] is not None for row in log] == [False, True, False, True, False, True]
    densities = load_file(made["train"].file("densities.safetensors"))
    assert densities["counts"].shape == (len(densities["step"]), 64)
    assert (densities["rows"] >= 4096).all()
    sae = load_autoencoder(made["train"])
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_lineage_leads_from_the_report_to_the_tokens(finished: Chain, made: dict[str, Artifact]):
    store = finished.workspace.store
    sae = store.parent(made["report"], "sae")
    activations = store.parent(sae, "activations")
    assert store.parent(activations, "tokens").id == made["tokenize"].id
    assert store.parent(made["loss_recovered"], "density").id == made["density"].id
    assert set(made["null_space"].parents) >= {"sae"}


def test_the_report_opens_without_a_network(made: dict[str, Artifact]):
    page = made["report"].file("index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page
    for name in ("density", "null_space", "kurtosis"):
        assert made[name].id in page


def test_a_diverging_training_names_the_step_its_first_rows_and_the_newest_checkpoint(
    tiny_preset: Path, root: Path, finished: Chain
):
    assert finished.runs
    workspace = Workspace.open(Runtime(root=root, threads=1, checkpoint_seconds=1e-9), Quiet())
    preset = load_preset(str(tiny_preset), ["train.autoencoder.learning_rate=1e25", "train.autoencoder.seed=6"])
    with pytest.raises(TrainingDiverged) as raised:
        Chain(preset, workspace, run_directly).train()
    found = re.search(
        r"where: step (\d+), the reader's epoch (\d+), batch (\d+): "
        r"256 rows \(prompt:position\) ((?:\d+:\d+, ){8})\.\.\.",
        str(raised.value),
    )
    assert found is not None
    step, epoch, number = map(int, found.groups()[:3])
    assert f"the newest checkpoint is checkpoint-{step - 1:09d}" in str(raised.value)
    activations = next(stage.made.artifact for stage in finished.runs if stage.name == "harvest")
    order = BatchOrder(preset.train.reader_seed, 256, preset.train.pool_rows, preset.train.lanes)
    with ShardReader.of(activations).batches(order, start=ReadState(epoch, number)) as batches:
        batch = next(batches)
    places = zip(batch.prompt[:8].tolist(), batch.position[:8].tolist(), strict=True)
    assert found[4] == "".join(f"{prompt}:{position}, " for prompt, position in places)


class Notes(Quiet):
    """Keeps what is shown beside the bar of a training."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextmanager
    def track(self, label: str, total: int, unit: str, *, start: int = 0) -> Generator[Advance]:  # noqa: ARG002
        def advance(done: int = 1, *, note: str = "") -> None:
            if label == "train":
                self.notes.append(note)

        yield advance


def test_a_training_shows_how_it_goes_and_its_run_file_how_fast_it_was(tiny_preset: Path, root: Path, finished: Chain):
    assert finished.runs
    settings = ["train.autoencoder.seed=7", "train.autoencoder.steps=21"]  # the last step is evaluated, too
    reporter = Notes()
    workspace = Workspace.open(Runtime(root=root, threads=1), reporter)
    sae = Chain(load_preset(str(tiny_preset), settings), workspace, run_directly).train()
    fit, speed = r"L0 [\d.]+  explained [\d.-]+  ", r"[\d,]+ rows/s, \d+% waiting for rows"
    assert len(reporter.notes) == 21
    assert re.fullmatch(fit + speed, reporter.notes[0])
    assert re.fullmatch(fit + r"dead [\d.]+%  " + speed, reporter.notes[18])
    assert re.fullmatch(fit + r"dead [\d.]+%  recovered [\d.-]+%  " + speed, reporter.notes[20])
    run = json.loads((sae.folder / "run.json").read_text())
    assert run["rows_per_second"] > 0
    assert 0 <= run["waiting_for_rows"] <= 1
    assert "rows_per_second" not in sae.stats


def test_a_training_writes_tensorboard_events_under_its_id_and_a_found_one_none(
    tiny_preset: Path, root: Path, finished: Chain, tmp_path: Path
):
    runtime = Runtime(root=root, threads=1, tensorboard=tmp_path / "events")
    preset = load_preset(str(tiny_preset), ["train.autoencoder.seed=5"])

    def train() -> Artifact:
        return Chain(preset, Workspace.open(runtime, Quiet()), run_directly).train()

    sae = train()
    written = list((tmp_path / "events" / sae.id).iterdir())
    assert len(written) == 1
    events = written[0].read_bytes()
    assert all(f"train/{name}".encode() in events for name in ("l0", "rows_per_second", "waiting_for_rows"))
    assert not {"rows_per_second", "waiting_for_rows"} & set(training_log(sae).column_names)
    assert train().id == sae.id
    assert list((tmp_path / "events" / sae.id).iterdir()) == written
