from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.analysis import Context, FeatureDensities, cofiring, rare_cluster
from storage.errors import ConfigError

D, RARE, FREQUENT = 64, 40, 60


@dataclass
class Cluster:
    """An autoencoder whose first forty features share a direction, and a store that sets some of them off."""

    context: Context
    direction: np.ndarray
    rows: np.ndarray
    fires: np.ndarray


@pytest.fixture
def cluster(world: SimpleNamespace) -> Cluster:
    rng = np.random.default_rng(0)
    direction = np.zeros(D)
    direction[0] = 1
    encoder = rng.standard_normal((RARE + FREQUENT, D))
    encoder[:, 0] = 0
    encoder /= np.linalg.norm(encoder, axis=1, keepdims=True)
    length = np.where(np.arange(RARE) < 30, 2.0, 0.5)
    encoder[:RARE] = length[:, None] * (direction + 0.05 * encoder[:RARE])
    encoder[0] = 2 * encoder[RARE]  # one rare feature of its own direction
    decoder = rng.standard_normal((RARE + FREQUENT, D))
    decoder[:RARE] = 0.3 * decoder[:RARE] + np.outer(rng.standard_normal(RARE), np.eye(D)[5])
    decoder *= 1.5 / np.linalg.norm(decoder, axis=1, keepdims=True)
    bias = np.full(RARE + FREQUENT, -0.5)
    bias[:RARE] = -np.linspace(6, 8, RARE) * np.linalg.norm(encoder[:RARE], axis=1)
    rows = rng.standard_normal((4000, D))
    rows[:, 0] = 0
    rows[100, 0], rows[2100, 0] = 7.0, 20.0
    sae = world.autoencoder(encoder.T, bias, decoder, np.zeros(D))
    fires = rows.astype(np.float32) @ sae.W_enc.numpy() + sae.b_enc.numpy() > 0
    tokens = np.arange(4000).reshape(500, 8) % 50
    context = Context(
        sae=sae,
        hook_name=world.HOOK,
        survey=world.survey(sae, world.rows(rows)),
        tokens=world.Prompts(np.pad(tokens, ((0, 0), (1, 0))), tokens),
        token_strings=[f"<b>{i}</b>" for i in range(50)],
        densities=FeatureDensities(fires.sum(axis=0), 4000),
    )
    return Cluster(context, direction, rows, fires)


OPTIONS = rare_cluster.OPTIONS(ultra_low_below=0.01, top_tokens=3)


def test_the_planted_direction_is_found(cluster: Cluster) -> None:
    result = rare_cluster.run(cluster.context, OPTIONS)
    numbers = result.numbers
    assert numbers["n_rare"] == RARE
    assert numbers["aligned_fraction"] == pytest.approx(39 / 40)
    assert numbers["aligned_fraction_unit"] == pytest.approx(39 / 40)
    assert abs(float(numbers["cosine_median_frequent"] or 0)) < 0.2
    assert float(numbers["projection_ashman_d"] or 0) > 5
    assert numbers["projection_smaller_mode"] == pytest.approx(11 / RARE, abs=1 / RARE)  # ten short ones, one other
    encoder = cluster.context.sae.W_enc.double().numpy().T
    mean = encoder[:RARE].mean(axis=0)
    expected = encoder @ mean / np.linalg.norm(encoder, axis=1) / np.linalg.norm(mean)
    table = result.tables["features"]
    np.testing.assert_allclose(table["cosine_with_rare_direction"].to_numpy(), expected)
    np.testing.assert_allclose(table["projection_on_rare_direction"].to_numpy(), encoder @ mean / np.linalg.norm(mean))


def test_decoder_share_and_norm_products_equal_an_svd(cluster: Cluster) -> None:
    numbers = rare_cluster.run(cluster.context, OPTIONS).numbers
    sae = cluster.context.sae
    decoder = sae.W_dec.double().numpy()[:RARE]
    for key, rows in (("", decoder), ("_centred", decoder - decoder.mean(axis=0))):
        singular = np.linalg.svd(rows, compute_uv=False)
        assert numbers[f"decoder_top_share{key}"] == pytest.approx(singular[0] ** 2 / (singular**2).sum())
    assert float(numbers["decoder_top_share"] or 0) > 3 * float(numbers["decoder_top_share_random"] or 0) / 2
    product = np.linalg.norm(sae.W_enc.double().numpy()[:, :RARE], axis=0) * np.linalg.norm(decoder, axis=1)
    assert numbers["norm_product_median"] == pytest.approx(np.median(product))
    assert numbers["norm_product_p95"] == pytest.approx(np.quantile(product, 0.95))


def test_the_token_on_which_most_fire_is_found_with_its_text(cluster: Cluster) -> None:
    result = rare_cluster.run(cluster.context, OPTIONS)
    firing = cluster.fires[:, :RARE].sum(axis=1)
    assert firing.argmax() == 2100
    assert result.numbers["cofiring_max"] == pytest.approx(firing.max() / RARE)
    top = result.tables["top_tokens"].to_pylist()
    assert (top[0]["prompt"], top[0]["position"]) == (2100 // 8, 1 + 2100 % 8)
    assert top[0]["features_firing"] == firing.max()
    assert top[0]["token"] == f"<b>{2100 % 50}</b>"
    assert top[0]["before"].endswith(f"<b>{2099 % 50}</b>")
    assert top[0]["after"].startswith(f"<b>{2101 % 50}</b>")
    assert [row["features_firing"] for row in top] == sorted(firing[firing > 1], reverse=True)[: len(top)]


def test_cofiring_counts_equal_a_dense_computation(cluster: Cluster) -> None:
    chosen = np.array([1, 5, 20, 39])
    features = np.arange(RARE)
    survey = cluster.context.need_survey()
    found = cofiring.count_cofiring(survey, features, top_rows=5, pair_features=chosen)
    fires = cluster.fires[:, :RARE]
    np.testing.assert_array_equal(found.histogram, np.bincount(fires.sum(axis=1), minlength=RARE + 1))
    own = fires[:, chosen].astype(int)
    np.testing.assert_array_equal(found.pair_counts, own.T @ own)


def test_firings_that_the_survey_did_not_keep_are_an_error(cluster: Cluster, world: SimpleNamespace) -> None:
    survey = world.survey(cluster.context.sae, world.rows(cluster.rows), seldom=2)
    often = np.flatnonzero(survey.count > 2)[:1]
    with pytest.raises(ConfigError, match="kept_firings"):
        cofiring.count_cofiring(survey, often, top_rows=5, pair_features=np.array([0]))


def test_containment_equals_a_loop_over_pairs() -> None:
    rng = np.random.default_rng(0)
    fires = rng.random((500, 6)) < np.array([0.5, 0.1, 0.3, 0.02, 0.2, 0.0])
    counts = fires.T.astype(int) @ fires.astype(int)
    ease = np.array([3.0, 1.0, 2.0, 2.0, 0.0, -1.0])
    both = own = independent = 0.0
    for easier in range(6):
        for harder in range(6):
            if ease[easier] > ease[harder]:
                both += (fires[:, easier] & fires[:, harder]).sum()
                own += fires[:, harder].sum()
                independent += fires[:, harder].sum() * fires[:, easier].mean()
    assert cofiring.containment(counts, ease) == pytest.approx(both / own)
    assert cofiring.containment_if_independent(counts, ease, 500) == pytest.approx(independent / own)


def test_nested_sets_read_one_and_disjoint_ones_zero() -> None:
    nested = np.arange(100)[:, None] < np.array([60, 30, 10])
    counts = nested.T.astype(int) @ nested.astype(int)
    assert cofiring.containment(counts, np.array([3.0, 2.0, 1.0])) == 1
    assert cofiring.containment(np.diag([5, 6, 7]), np.array([3.0, 2.0, 1.0])) == 0
    assert cofiring.containment(np.zeros((3, 3), int), np.arange(3.0)) is None


@pytest.mark.parametrize("n_rare", [0, 1])
def test_fewer_than_two_rare_features_are_no_cluster(cluster: Cluster, n_rare: int, world: SimpleNamespace) -> None:
    counts = np.where(np.arange(RARE + FREQUENT) < n_rare, 0, 4000)
    context = Context(
        sae=cluster.context.sae,
        hook_name=world.HOOK,
        survey=cluster.context.survey,
        densities=FeatureDensities(counts, 4000),
    )
    numbers = rare_cluster.run(context, OPTIONS).numbers
    assert numbers["cluster"] == "no cluster"
    assert numbers["n_rare"] == n_rare
    assert all(value is None for key, value in numbers.items() if key not in {"cluster", "n_rare"})


def test_dead_features_alone_make_a_cluster_without_firing(cluster: Cluster, world: SimpleNamespace) -> None:
    sae = cluster.context.sae
    silent = world.autoencoder(sae.W_enc.numpy(), sae.b_enc.numpy() - 100, sae.W_dec.numpy(), sae.b_dec.numpy())
    densities = FeatureDensities(np.zeros(RARE + FREQUENT, np.int64), 4000)
    survey = world.survey(silent, world.rows(cluster.rows))
    context = Context(sae=silent, hook_name=world.HOOK, survey=survey, densities=densities)
    result = rare_cluster.run(context, OPTIONS)
    assert result.numbers["n_rare_dead"] == RARE + FREQUENT
    assert result.numbers["cofiring_max"] == 0
    assert result.numbers["nested_by_bias"] is None
    assert result.tables["top_tokens"].num_rows == 0


def test_evenly_spaced_covers_both_ends_without_repeats() -> None:
    assert cofiring.evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert cofiring.evenly_spaced(3, 10).tolist() == [0, 1, 2]
    assert cofiring.evenly_spaced(0, 10).size == 0
