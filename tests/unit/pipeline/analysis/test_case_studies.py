from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.analysis import Context, FeatureDensities, case_studies, examples, feature_table, logit_effects, to_files
from pipeline.analysis.survey import bin_edges
from storage.errors import ConfigError

D, S, VOCAB, POSITIONS, PROMPTS = 24, 30, 40, 10, 60
ONE_TOKEN, DEAD, NO_DECODER, TWIN, SELDOM = 2, 5, 9, 11, 14
TOKEN = 7
HOSTILE = "<script>alert('{{x}}')</script>"
OPTIONS = case_studies.OPTIONS(
    ultra_low_below=0.02, top_examples=3, quantile_examples=4, tokens_before=4, tokens_after=2, micro_batch_prompts=7
)


@dataclass
class Planted:
    """A context, and the same things in plain arrays."""

    context: Context
    tokens: np.ndarray
    acts: np.ndarray  # feature_acts of every token of every prompt, (PROMPTS, POSITIONS, S)

    @property
    def effects(self) -> np.ndarray:
        """The whole matrix of effects on the logits, (S, VOCAB)."""
        model: Any = self.context.model
        effects = (self.context.sae.W_dec.double() @ model.W.double() @ model.W_U.double()).numpy()
        return effects - effects.mean(axis=1, keepdims=True)

    def firings(self, feature: int) -> list[tuple[float, int, int]]:
        """Activation, prompt and position of every harvested firing, largest first."""
        prompt, position = np.nonzero(self.acts[:, self.context.first_position :, feature])
        position += self.context.first_position
        found = zip(self.acts[prompt, position, feature].tolist(), prompt.tolist(), position.tolist(), strict=True)
        return sorted(found, key=lambda one: (-one[0], *one[1:]))


def mixing_model(world: SimpleNamespace) -> Any:
    """The world's model, each position of which sees the mean of the tokens up to it as well; at any site the same."""
    plain = world.model(D, 6, VOCAB, POSITIONS)

    class Mixing(type(plain)):  # type: ignore[misc]
        def activations(self, tokens: torch.Tensor, hook_name: str) -> torch.Tensor:  # noqa: ARG002
            own, seen = self.W_E[tokens], torch.arange(1, tokens.shape[1] + 1)
            mean = own.cumsum(dim=1) / seen[:, None]
            return torch.relu(own + 0.2 * self.W_pos[: tokens.shape[1]] + 0.2 * mean)

    return Mixing(plain.W_E, plain.W_pos, plain.W, plain.W_U)


def plant(world: SimpleNamespace, *, first_position: int = 1, subtract_b_dec: bool = True) -> Planted:
    rng = np.random.default_rng(0)
    model = mixing_model(world)
    tokens = rng.integers(1, VOCAB, (PROMPTS, POSITIONS))
    tokens[:, 0] = 0
    x = model.activations(torch.from_numpy(tokens), world.HOOK)
    encoder, decoder, b_dec = rng.standard_normal((S, D)), rng.standard_normal((S, D)), rng.standard_normal(D) / 5
    encoder[ONE_TOKEN] = token_detector(x.double().numpy(), tokens)
    decoder[NO_DECODER] = 0
    decoder[TWIN] = 2 * decoder[0] + 0.1 * decoder[TWIN]
    projection = (x.double().numpy() - subtract_b_dec * b_dec)[:, first_position:].reshape(-1, D) @ encoder.T
    bias = -np.quantile(projection, np.linspace(0.5, 0.97, S), axis=0).diagonal().copy()
    on_token = tokens[:, first_position:].ravel() == TOKEN
    assert projection[on_token, ONE_TOKEN].min() > projection[~on_token, ONE_TOKEN].max()
    bias[ONE_TOKEN] = -(projection[on_token, ONE_TOKEN].min() + projection[~on_token, ONE_TOKEN].max()) / 2
    bias[DEAD] = -1e3
    bias[SELDOM] = -np.sort(projection[:, SELDOM])[-4:-2].mean()
    sae = replace(world.autoencoder(encoder.T, bias, decoder, b_dec), subtract_b_dec=subtract_b_dec)
    prompt, position = np.divmod(np.arange(PROMPTS * (POSITIONS - first_position)), POSITIONS - first_position)
    position += first_position
    stored = x.numpy()[prompt, position].astype(np.float16).astype(np.float32)
    survey = world.survey(sae, world.Rows(stored, prompt, position), top=5, sample=16)
    context = Context(
        sae=sae,
        hook_name=world.HOOK,
        model=model,
        tokens=world.Prompts(tokens.astype(np.int32), tokens[:0].astype(np.int32)),
        token_strings=["<B>", HOSTILE, "=1+1", *[f" w{number}" for number in range(VOCAB - 3)]],
        survey=survey,
        densities=FeatureDensities(survey.count, survey.n_rows),
        first_position=first_position,
    )
    return Planted(context, tokens, sae.encode(x).numpy())


def token_detector(x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The direction that separates a token from all others best, in least squares."""
    flat = x[:, 1:].reshape(-1, D)
    return np.linalg.lstsq(np.c_[flat, np.ones(len(flat))], (tokens[:, 1:].ravel() == TOKEN) * 1.0, rcond=None)[0][:D]


@pytest.fixture(name="planted")
def make_planted(world: SimpleNamespace) -> Planted:
    return plant(world)


def rows_of(table: Any) -> list[dict[str, Any]]:
    return table.to_pylist()


@pytest.mark.parametrize(("first_position", "subtract_b_dec"), [(1, True), (1, False), (0, True)])
def test_windows_hold_the_prompts_tokens_and_a_direct_encoding_of_each(
    world: SimpleNamespace, first_position: int, subtract_b_dec: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "_ROWS_AT_ONCE", 5)
    planted = plant(world, first_position=first_position, subtract_b_dec=subtract_b_dec)
    rows = rows_of(case_studies.run(planted.context, OPTIONS).tables["examples"])
    lengths = np.linalg.norm(planted.context.sae.W_enc.numpy(), axis=0)
    for row in rows:
        first, last = max(first_position, row["position"] - 4), min(POSITIONS, row["position"] + 3)
        assert row["first_position"] == first
        assert row["tokens"] == planted.tokens[row["prompt"], first:last].tolist()
        expected = planted.acts[row["prompt"], first:last, row["feature"]]
        np.testing.assert_allclose(row["activations"], expected, rtol=1e-4, atol=1e-5)
        rounding = 2**-11 * 12 * lengths[row["feature"]]  # of float16 activations no longer than 12
        assert abs(row["activations"][row["position"] - first] - row["activation"]) < rounding
    assert {row["position"] for row in rows} == set(range(first_position, POSITIONS))
    assert len(rows) > 100


def test_windows_are_the_same_bits_whoever_computes_a_batch(planted: Planted, world: SimpleNamespace) -> None:
    elsewhere = world.assert_same_elsewhere(lambda context: case_studies.run(context, OPTIONS), planted.context)
    assert elsewhere.computed == {"example texts": 9}


def test_top_examples_are_the_largest_firings_of_a_sort(planted: Planted) -> None:
    rows = rows_of(case_studies.run(planted.context, OPTIONS).tables["examples"])
    for feature in range(S):
        found = [row for row in rows if row["feature"] == feature and row["kind"] == "top"]
        expected = planted.firings(feature)[:3]
        assert [row["rank"] for row in found] == list(range(1, len(expected) + 1))
        assert {row["quantile"] for row in found} <= {None}
        np.testing.assert_allclose([row["activation"] for row in found], [act for act, *_ in expected], rtol=0.02)


def test_quantile_examples_lie_where_they_say_and_nearest_to_the_middles(planted: Planted) -> None:
    survey = planted.context.need_survey()
    rows = rows_of(case_studies.run(planted.context, OPTIONS).tables["examples"])
    for feature in range(S):
        here = [row for row in rows if row["feature"] == feature]
        found = [row for row in here if row["kind"] == "quantile"]
        sample = sorted(
            (-float(act), int(prompt), int(position))
            for prompt, position, act in zip(*(column[feature] for column in survey.sample), strict=True)
            if prompt >= 0
        )
        shown = {row["prompt"] for row in here if row["kind"] == "top"}
        places: list[int] = []
        parts = min(4, len(sample))
        for part in range(parts):
            middle = len(sample) * (part + 0.5) / parts - 0.5
            left = [place for place in range(len(sample)) if place not in places]
            fresh = [place for place in left if sample[place][1] not in shown]
            places.append(min(fresh or left, key=lambda place: (abs(place - middle), place)))
            shown.add(sample[places[-1]][1])
        expected = [sample[place] for place in sorted(places)]
        assert [(-row["activation"], row["prompt"], row["position"]) for row in found] == expected
        assert [row["rank"] for row in found] == list(range(1, parts + 1))
        for row in found:
            smaller = sum(-act < row["activation"] for act, *_ in sample)
            equal = sum(-act == row["activation"] for act, *_ in sample)
            assert smaller / len(sample) < row["quantile"] < (smaller + equal) / len(sample)


def test_a_feature_that_fires_often_shows_spread_activations_of_distinct_prompts(planted: Planted) -> None:
    rows = rows_of(case_studies.run(planted.context, OPTIONS).tables["examples"])
    found = [row for row in rows if row["feature"] == 0]
    assert len({row["prompt"] for row in found if row["kind"] == "quantile"}) == 4
    np.testing.assert_allclose([row["quantile"] for row in found[3:]], [0.875, 0.625, 0.375, 0.125], atol=0.13)


def test_a_seldom_feature_shows_all_its_firings_even_twice(planted: Planted) -> None:
    rows = rows_of(case_studies.run(planted.context, OPTIONS).tables["examples"])
    firings = planted.firings(SELDOM)
    assert len(firings) == 3
    for kind in ("top", "quantile"):
        found = [(row["prompt"], row["position"]) for row in rows if row["feature"] == SELDOM and row["kind"] == kind]
        assert found == [(prompt, position) for _, prompt, position in firings]


def test_logits_and_their_kurtosis_equal_a_dense_product(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_effects, "_BLOCK_FEATURES", 7)
    tables = case_studies.run(planted.context, OPTIONS).tables
    effects, strings = planted.effects, planted.context.token_strings or []
    kurtosis = tables["features"]["logit_kurtosis"].to_pylist()
    rows = rows_of(tables["logits"])
    assert len(rows) == S * 20
    for feature in range(S):
        for direction, order in (("raised", np.argsort(-effects[feature], kind="stable")),
                                 ("lowered", np.argsort(effects[feature], kind="stable"))):  # fmt: skip
            found = [row for row in rows if row["feature"] == feature and row["direction"] == direction]
            assert [row["rank"] for row in found] == list(range(1, 11))
            assert [row["token_id"] for row in found] == order[:10].tolist()
            assert [row["token"] for row in found] == [strings[token] for token in order[:10]]
            np.testing.assert_allclose([row["effect"] for row in found], effects[feature, order[:10]], rtol=1e-5)
        if feature != NO_DECODER:
            assert kurtosis[feature] == pytest.approx(stats.kurtosis(effects[feature]))
    assert kurtosis[NO_DECODER] is None


def test_effects_of_an_example_are_on_the_token_that_came_next(planted: Planted) -> None:
    rows = rows_of(case_studies.run(planted.context, OPTIONS).tables["examples"])
    at_end = 0
    for row in rows:
        for number, (act, effect) in enumerate(zip(row["activations"], row["effects"], strict=True)):
            position = row["first_position"] + number
            if position + 1 == POSITIONS:
                at_end += act > 0
                assert effect == 0
            else:
                following = planted.tokens[row["prompt"], position + 1]
                assert effect == pytest.approx(act * planted.effects[row["feature"], following], rel=1e-5, abs=1e-7)
    assert at_end > 0


def test_a_site_of_the_residual_stream_writes_through_the_unembedding_alone(planted: Planted) -> None:
    model: Any = planted.context.model
    W_U = torch.randn(D, VOCAB, generator=torch.Generator().manual_seed(0))
    context = replace(planted.context, model=replace(model, W_U=W_U), hook_name="blocks.0.hook_mlp_out")
    features = np.array([3, 20])
    choice = examples.choose_examples(context.need_survey(), features, 2, 0)
    windows = examples.read_windows(context, choice, before=1, after=1, batch=8)
    found = logit_effects.measure_effects(context, features, choice, windows)
    expected = context.sae.W_dec.double()[features] @ W_U.double()
    expected -= expected.mean(dim=1, keepdim=True)
    np.testing.assert_allclose(found.raised_by[:, 0], expected.amax(dim=1))
    np.testing.assert_allclose(found.lowered_by[:, 0], expected.amin(dim=1))


def test_a_site_without_a_path_to_the_logits_has_none(planted: Planted) -> None:
    context = replace(planted.context, hook_name="blocks.0.mlp.hook_pre")
    result = case_studies.run(context, OPTIONS)
    assert result.tables["logits"].num_rows == 0
    assert result.tables["features"]["logit_kurtosis"].null_count == S
    assert result.tables["chosen"]["raised"].null_count == len(result.tables["chosen"])
    assert set(np.concatenate(result.tables["examples"]["effects"].to_pylist())) == {0}
    assert result.numbers["logit_kurtosis_median"] is None
    assert to_files(result)


def test_common_tokens_equal_a_count_over_the_distinct_firings_kept(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_table, "_BLOCK_PROMPTS", 11)
    planted = plant(world, first_position=0)
    survey, strings = planted.context.need_survey(), planted.context.token_strings or []
    table = rows_of(case_studies.run(planted.context, OPTIONS).tables["features"])
    for feature in range(S):
        kept = {
            (int(prompt), int(position))
            for part in (survey.top, survey.sample)
            for prompt, position in zip(part.prompt[feature], part.position[feature], strict=True)
            if prompt >= 0
        }
        counts = Counter(int(planted.tokens[place]) for place in kept)
        before = Counter(int(planted.tokens[prompt, position - 1]) for prompt, position in kept if position)
        for name, count in (("top_token", counts), ("previous_token", before)):
            ranked = sorted(count, key=lambda token: (-count[token], token))
            expected = strings[ranked[0]] if ranked else None
            assert table[feature][name] == expected
            share = count[ranked[0]] / count.total() if ranked else None
            assert table[feature][f"{name}_share"] == (None if share is None else pytest.approx(share))
    assert table[DEAD]["top_token"] is None


def test_a_planted_detector_of_one_token_is_a_single_token_feature(planted: Planted) -> None:
    row = rows_of(case_studies.run(planted.context, OPTIONS).tables["features"])[ONE_TOKEN]
    assert (row["top_token"], row["top_token_share"]) == ((planted.context.token_strings or [])[TOKEN], 1)
    assert row["previous_token_share"] < 0.5


def test_neighbours_equal_the_whole_matrix_of_cosines(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_table, "_BLOCK_FEATURES", 8)
    tables = case_studies.run(planted.context, OPTIONS).tables
    decoder = planted.context.sae.W_dec.double().numpy()
    rows = rows_of(tables["neighbours"])
    others = [feature for feature in range(S) if feature != NO_DECODER]
    for feature in others:
        cosines = {
            other: decoder[feature] @ decoder[other] / np.linalg.norm(decoder[feature]) / np.linalg.norm(decoder[other])
            for other in others
            if other != feature
        }
        expected = sorted(cosines, key=lambda other: -cosines[other])[:5]
        found = [row for row in rows if row["feature"] == feature]
        assert [(row["rank"], row["neighbour"]) for row in found] == list(enumerate(expected, start=1))
        np.testing.assert_allclose([row["cosine"] for row in found], [cosines[one] for one in expected], atol=1e-6)
        assert tables["features"]["nearest_feature"][feature].as_py() == expected[0]
        assert tables["features"]["nearest_cosine"][feature].as_py() == pytest.approx(cosines[expected[0]], abs=1e-6)
    assert tables["features"]["nearest_feature"][0].as_py() == TWIN
    assert NO_DECODER not in {row["feature"] for row in rows}
    assert tables["features"]["nearest_feature"][NO_DECODER].as_py() is None


@pytest.mark.parametrize("d_sae", [1, 3])
def test_a_dictionary_smaller_than_the_number_of_neighbours_has_fewer(d_sae: int) -> None:
    found = feature_table.nearest_features(np.eye(4)[:d_sae] + 0.5, np.arange(d_sae))
    assert found.feature.tolist() == np.repeat(np.arange(d_sae), d_sae - 1).tolist()
    assert all(found.feature != found.other)


def test_a_zero_decoder_is_no_neighbour_even_of_a_feature_that_points_away_from_all() -> None:
    found = feature_table.nearest_features(np.array([[1.0, 0], [-1, 0], [0, 0]]), np.arange(3))
    assert [found.feature.tolist(), found.other.tolist(), found.value.tolist()] == [[0, 1], [1, 0], [-1, -1]]


def test_neurons_equal_a_sort_of_squared_shares(planted: Planted) -> None:
    rows = rows_of(case_studies.run(planted.context, OPTIONS).tables["neurons"])
    decoder = planted.context.sae.W_dec.double().numpy()
    for feature in range(S):
        found = [row for row in rows if row["feature"] == feature]
        if feature == NO_DECODER:
            assert found == []
            continue
        order = np.argsort(-(decoder[feature] ** 2))[:8]
        assert [(row["rank"], row["neuron"]) for row in found] == list(enumerate(order, start=1))
        np.testing.assert_allclose([row["weight"] for row in found], decoder[feature, order], rtol=1e-6)
        shares = decoder[feature, order] ** 2 / (decoder[feature] ** 2).sum()
        np.testing.assert_allclose([row["share"] for row in found], shares, rtol=1e-6)


def test_histograms_hold_every_firing_in_finite_bins(planted: Planted) -> None:
    survey = planted.context.need_survey()
    huge = survey.histogram.copy()
    huge[0, -1] += 2  # beyond the last edge
    top = survey.top._replace(activation=np.where(np.arange(S)[:, None] == 0, 40_000, survey.top.activation))
    context = replace(planted.context, survey=replace(survey, histogram=huge, top=top))
    rows = rows_of(case_studies.run(context, OPTIONS).tables["histograms"])
    edges = bin_edges()
    for feature in range(S):
        found = [row for row in rows if row["feature"] == feature]
        extra = 2 if feature == 0 else 0
        assert sum(row["count"] for row in found) == survey.count[feature] + extra
        for row in found[: len(found) - bool(extra)]:
            place = int(np.searchsorted(edges, row["from_activation"]))
            assert (row["to_activation"], row["count"]) == (edges[place + 1], huge[feature, place])
    assert [row["to_activation"] for row in rows if row["feature"] == 0][-1] == 40_000
    assert min(row["count"] for row in rows) > 0


def test_a_dead_feature_has_a_row_of_nulls_and_no_examples(planted: Planted) -> None:
    tables = case_studies.run(planted.context, OPTIONS).tables
    row = rows_of(tables["features"])[DEAD]
    assert [row[name] for name in ("top_token", "top_token_share", "previous_token", "previous_token_share")] == [
        None, None, None, None,
    ]  # fmt: skip
    assert row["nearest_feature"] is not None
    for name in ("examples", "histograms"):
        assert DEAD not in tables[name]["feature"].to_pylist()


def test_a_dictionary_that_never_fires_has_a_result(planted: Planted, world: Any) -> None:
    sae = replace(planted.context.sae, b_enc=torch.full((S,), -1e3))
    rows = world.rows(np.zeros((16, D)))
    survey = world.survey(sae, rows)
    context = replace(planted.context, sae=sae, survey=survey, densities=FeatureDensities(survey.count, 16))
    result = case_studies.run(context, OPTIONS)
    assert result.numbers["examples"] == 0
    assert result.numbers["single_token_fraction"] is None
    assert [result.tables[name].num_rows for name in ("examples", "histograms", "chosen")] == [0, 0, 0]
    assert to_files(result)


def test_the_section_shows_the_first_frequent_features_with_their_findings(planted: Planted) -> None:
    result = case_studies.run(planted.context, OPTIONS.model_copy(update={"chosen": 4}))
    density = planted.context.need_densities().density
    expected = [feature for feature in range(S) if density[feature] >= 0.02][:4]
    rows, features = rows_of(result.tables["chosen"]), rows_of(result.tables["features"])
    assert [row["feature"] for row in rows] == expected
    for row in rows:
        feature = row["feature"]
        for name in ("top_token", "top_token_share", "previous_token", "nearest_feature", "nearest_cosine"):
            assert row[name] == features[feature][name]
        assert row["density"] == density[feature]
        assert row["max_activation"] == planted.context.need_survey().largest[feature]
        order: list[int] = np.argsort(planted.effects[feature]).tolist()
        strings = list(planted.context.token_strings or [])
        assert row["lowered"] == " ".join(strings[token] for token in order[:5])
        assert row["raised"] == " ".join(strings[token] for token in order[::-1][:5])
        squares = planted.context.sae.W_dec[feature].double().numpy() ** 2
        assert row["fve_top_1"] == pytest.approx(squares.max() / squares.sum())


def test_numbers_and_figures_are_those_of_the_frequent_features(planted: Planted) -> None:
    result = case_studies.run(planted.context, OPTIONS)
    frequent = planted.context.need_densities().density >= 0.02
    table = result.tables["features"].filter(frequent)
    share = table["top_token_share"].to_numpy()
    assert 0 < len(table) < S
    assert result.numbers["features_studied"] == S
    assert result.numbers["examples"] == result.tables["examples"].num_rows
    assert result.numbers["top_token_share_median"] == pytest.approx(np.median(share))
    assert result.numbers["single_token_fraction"] == pytest.approx((share > 0.5).mean())
    assert result.numbers["logit_kurtosis_median"] == pytest.approx(np.nanmedian(table["logit_kurtosis"].to_numpy()))
    assert result.numbers["nearest_cosine_median"] == pytest.approx(np.nanmedian(table["nearest_cosine"].to_numpy()))
    assert set(result.numbers) == {number.key for number in case_studies.NUMBERS}
    drawn: dict[str, Any] = dict(result.figures)
    (bars,) = drawn["top_token_share"].data
    assert sum(entry[1] for entry in bars.customdata) == len(table)
    assert [bars.name.split()[0] for bars in drawn["nearest_cosine"].data] == ["frequent", "ultra-low"]


def test_features_named_have_the_same_rows_as_among_all(planted: Planted) -> None:
    everything = case_studies.run(planted.context, OPTIONS).tables
    some = case_studies.run(planted.context, OPTIONS.model_copy(update={"features": (20, 2, 20)})).tables
    for name in ("features", "examples", "histograms", "logits", "neighbours", "neurons"):
        kept = [row for row in rows_of(everything[name]) if row["feature"] in {2, 20}]
        found = rows_of(some[name])
        assert len(found) == len(kept) > 0
        for row, expected in zip(found, kept, strict=True):
            for column, value in expected.items():
                same = value == row[column] if isinstance(value, str | None) else np.allclose(row[column], value, 1e-4)
                assert same, (name, column)
    with pytest.raises(ConfigError, match="0 to 29"):
        case_studies.run(planted.context, OPTIONS.model_copy(update={"features": (3, 30)}))


def test_text_of_the_corpus_passes_through_unchanged(planted: Planted) -> None:
    tables = case_studies.run(planted.context, OPTIONS).tables
    assert tables["vocabulary"]["token_id"].to_pylist() == list(range(VOCAB))
    assert tables["vocabulary"]["token"].to_pylist() == planted.context.token_strings
    assert HOSTILE in tables["logits"]["token"].to_pylist()


def test_no_examples_may_be_asked_for(planted: Planted) -> None:
    options = OPTIONS.model_copy(update={"top_examples": 0, "quantile_examples": 0, "chosen": 0})
    assert case_studies.run(planted.context, options).tables["examples"].num_rows == 0


def test_equal_runs_give_equal_bytes(planted: Planted) -> None:
    first, second = (to_files(case_studies.run(planted.context, OPTIONS)) for _ in range(2))
    assert first == second


def test_tables_have_the_columns_that_pages_are_made_of(planted: Planted) -> None:
    tables = case_studies.run(planted.context, OPTIONS).tables
    columns = {name: {field.name: str(field.type) for field in table.schema} for name, table in tables.items()}
    ints = dict.fromkeys(("feature", "rank"), "int32")
    assert columns["features"] == {
        "feature": "int32", "top_token": "string", "top_token_share": "double", "previous_token": "string",
        "previous_token_share": "double", "logit_kurtosis": "double", "nearest_feature": "int32",
        "nearest_cosine": "double",
    }  # fmt: skip
    assert columns["examples"] == ints | {
        "kind": "string", "quantile": "double", "prompt": "int32", "position": "int32", "activation": "float",
        "first_position": "int32", "tokens": "list<item: int32>", "activations": "list<item: float>",
        "effects": "list<item: float>",
    }  # fmt: skip
    assert columns["histograms"] == {
        "feature": "int32", "from_activation": "double", "to_activation": "double", "count": "int64",
    }  # fmt: skip
    assert columns["logits"] == ints | {
        "direction": "string", "token_id": "int32", "token": "string", "effect": "float",
    }  # fmt: skip
    assert columns["neighbours"] == ints | {"neighbour": "int32", "cosine": "float"}
    assert columns["neurons"] == ints | {"neuron": "int32", "weight": "float", "share": "float"}
    assert columns["vocabulary"] == {"token_id": "int32", "token": "string"}
