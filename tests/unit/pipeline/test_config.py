import re
from pathlib import Path

import pytest

from pipeline.config import Preset, load_preset, preset_names
from storage.errors import ConfigError


@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_loads_and_says_what_it_is_for(name: str):
    preset = load_preset(name)
    assert preset.name == name
    assert len(preset.description) > 20


@pytest.mark.parametrize("name", preset_names())
def test_every_field_of_a_shipped_preset_says_where_it_comes_from(name: str):
    text = (Path(__file__).parents[3] / "pipeline" / "presets" / f"{name}.toml").read_text()
    fields = [line for line in text.splitlines() if re.match(r"(?!description)\w+ = ", line)]
    assert len(fields) > 15
    assert [line for line in fields if not re.search(r" # \S", line)] == []


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


def test_an_option_without_its_section_is_told_where_it_lies():
    with pytest.raises(ConfigError, match=r"l1_coeff: unknown option; nearest: train\.autoencoder\.l1_coeff$"):
        load_preset("demo", ["l1_coeff=1"])


def test_a_value_that_is_none_is_named():
    with pytest.raises(ConfigError, match=r"train\.autoencoder\.steps: .*, not 'many'"):
        load_preset("demo", ["train.autoencoder.steps=many"])


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("harvest.window_prompts=-1", "greater than 0"),
        ("harvest.chunk_rows=300", "does not divide"),
        ("tokenize.prompt_tokens=1", "greater than or equal to 2"),
        ("train.autoencoder.precision=bfloat16", "asks for engine='dense', not 'auto'"),
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


def test_the_posts_presets_differ_in_what_they_ask_and_in_nothing_else():
    post, fixed, anthropic = (load_preset(name) for name in ("post", "post-fixed", "anthropic-a1"))
    assert post.train.autoencoder.decoder_norm == "as-published"
    for other in (fixed, anthropic):
        assert (other.tokenize, other.harvest, other.analyze) == (post.tokenize, post.harvest, post.analyze)
    mended = post.train.autoencoder.model_copy(update={"decoder_norm": "fixed"})
    assert fixed.train == post.train.model_copy(update={"autoencoder": mended})
    changed = {"b_dec_init": "geometric-median", "resampling": anthropic.train.autoencoder.resampling}
    assert anthropic.train.autoencoder == mended.model_copy(update=changed)


def test_the_posts_numbers_are_converted_as_documented():
    trainer = load_preset("post").train.autoencoder
    assert trainer.l1_coeff == pytest.approx(3e-4 * trainer.batch_rows)
    assert trainer.steps == 2_000_000_000 // trainer.batch_rows
    assert trainer.resampling.window_rows == 50 * 512 * 128
    assert trainer.resampling.interval_steps * trainer.batch_rows == 122_880_000
    assert trainer.resampling.threshold == pytest.approx(10**-5.5)
    anthropic = load_preset("anthropic-a1").train.autoencoder
    assert anthropic.resampling.window_rows == 12_500 * anthropic.batch_rows
