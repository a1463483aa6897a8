from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.analysis import Context, FeatureDensities, density
from pipeline.analysis.result import BELOW_RESOLUTION


def planted(world: SimpleNamespace, n_rows: int = 3000) -> tuple[Context, np.ndarray]:
    """Feature i is neuron i, on where the neuron exceeds 1; the rows plant exactly how often that happens."""
    wanted = np.array([0, 1, 2, 400, 1500, 3000])
    rows = np.zeros((3000, 6), np.float32)
    for neuron, count in enumerate(wanted):
        rows[:count, neuron] = np.linspace(2, 3, count) if count else 0
    sae = world.autoencoder(np.eye(6), -np.ones(6), np.eye(6), np.zeros(6))
    survey = world.survey(sae, world.rows(rows), n_rows=n_rows)
    return Context(sae=sae, hook_name=world.HOOK, reader=world.rows(rows), survey=survey), wanted


def test_counts_and_activations_are_exact(world: SimpleNamespace) -> None:
    context, wanted = planted(world)
    result = density.run(context, density.OPTIONS())
    table = result.tables["features"]
    assert table["count"].to_pylist() == wanted.tolist()
    np.testing.assert_allclose(table["density"].to_numpy(), wanted / 3000)
    np.testing.assert_allclose(table["max_activation"].to_numpy(), [0, 1, 2, 2, 2, 2])
    np.testing.assert_allclose(table["mean_activation_when_active"].to_numpy(), [0, 1, 1.5, 1.5, 1.5, 1.5], rtol=1e-6)
    assert result.numbers["l0"] == pytest.approx(wanted.sum() / 3000)
    assert result.numbers["dead_fraction"] == pytest.approx(1 / 6)


def test_a_threshold_with_fewer_than_ten_expected_firings_is_below_resolution() -> None:
    densities = FeatureDensities(np.array([0, 9, 11]), 100_000)
    assert density.fraction_below(densities, 1e-5) == BELOW_RESOLUTION
    assert density.fraction_below(densities, 1e-4) == pytest.approx(2 / 3)


def test_l0_median_is_that_of_the_rows(world: SimpleNamespace) -> None:
    context, _ = planted(world)
    active = (context.need_reader().rows > 1).sum(axis=1)  # pyright: ignore[reportAttributeAccessIssue]
    assert density.run(context, density.OPTIONS()).numbers["l0_median"] == np.sort(active)[1499]


def test_densities_are_over_the_rows_of_the_survey(world: SimpleNamespace) -> None:
    context, wanted = planted(world, 1025)
    result = density.run(context, density.OPTIONS())
    assert result.numbers["n_rows"] == 1025
    assert result.tables["features"]["count"].to_pylist() == np.minimum(wanted, 1025).tolist()


def test_two_planted_groups_of_density_are_seen(world: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    n, often, seldom = 4000, 40, 60
    p = np.concatenate([rng.uniform(0.2, 0.4, often), rng.uniform(0.002, 0.004, seldom)])
    rows = (rng.random((n, often + seldom)) < p).astype(np.float32)
    d = often + seldom
    sae = world.autoencoder(np.eye(d), -0.5 * np.ones(d), np.eye(d), np.zeros(d))
    context = Context(sae=sae, hook_name=world.HOOK, survey=world.survey(sae, world.rows(rows)))
    result = density.run(context, density.OPTIONS(ultra_low_below=0.05))
    assert result.numbers["ultra_low_fraction"] == pytest.approx(0.6)
    assert result.numbers["lower_mode_weight"] == pytest.approx(0.6, abs=0.03)
    assert float(result.numbers["ashman_d"] or 0) > 4
    assert "two groups" in result.reading


def test_an_autoencoder_that_never_fires_has_no_modes(world: SimpleNamespace) -> None:
    sae = world.autoencoder(np.eye(3), -np.ones(3), np.eye(3), np.zeros(3))
    context = Context(sae=sae, hook_name=world.HOOK, survey=world.survey(sae, world.rows(np.zeros((50, 3)))))
    numbers = density.run(context, density.OPTIONS()).numbers
    assert numbers["dead_fraction"] == 1
    assert numbers["ashman_d"] is None
    assert numbers["median_density"] is None
