from pathlib import Path

import pytest

from pipeline.config import Preset, load_preset, preset_names
from storage.errors import ConfigError


@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_loads_and_says_what_it_is_for(name: str):
    preset = load_preset(name)
    assert preset.name == name
    assert len(preset.description) > 20


def test_overrides_take_json_and_bare_strings():
    preset = load_preset(
        "demo",
        [
            "train.autoencoder.steps=7",
            "harvest.encoding=float32",
            'analyze.analyses=["density"]',
            "harvest.include_bos=true",
        ],
    )
    assert preset.train.autoencoder.steps == 7
    assert preset.harvest.encoding == "float32"
    assert preset.analyze.analyses == ("density",)
    assert preset.harvest.include_bos is True


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="demo"):
        load_preset("demmo")


def test_unknown_option_names_the_nearest_of_its_section():
    with pytest.raises(ConfigError) as caught:
        load_preset("demo", ["train.autoencoder.l1_coef=1"])
    assert "train.autoencoder.l1_coef: unknown option; nearest: l1_coeff" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("harvest.window_prompts=-1", "greater than 0"),
        ("harvest.chunk_rows=300", "does not divide"),
        ("tokenize.prompt_tokens=1", "greater than or equal to 2"),
        ("harvest.encoding=float8", "float16"),
        ("nonsense", "stage.field=value"),
        ("harvest.chunk_rows.more=1", "not a section"),
    ],
)
def test_bad_values_are_named(override: str, complaint: str):
    with pytest.raises(ConfigError) as caught:
        load_preset("demo", [override])
    assert complaint in str(caught.value)


def test_a_preset_file_of_ones_own(tmp_path: Path):
    shipped = Path(__file__).parents[3] / "pipeline" / "presets" / "demo.toml"
    mine = tmp_path / "mine.toml"
    mine.write_text(shipped.read_text())
    assert load_preset(str(mine)).harvest == load_preset("demo").harvest
    with pytest.raises(ConfigError, match="no such preset file"):
        load_preset(str(tmp_path / "missing.toml"))
    mine.write_text("not toml =")
    with pytest.raises(ConfigError, match="no TOML"):
        load_preset(str(mine))


def test_every_field_of_every_stage_is_described():
    def check(model: type, path: str) -> None:
        for name, field in model.model_fields.items():
            annotation = field.annotation
            assert field.description or path.startswith("Preset.train.autoencoder"), f"{path}.{name}"
            if hasattr(annotation, "model_fields"):
                check(annotation, f"{path}.{name}")

    check(Preset, "Preset")
