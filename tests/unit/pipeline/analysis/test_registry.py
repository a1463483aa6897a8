import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.analysis import ANALYSES, Analysis, Context, choose
from storage.errors import ConfigError, InputError


@pytest.mark.parametrize("analysis", ANALYSES.values(), ids=ANALYSES.keys())
def test_every_analysis_describes_itself(analysis: Analysis) -> None:
    assert analysis.version >= 1
    assert analysis.question.endswith("?")
    assert not analysis.requires & analysis.optional
    options = analysis.options()
    for field in type(options).model_fields.values():
        assert field.description
    with pytest.raises(ValidationError, match="frozen"):
        setattr(options, next(iter(type(options).model_fields)), 1)
    with pytest.raises(ValidationError, match="extra"):
        analysis.options.model_validate({"no_such_option": 1})
    keys = [number.key for number in analysis.numbers]
    assert len(set(keys)) == len(keys)


def test_the_order_is_the_published_list_of_analyses() -> None:
    assert list(ANALYSES) == [
        "density",
        "loss_recovered",
        "neuron_sparsity",
        "kurtosis",
        "rare_cluster",
        "rare_direction",
        "cross_seed",
        "orthogonal_rerun",
        "enc_dec",
        "null_space",
        "geometry",
        "bias_density",
        "training_dynamics",
        "case_studies",
        "encoder_sparsity",
        "site_comparison",
    ]


def test_none_comes_before_one_that_it_reads() -> None:
    names = list(ANALYSES)
    for analysis in ANALYSES.values():
        read = analysis.reads & set(names)
        assert all(names.index(name) < names.index(analysis.name) for name in read), analysis.name


def test_choosing_keeps_the_order_of_the_registry_and_drops_repeats() -> None:
    chosen = choose(ANALYSES, ("rare_cluster", "kurtosis", "density", "rare_cluster"))
    assert [analysis.name for analysis in chosen] == ["density", "kurtosis", "rare_cluster"]


def test_an_unknown_analysis_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="null_space"):
        choose(ANALYSES, ("nul_space",))


def test_a_hook_without_a_layer_is_an_error(world) -> None:  # type: ignore[no-untyped-def]
    sae = world.autoencoder(np.eye(2), np.zeros(2), np.eye(2), np.zeros(2))
    assert Context(sae=sae, hook_name="blocks.11.mlp.hook_post").layer == 11
    with pytest.raises(InputError, match="hook_embed"):
        _ = Context(sae=sae, hook_name="hook_embed").layer


def test_generators_differ_by_purpose_and_seed(world) -> None:  # type: ignore[no-untyped-def]
    sae = world.autoencoder(np.eye(2), np.zeros(2), np.eye(2), np.zeros(2))

    def draw(purpose: str, seed: int) -> float:
        return Context(sae=sae, hook_name=world.HOOK, seed=seed).rng(purpose).random()

    assert draw("a", 0) == draw("a", 0)
    assert len({draw("a", 0), draw("b", 0), draw("a", 1)}) == 3
