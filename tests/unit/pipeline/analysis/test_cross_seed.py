from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import optimize, special

from pipeline.analysis import Context, cross_seed
from storage.errors import InputError

D, N, RARE = 48, 90, 20
OPTIONS = cross_seed.OPTIONS()


@pytest.fixture
def pair(world: SimpleNamespace) -> tuple[Context, np.ndarray]:
    """Two autoencoders: the second has the first's features in another order, a third of them replaced.

    The ultra-low encoders lie around one direction in the first and, in the second, around one at 60 degrees to it.
    """
    rng = np.random.default_rng(0)
    decoder = world.units(rng, N, D)
    order = np.concatenate([rng.permutation(RARE), RARE + rng.permutation(N - RARE)])
    other = 3 * (decoder[order] + 0.02 * world.units(rng, N, D))
    other[RARE : RARE + 10] = world.units(rng, 10, D)
    encoder, far = world.units(rng, N, D), world.units(rng, N, D)
    encoder[:RARE] = np.linspace(1, 3, RARE)[:, None] * np.eye(D)[0]
    far[:RARE] = np.cos(np.pi / 3) * np.eye(D)[0] + np.sin(np.pi / 3) * np.eye(D)[1]
    companion = world.context(far, other, rare=RARE, label="seed 1")
    return world.context(encoder, decoder, rare=RARE, companions=(companion,)), order


def test_a_permuted_noised_copy_is_matched(pair: tuple[Context, np.ndarray]) -> None:
    context, order = pair
    result = cross_seed.run(context, OPTIONS)
    table = result.tables["features"].to_pydict()
    kept = np.delete(np.arange(N), np.s_[RARE : RARE + 10])
    for place in kept:  # where the second keeps feature order[place] of the first
        assert table["matched_feature"][order[place]] == place
        assert table["matched_cosine"][order[place]] > 0.99
    assert result.numbers["matched_fraction_rare"] == 1
    assert result.numbers["matched_fraction_frequent"] == pytest.approx(1 - 10 / (N - RARE))
    assert result.numbers["matched_median_frequent"] == pytest.approx(1, abs=0.01)


def test_matches_equal_the_whole_matrix_of_cosines(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((50, 7)), rng.standard_normal((33, 7))
    left[4] = right[9] = 0
    monkeypatch.setattr(cross_seed, "_BLOCK", 16)
    there, back = cross_seed.best_matches(left, right)
    with np.errstate(invalid="ignore"):
        units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (left, right)]
    cosines = np.nan_to_num(units[0] @ units[1].T, nan=-2)
    for matches, table, zero in ((there, cosines, 4), (back, cosines.T, 9)):
        whole = np.delete(np.arange(len(table)), zero)
        np.testing.assert_array_equal(matches.feature[whole], table.argmax(axis=1)[whole])
        np.testing.assert_allclose(matches.cosine[whole], table.max(axis=1)[whole])
        assert matches.feature[zero] == -1
        assert np.isnan(matches.cosine[zero])


def test_the_angle_between_rare_directions_is_found(pair: tuple[Context, np.ndarray]) -> None:
    result = cross_seed.run(pair[0], OPTIONS)
    assert result.numbers["cluster"] == "measured"
    assert result.numbers["direction_cosine"] == pytest.approx(0.5)
    assert result.numbers["direction_cosine_unit"] == pytest.approx(0.5)
    (row,) = result.tables["pairs"].to_pylist()
    assert (row["one"], row["other"], row["ultra_low_one"]) == ("this one", "seed 1", RARE)


def test_every_pair_of_three_is_compared(pair: tuple[Context, np.ndarray]) -> None:
    context, _ = pair
    third = replace(context.companions[0], label="seed 2")
    numbers = cross_seed.run(replace(context, companions=(*context.companions, third)), OPTIONS).numbers
    assert numbers["n_compared"] == 3
    assert numbers["direction_cosine"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert numbers["direction_cosine_min"] == pytest.approx(0.5)


def test_a_cluster_missing_in_one_is_no_cluster(pair: tuple[Context, np.ndarray], world: SimpleNamespace) -> None:
    context, _ = pair
    rng = np.random.default_rng(2)
    other = world.context(world.units(rng, N, D), world.units(rng, N, D), rare=1, label="seed 1")
    result = cross_seed.run(replace(context, companions=(other,)), OPTIONS)
    assert result.numbers["cluster"] == "no cluster"
    assert result.numbers["n_with_cluster"] == 1
    assert result.numbers["direction_cosine"] is None
    assert result.tables["pairs"].num_rows == 0
    assert "directions" not in result.figures


def test_random_dictionaries_match_as_the_closed_form_says(world: SimpleNamespace) -> None:
    rng = np.random.default_rng(3)
    n, d = 3000, 30
    there, back = cross_seed.best_matches(world.units(rng, n, d), world.units(rng, n, d))
    assert np.median(there.cosine) == pytest.approx(cross_seed.random_best_cosine(0.5, n, d), abs=0.004)
    assert np.quantile(back.cosine, 0.9) == pytest.approx(cross_seed.random_best_cosine(0.9, n, d), abs=0.008)
    # One random direction: P(cosine < c) is a regularised incomplete beta function of the angle's squared sine.
    root = optimize.brentq(lambda c: 1 - 0.5 * special.betainc((d - 1) / 2, 0.5, 1 - c * c) - 0.9, 0, 0.99)
    assert cross_seed.random_best_cosine(0.9, 1, d) == pytest.approx(root)


def test_without_densities_all_features_are_one_group(pair: tuple[Context, np.ndarray]) -> None:
    context, _ = pair
    bare = replace(context, densities=None, companions=(replace(context.companions[0], densities=None),))
    numbers = cross_seed.run(bare, OPTIONS).numbers
    assert "matched_median_frequent" not in numbers
    assert numbers["matched_fraction_all"] == pytest.approx(1 - 10 / N)


def test_the_reading_says_random_starts_only_where_seeds_alone_differ(
    pair: tuple[Context, np.ndarray], world: SimpleNamespace
) -> None:
    context, _ = pair

    def reading(*companions: Context) -> str:
        return cross_seed.run(replace(context, companions=companions), OPTIONS).reading

    seeds = replace(context.companions[0], label="reader_seed 1, seed 1")
    assert "is found again whatever the random start;" in reading(seeds)
    penalty = replace(seeds, label="l1_coeff 0.4, seed 1")
    assert "differ in more than the random start (reader_seed 1, seed 1; l1_coeff 0.4, seed 1);" in reading(
        seeds, penalty
    )
    rng = np.random.default_rng(4)
    wide = world.context(world.units(rng, 2 * N, D), world.units(rng, 2 * N, D), rare=RARE, label="d_sae 180")
    assert "random start (d_sae 180, of 90 and 180 features);" in reading(wide)
    assert "random start (train-0123456789ab);" in reading(replace(seeds, label="train-0123456789ab"))


def test_another_width_is_refused(pair: tuple[Context, np.ndarray], world: SimpleNamespace) -> None:
    narrow = world.context(np.eye(5), np.eye(5), label="blocks.0.hook_mlp_out")
    with pytest.raises(InputError, match="hook_mlp_out"):
        cross_seed.run(replace(pair[0], companions=(narrow,)), OPTIONS)


def test_alone_is_refused(pair: tuple[Context, np.ndarray]) -> None:
    with pytest.raises(InputError, match="other autoencoders"):
        cross_seed.run(replace(pair[0], companions=()), OPTIONS)
