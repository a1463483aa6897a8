"""A notebook's view of features, on the tiny model, beside plain products of the weights and all rows of the store."""

from pathlib import Path

import numpy as np
import pytest
import torch

import sparsemill
from pipeline import language_model
from pipeline.config import Runtime, load_preset
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from storage.errors import ConfigError, InputError

HOOK = "blocks.0.mlp.hook_post"
TEXT = "word_3 word_5 word_3 word_61 word_0"


@pytest.fixture(scope="module")
def home(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("home") / "store"
    preset = load_preset(str(tiny_preset), ("train.autoencoder.steps=30",))
    Chain(preset, Workspace.open(Runtime(root=root, threads=1), Quiet()), run_directly).train()
    return root


@pytest.fixture(scope="module")
def features(home: Path) -> sparsemill.Features:
    return sparsemill.open_features(root=home)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> sparsemill.LanguageModel:
    return language_model.load(str(tiny_model))


@pytest.fixture(scope="module")
def by_hand(features: sparsemill.Features, model: sparsemill.LanguageModel) -> np.ndarray:
    """Activations on TEXT with BOS in front, (6, d_sae)."""
    ids = torch.tensor([[0, 5, 7, 5, 63, 2]])
    sae = features.sae
    rows = model.activations(ids, HOOK)[0]
    return torch.relu((rows - sae.b_dec) @ sae.W_enc + sae.b_enc).numpy()


@pytest.fixture(scope="module")
def feature(features: sparsemill.Features, home: Path) -> int:
    """One that fires now and then: on TEXT, and on less than half of the store."""
    rows = sparsemill.open_activations(root=home).read(0, 4096).rows
    density = (features.sae.encode(torch.from_numpy(rows)) > 0).float().mean(0)
    fired = set(features.firing(TEXT)["feature"].to_pylist())
    return min(fired, key=lambda one: abs(float(density[one]) - 0.2))


def test_what_fires_on_a_text_is_what_the_weights_say_without_bos(
    features: sparsemill.Features, by_hand: np.ndarray
) -> None:
    firing = features.firing(TEXT)
    found = np.zeros_like(by_hand)
    found[firing["position"], firing["feature"]] = firing["activation"]
    by_hand[0] = 0  # BOS was not harvested
    assert (by_hand > 0).any(axis=1).tolist() == [False, True, True, True, True, True]
    np.testing.assert_allclose(found, by_hand, atol=1e-5)
    rows = firing.to_pylist()
    assert rows == sorted(rows, key=lambda row: (row["position"], -row["activation"]))
    words = TEXT.split()
    assert all(row["token"] == words[row["position"] - 1] for row in rows)


def test_a_highlighted_text_has_the_activation_of_every_token(
    features: sparsemill.Features, by_hand: np.ndarray, feature: int
) -> None:
    shown = features.highlight(TEXT, feature)
    assert "".join(shown.pieces) == TEXT
    np.testing.assert_allclose(shown.activations, by_hand[1:, feature], atol=1e-5)
    assert shown.scale == max(shown.activations)
    assert str(shown).count("«") == shown.to_html().count("<mark") == (by_hand[1:, feature] > 0).sum()


def test_logits_are_the_decoder_through_w_out_and_the_unembedding(
    features: sparsemill.Features, model: sparsemill.LanguageModel, feature: int
) -> None:
    effects = (features.sae.W_dec[feature].double() @ model.W_out(0).double() @ model.W_U.double()).numpy()
    effects -= effects.mean()
    order = np.argsort(-effects)
    found = features.logits(feature, kept=4)
    assert found["token_id"].to_pylist() == [*order[:4], *order[::-1][:4]]
    np.testing.assert_allclose(found["effect"], effects[found["token_id"]], rtol=1e-6)
    assert found["direction"].to_pylist() == ["raised"] * 4 + ["lowered"] * 4
    assert found["token"].to_pylist() == [model.token_strings()[token] for token in found["token_id"].to_pylist()]


def test_neurons_are_shares_of_the_decoder(features: sparsemill.Features, feature: int) -> None:
    row = features.sae.W_dec[feature].double().numpy()
    shares = row**2 / (row**2).sum()
    found = features.neurons(feature, kept=5)
    assert found["neuron"].to_pylist() == np.argsort(-shares)[:5].tolist()
    np.testing.assert_allclose(found["share"], np.sort(shares)[::-1][:5], rtol=1e-6)
    np.testing.assert_allclose(found["weight"], row[found["neuron"]], rtol=1e-6)


def test_examples_are_the_largest_firings_of_the_store_in_their_texts(
    features: sparsemill.Features, home: Path, feature: int
) -> None:
    activations, texts = sparsemill.open_activations(root=home), sparsemill.open_texts(root=home)
    batch = activations.read(0, activations.n_rows)
    acts = features.sae.encode(torch.from_numpy(batch.rows)).numpy()[:, feature]
    found = features.examples(feature, top=5, before=3, after=2)
    np.testing.assert_allclose([one.activation for one in found], np.sort(acts)[::-1][:5], rtol=1e-4)
    for one in found:
        excerpt = texts.around(one.prompt, one.position, before=min(3, one.position - 1), after=2)
        assert "".join(one.text.pieces) == f"{excerpt.before}{excerpt.token}{excerpt.after}".lstrip()
        here = (batch.prompt == one.prompt) & (np.abs(batch.position - one.position + 0.5) < 3)  # 3 before, 2 after
        expected = acts[here][np.argsort(batch.position[here])]
        np.testing.assert_allclose(one.text.activations, expected, atol=1e-3)
        assert one.text.scale == found[0].activation
        assert one.quantile is None
    assert found._repr_html_().count("<dt>") == 5


def test_examples_spread_over_the_range_say_their_quantile(features: sparsemill.Features, feature: int) -> None:
    found = features.examples(feature, top=0, quantiles=4)
    quantiles = [one.quantile for one in found]
    assert None not in quantiles
    assert quantiles == sorted(quantiles, reverse=True)  # type: ignore[type-var]
    assert [one.activation for one in found] == sorted((one.activation for one in found), reverse=True)


def test_a_survey_is_made_once_and_that_of_the_analyses_is_taken(features: sparsemill.Features, home: Path) -> None:
    features.examples(0)
    made = sparsemill.artifacts(home).list("survey")
    assert len(made) == 1
    sparsemill.open_features(root=home).examples(0)
    assert sparsemill.artifacts(home).list("survey") == made


def test_a_checkpoint_with_a_model_alone_has_all_but_the_examples(
    features: sparsemill.Features, tiny_model: Path, home: Path, tmp_path: Path, feature: int
) -> None:
    sparsemill.export_sae(features.artifact.id, tmp_path / "saelens", root=home)
    own = tmp_path / "store"
    alone = sparsemill.open_features(str(tmp_path / "saelens"), model=str(tiny_model), root=own)
    assert alone.firing(TEXT).equals(features.firing(TEXT))
    assert alone.logits(feature).equals(features.logits(feature))
    assert alone.neurons(feature).equals(features.neurons(feature))
    with pytest.raises(ConfigError, match="import it with activations"):
        alone.examples(feature)
    with pytest.raises(ConfigError, match="--model NAME"):
        sparsemill.open_features(str(tmp_path / "saelens"), root=tmp_path / "other")


@pytest.mark.parametrize(("text", "found"), [("", "1 tokens"), (" ".join(["word_1"] * 16), "17 tokens")])
def test_no_text_and_one_longer_than_a_prompt_are_refused(features: sparsemill.Features, text: str, found: str) -> None:
    for read in (features.firing, lambda one: features.highlight(one, 0)):
        with pytest.raises(InputError, match=rf"{found}.*2 to 16"):
            read(text)


@pytest.mark.parametrize("number", [-1, 64])
def test_a_feature_that_is_not_there_is_refused(features: sparsemill.Features, number: int) -> None:
    for ask in (features.logits, features.neurons, features.examples, lambda one: features.highlight(TEXT, one)):
        with pytest.raises(InputError, match="0 to 63"):
            ask(number)


def test_a_reference_and_a_checkpoint_are_told_apart(home: Path, tmp_path: Path) -> None:
    artifact = sparsemill.artifacts(home).resolve("latest", stage="train")
    files = sparsemill.export_sae("latest", tmp_path / "it", root=home)
    for name in ("latest", artifact.id, str(artifact.folder), str(tmp_path / "it"), str(files[0])):
        assert torch.equal(sparsemill.open_sae(name, root=home).W_dec, sparsemill.open_sae(root=home).W_dec)
    with pytest.raises(InputError, match="no such checkpoint"):
        sparsemill.open_sae(str(tmp_path / "nothing"), root=home)
