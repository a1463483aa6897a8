"""neuron_sparsity, kurtosis, enc_dec, geometry and bias_density: weights alone, against planted truth."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from pipeline.analysis import (
    Context,
    FeatureDensities,
    bias_density,
    enc_dec,
    geometry,
    kurtosis,
    neuron_sparsity,
)


def random_sae(world: SimpleNamespace, d: int = 64, n: int = 50, seed: int = 0) -> Context:
    rng = np.random.default_rng(seed)
    W_enc, W_dec = rng.standard_normal((d, n)), rng.standard_normal((n, d))
    return Context(sae=world.autoencoder(W_enc, rng.standard_normal(n), W_dec, np.zeros(d)), hook_name=world.HOOK)


def with_densities(context: Context, counts: np.ndarray) -> Context:
    return Context(sae=context.sae, hook_name=context.hook_name, densities=FeatureDensities(counts, 1_000_000))


# neuron_sparsity


def test_neuron_shares_equal_a_full_sort() -> None:
    rows = np.random.default_rng(0).standard_normal((30, 40))
    top_1, next_9 = neuron_sparsity.neuron_shares(rows)
    ordered = -np.sort(-(rows**2), axis=1) / (rows**2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(top_1, ordered[:, 0])
    np.testing.assert_allclose(next_9, ordered[:, 1:10].sum(axis=1))


def test_planted_sparsities_get_their_labels(world: SimpleNamespace) -> None:
    d = 500
    decoder = np.zeros((5, d))
    decoder[0] = 1  # spread evenly: ten neurons hold 2 %
    decoder[1, 3] = 2  # one neuron alone
    decoder[2, 10:20] = 1  # ten neurons, 10 % each
    decoder[3, 0], decoder[3, 1:5] = 1.0, 0.45  # one neuron of 55 % with too much beside it
    context = Context(sae=world.autoencoder(decoder.T, np.zeros(5), decoder, np.zeros(d)), hook_name=world.HOOK)
    result = neuron_sparsity.run(context, neuron_sparsity.OPTIONS())
    assert result.tables["features"]["label"].to_pylist() == [
        "dense",
        "1-sparse",
        "10-ish-sparse",
        "10-ish-sparse",
        "zero decoder",
    ]
    assert result.numbers["dense_fraction_all"] == 0.25
    assert result.numbers["ten_sparse_fraction_all"] == 0.5
    assert "dense_fraction" not in result.numbers  # frequent features are unknown without densities
    known = neuron_sparsity.run(with_densities(context, np.array([0, 500, 500, 0, 500])), neuron_sparsity.OPTIONS())
    assert known.numbers["one_sparse_fraction"] == 0.5
    assert known.numbers["dense_fraction"] == 0


@pytest.mark.parametrize(
    ("top_1", "next_9", "label"),
    [
        (0.3499, 0.0, "dense"),
        (0.3501, 0.0999, "1-sparse"),
        (0.36, 0.1, "10-ish-sparse"),
        (0.2, 0.1501, "10-ish-sparse"),
        (0.2, 0.1499, "dense"),
        (np.nan, np.nan, "zero decoder"),
    ],
)
def test_labels_at_their_thresholds(top_1: float, next_9: float, label: str) -> None:
    options = neuron_sparsity.OPTIONS()
    assert neuron_sparsity.label_features(np.array([top_1]), np.array([next_9]), options).tolist() == [label]


# kurtosis


def test_kurtosis_of_decoders_equals_scipys_and_random_rows_are_near_zero(world: SimpleNamespace) -> None:
    context = random_sae(world, d=512, n=400)
    result = kurtosis.run(context, kurtosis.OPTIONS())
    expected = stats.kurtosis(context.sae.W_dec.double().numpy(), axis=1, fisher=True, bias=True)
    np.testing.assert_allclose(result.tables["features"]["decoder_kurtosis"].to_numpy(), expected, rtol=1e-9)
    closed_form, spread = -6 / (512 + 1), (24 / 512) ** 0.5  # of the biased estimate, of normal entries
    assert result.numbers["random_mean"] == pytest.approx(closed_form, abs=4 * spread / 400**0.5)
    assert result.numbers["decoder_median"] == pytest.approx(np.median(expected))


def test_what_the_figure_clips_is_said(world: SimpleNamespace) -> None:
    decoder = np.random.default_rng(0).standard_normal((20, 900))
    decoder[:3, 0] = 400
    context = Context(sae=world.autoencoder(decoder.T, np.zeros(20), decoder, np.zeros(900)), hook_name=world.HOOK)
    result = kurtosis.run(context, kurtosis.OPTIONS(clip=15))
    caption = result.figures["decoder"].layout.meta["caption"]
    assert "3 features beyond 15" in caption
    assert result.numbers["decoder_max"] == pytest.approx(900, rel=0.02)


# enc_dec


def test_planted_cosines_and_projections(world: SimpleNamespace) -> None:
    wanted = np.array([1.0, 0.5, 0.0, -0.8, 0.3])
    encoder, decoder = np.zeros((5, 10)), np.zeros((5, 10))
    decoder[:, 0] = 2
    encoder[:, 0], encoder[:, 1] = 3 * wanted, 3 * np.sqrt(1 - wanted**2)
    context = Context(sae=world.autoencoder(encoder.T, np.zeros(5), decoder, np.zeros(10)), hook_name=world.HOOK)
    result = enc_dec.run(with_densities(context, np.array([500, 500, 500, 0, 0])), enc_dec.OPTIONS())
    np.testing.assert_allclose(result.tables["features"]["encoder_decoder_cosine"].to_numpy(), wanted, atol=1e-7)
    np.testing.assert_allclose(
        result.tables["features"]["encoder_decoder_projection"].to_numpy(), 6 * wanted, atol=1e-6
    )
    assert result.numbers["cosine_median_frequent"] == pytest.approx(0.5)
    assert result.numbers["cosine_median_rare"] == pytest.approx(-0.25)
    assert result.numbers["projection_median_frequent"] == pytest.approx(3)


def test_modes_are_named_only_where_there_are_two(world: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)

    def modes(cosine: np.ndarray) -> tuple[object, object]:
        encoder = np.stack([cosine, np.sqrt(1 - cosine**2)], axis=1)
        decoder = np.tile([1.0, 0.0], (cosine.size, 1))
        sae = world.autoencoder(encoder.T, np.zeros(cosine.size), decoder, np.zeros(2))
        numbers = enc_dec.run(Context(sae=sae, hook_name=world.HOOK), enc_dec.OPTIONS()).numbers
        return numbers["lower_mode"], numbers["upper_mode"]

    assert modes(rng.normal(0.5, 0.05, 400)) == (None, None)
    two = modes(np.r_[rng.normal(0.5, 0.04, 400), rng.normal(0.8, 0.02, 200)])
    assert two == pytest.approx((0.5, 0.8), abs=0.02)


def test_a_dead_encoder_is_left_out_of_the_median(world: SimpleNamespace) -> None:
    encoder = np.eye(4)
    encoder[0] = 0
    context = Context(sae=world.autoencoder(encoder.T, np.zeros(4), np.eye(4), np.zeros(4)), hook_name=world.HOOK)
    result = enc_dec.run(context, enc_dec.OPTIONS())
    assert result.numbers["cosine_median_all"] == 1
    assert result.tables["features"]["encoder_decoder_cosine"].to_pylist()[0] is None


# geometry


def test_pair_moments_equal_a_loop_over_pairs() -> None:
    units = np.random.default_rng(0).standard_normal((30, 8))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    cosines = [units[i] @ units[j] for i in range(30) for j in range(30) if i != j]
    assert geometry.pair_moments(units) == pytest.approx((np.mean(cosines), np.var(cosines)))
    assert geometry.pair_moments(units[:1]) == (None, None)


def test_random_directions_have_mean_zero_and_variance_one_over_d(world: SimpleNamespace) -> None:
    numbers = geometry.run(random_sae(world, d=256, n=600), geometry.OPTIONS()).numbers
    assert numbers["cosine_mean"] == pytest.approx(0, abs=1e-3)
    assert numbers["cosine_variance"] == pytest.approx(1 / 256, rel=0.03)
    assert numbers["random_variance"] == 1 / 256


def test_the_table_has_both_groups_beside_random_directions(world: SimpleNamespace) -> None:
    decoder = np.concatenate([np.eye(400)[:5], np.random.default_rng(0).standard_normal((20, 400))])
    context = Context(sae=world.autoencoder(decoder.T, np.zeros(25), decoder, np.zeros(400)), hook_name=world.HOOK)
    result = geometry.run(context, geometry.OPTIONS())
    rows = result.tables["cosines"].to_pylist()
    assert [row["features"] for row in rows] == [25, 20, None]
    units = decoder[5:] / np.linalg.norm(decoder[5:], axis=1, keepdims=True)
    assert (rows[1]["cosine_mean"], rows[1]["cosine_variance"]) == pytest.approx(geometry.pair_moments(units), abs=1e-7)
    assert (rows[2]["cosine_mean"], rows[2]["cosine_variance"]) == (0, 1 / 400)


def test_a_site_of_the_residual_stream_has_its_geometry_too(world: SimpleNamespace) -> None:
    context = random_sae(world, d=16)
    elsewhere = Context(sae=context.sae, hook_name="blocks.0.hook_resid_post")
    assert geometry.run(elsewhere, geometry.OPTIONS()).numbers == geometry.run(context, geometry.OPTIONS()).numbers


def test_rare_features_and_zero_rows_are_not_compared(world: SimpleNamespace) -> None:
    decoder = np.eye(6)
    decoder[0] = 0
    context = Context(sae=world.autoencoder(decoder.T, np.zeros(6), decoder, np.zeros(6)), hook_name=world.HOOK)
    numbers = geometry.run(with_densities(context, np.array([500, 0, 500, 500, 500, 0])), geometry.OPTIONS()).numbers
    assert numbers["n_features"] == 3
    none = geometry.run(with_densities(context, np.zeros(6, np.int64)), geometry.OPTIONS())
    assert none.numbers["cosine_mean"] is None


# bias_density


def test_medians_and_rank_correlations(world: SimpleNamespace) -> None:
    context = random_sae(world, n=60)
    counts = np.r_[np.zeros(20, np.int64), np.random.default_rng(1).integers(1000, 100_000, 40)]
    context = with_densities(context, counts)
    result = bias_density.run(context, bias_density.OPTIONS(drawn_features=30))
    numbers, table = result.numbers, result.tables["features"]
    bias = context.sae.b_enc.double().numpy()
    projection = (context.sae.W_enc.double().T * context.sae.W_dec.double()).sum(dim=1).numpy()
    assert numbers["bias_median_rare"] == pytest.approx(np.median(bias[:20]))
    assert numbers["projection_median_frequent"] == pytest.approx(np.median(projection[20:]))
    np.testing.assert_array_equal(table["encoder_bias"].to_numpy(), bias)
    np.testing.assert_allclose(table["encoder_decoder_projection"].to_numpy(), projection)
    np.testing.assert_array_equal(table["density"].to_numpy(), counts / 1_000_000)
    assert numbers["density_bias_correlation"] == pytest.approx(stats.spearmanr(counts, bias).statistic)
    assert bias_density.rank_correlation(np.ones(5), np.arange(5.0)) is None
