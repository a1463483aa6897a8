"""The command lines in a report, run as they stand: each finds the artifact that it is said to make."""

import re
import shlex
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

from pipeline import commands, studies, training
from pipeline.cli import app
from pipeline.config import Runtime, load_preset, preset_names
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from storage.artifact import Artifact

CHANGED = (
    "train.autoencoder.steps=20",
    "harvest.second_moment_stride=1",
    "analyze.survey.rows=20000",
    "analyze.options.density.bin_width=0.2",
    "analyze.options.loss_recovered.prompts=8",
    "analyze.options.loss_recovered.floors=[0.001,0.1]",
    "analyze.options.kurtosis.clip=7",
    'analyze.analyses=["density","loss_recovered","kurtosis","enc_dec"]',
)


@pytest.fixture(scope="module")
def made(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Artifact]:
    """The chain of a preset of one's own with settings changed, and its report."""
    workspace = Workspace.open(Runtime(root=tmp_path_factory.mktemp("home") / "store", threads=1), Quiet())
    chain = Chain(load_preset(str(tiny_preset), CHANGED), workspace, run_directly)
    return chain, chain.report()


def commands_of(report: Artifact) -> Iterator[str]:
    page = (report.folder / "index.html").read_text()
    yield from (unescape(found) for found in re.findall(r'<code class="command">(.*?)</code>', page))


def test_each_finds_what_it_is_said_to_make(made: tuple[Chain, Artifact], capsys: pytest.CaptureFixture[str]) -> None:
    chain, report = made
    store = chain.workspace.store
    before = {stage: set(store.ids(stage)) for stage in ("tokenize", "harvest", "train", "survey", "analyze")}
    whole, *sections = commands_of(report)
    assert len(sections) == 4
    for command in (whole, *sections):
        program, *arguments = shlex.split(command)
        assert program == "sparsemill"
        app([*arguments, "--home", str(store.root)], result_action="return_value")
        shown = capsys.readouterr().out.split()[0]
        assert shown == report.parents["sae"].id or store.resolve(shown).parents["sae"].id == report.parents["sae"].id
    assert {stage: set(store.ids(stage)) for stage in before} == before


def test_settings_of_what_is_read_stand_in_the_command_and_defaults_do_not(made: tuple[Chain, Artifact]) -> None:
    _, *sections = commands_of(made[1])
    words = {command.split("--only ")[1].split()[0]: shlex.split(command)[6::2] for command in sections}
    survey, density = "analyze.survey.rows=20000", "analyze.options.density.bin_width=0.2"
    assert words["density"] == [density, survey]
    assert words["enc_dec"] == [density, survey]
    assert words["kurtosis"] == ["analyze.options.kurtosis.clip=7.0", density, survey]
    assert set(words["loss_recovered"]) == {
        "analyze.options.loss_recovered.prompts=8",
        "analyze.options.loss_recovered.floors=[0.001, 0.1]",
        density,
        survey,
    }


def test_a_preset_that_ships_is_made_from_the_documents_on(made: tuple[Chain, Artifact], tiny_preset: Path) -> None:
    chain, report = made
    sae = chain.workspace.store.parent(report, "sae")
    assert commands.to_train("tiny", sae, chain.workspace).startswith("sparsemill train --activations harvest-")
    tiny = load_preset(str(tiny_preset))

    def told(*overrides: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(commands, "preset_names", lambda: ["tiny"])
            patch.setattr(commands, "load_preset", lambda _: load_preset(str(tiny_preset), overrides))
            return commands.to_train("tiny", sae, chain.workspace)

    assert tiny.train.autoencoder.steps == 60
    changed = "harvest.second_moment_stride=1"
    assert told(changed) == "sparsemill replicate --preset tiny --set train.autoencoder.steps=20"
    assert told(changed, "train.autoencoder.steps=20") == "sparsemill replicate --preset tiny"
    assert "--activations harvest-" in told(changed, "harvest.window_prompts=128")
    assert "--activations harvest-" in told(changed, "tokenize.train_tokens=39000")


def test_a_rerun_names_the_study_that_trains_it(made: tuple[Chain, Artifact]) -> None:
    chain, report = made
    first = chain.workspace.store.parent(report, "sae")
    ((_, config, activations, directions),) = studies.orthogonal_rerun([3, 5]).trainings(chain, first)
    sae = training.train(config, activations, chain.workspace, directions=directions).artifact
    told = commands.to_train("tiny", sae, chain.workspace)
    assert told == f"sparsemill study orthogonal-rerun --sae {first.id} --features 3 5"


def test_the_presets_that_ship_leave_options_as_they_are() -> None:
    for name in preset_names():
        preset = load_preset(name)
        assert not preset.analyze.options, "commands name options beside the defaults, not beside a preset's"
        assert preset.analyze.survey == type(preset.analyze.survey)()
