from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pipeline.analysis import Context, training_dynamics
from pipeline.analysis.context import TrainingDensities
from sae.metrics import ResamplingEvent
from storage.errors import InputError

D_SAE, WINDOW = 100, 1_000_000
OPTIONS = training_dynamics.OPTIONS(paths=7)
RARE, DYING, RISING = slice(0, 10), slice(10, 14), slice(14, 20)


@pytest.fixture
def context(world: SimpleNamespace) -> Context:
    """Five windows in which some features are rare, some die out, some rise past 1e-4, and two resamplings."""
    counts = np.full((5, D_SAE), 5000)
    counts[:, RARE] = 50
    counts[:, DYING] = np.array([90, 40, 8, 2, 0])[:, None]
    counts[:, RISING] = np.array([5, 20, 60, 120, 300])[:, None]
    exempt = np.zeros(D_SAE, np.bool_)
    exempt[[*range(8, 20), 50]] = True
    events = [ResamplingEvent(500, "reinit", (0, 1, 2), 1000), ResamplingEvent(1500, "reinit", (1, 3), 1000)]
    log = pa.table({"step": [1000, 2000, 5000], "rows_seen": [1_000_000, 2_000_000, 5_000_000]})
    return Context(
        sae=world.autoencoder(np.ones((4, D_SAE)), np.zeros(D_SAE), np.ones((D_SAE, 4)), np.zeros(4)),
        hook_name=world.HOOK,
        training_log=log,
        training_densities=TrainingDensities(counts, np.full(5, WINDOW), events, exempt),
    )


def planted(context: Context) -> TrainingDensities:
    assert context.training_densities is not None
    return context.training_densities


def test_fractions_peaks_and_their_times_are_the_planted_ones(context: Context) -> None:
    numbers = training_dynamics.run(context, OPTIONS).numbers
    assert (numbers["windows"], numbers["n_windows"], numbers["tokens"]) == ("measured", 5, 5 * WINDOW)
    assert numbers["ultra_low_final"] == pytest.approx(0.14)
    assert numbers["ultra_low_peak"] == pytest.approx(0.20)
    assert numbers["ultra_low_peak_tokens"] == WINDOW
    assert numbers["below_1e-5_final"] == pytest.approx(0.04)
    assert numbers["below_1e-5_peak"] == pytest.approx(0.06)
    assert numbers["below_1e-5_peak_tokens"] == WINDOW
    assert numbers["dead_final"] == numbers["dead_peak"] == pytest.approx(0.04)
    assert numbers["dead_peak_tokens"] == 5 * WINDOW


def test_resamplings_are_counted_and_placed_by_tokens(context: Context) -> None:
    result = training_dynamics.run(context, OPTIONS)
    numbers = result.numbers
    assert (numbers["n_resamplings"], numbers["n_resampled"], numbers["n_resampled_features"]) == (2, 5, 4)
    lines = [shape.x0 for shape in result.figures["fractions"].layout.shapes]
    assert lines == [500_000, 1_500_000]
    assert result.tables["windows"]["resamplings_so_far"].to_pylist() == [1, 2, 2, 2, 2]
    assert result.tables["features"]["times_resampled"].to_pylist()[:5] == [1, 2, 1, 1, 0]


def test_exempt_features_stand_beside_the_others(context: Context) -> None:
    numbers = training_dynamics.run(context, OPTIONS).numbers
    assert (numbers["followed"], numbers["n_followed"]) == ("exempt from resampling", 13)
    assert numbers["followed_ultra_low_final"] == pytest.approx(6 / 13)  # 8, 9 and the four that die out
    assert numbers["others_ultra_low_final"] == pytest.approx(8 / 87)


def test_drift_is_the_median_change_since_the_middle(context: Context) -> None:
    numbers = training_dynamics.run(context, OPTIONS).numbers
    spike, middle, last = 10**-6.5, np.r_[50, 50, [8] * 4, [60] * 6], np.r_[50, 50, [0] * 4, [300] * 6]
    change = np.log10(last / WINDOW + spike) - np.log10(middle / WINDOW + spike)
    assert numbers["n_drifting"] == 12
    assert numbers["drift"] == pytest.approx(np.median(change))
    dying = np.zeros(D_SAE, np.bool_)
    dying[DYING] = True
    alone = replace(context, training_densities=planted(context)._replace(exempt=dying))
    assert training_dynamics.run(alone, OPTIONS).numbers["drift"] == pytest.approx(-0.5 - np.log10(8e-6 + spike) - 6)


def test_without_exempt_features_those_never_resampled_are_followed(context: Context) -> None:
    spared = replace(context, training_densities=planted(context)._replace(exempt=np.zeros(D_SAE, np.bool_)))
    result = training_dynamics.run(spared, OPTIONS)
    assert (result.numbers["followed"], result.numbers["n_followed"]) == ("never resampled in this run", 96)
    assert result.numbers["followed_ultra_low_final"] == pytest.approx(10 / 96)
    assert result.numbers["others_ultra_low_final"] == 1
    names = [int(trace.name) for trace in result.figures["paths"].data]
    assert len(names) == 7
    assert names == sorted(names)
    assert not {0, 1, 2, 3} & set(names)


def test_paths_are_densities_of_followed_features_at_the_windows_ends(context: Context) -> None:
    paths = training_dynamics.run(context, OPTIONS).figures["paths"]
    for trace in paths.data:
        feature = int(trace.name)
        assert planted(context).exempt[feature]
        assert list(trace.x) == [WINDOW * window for window in range(1, 6)]
        np.testing.assert_allclose(trace.y, np.log10(planted(context).counts[:, feature] / WINDOW + 10**-6.5))


def test_the_heat_map_holds_every_feature_of_every_window(context: Context) -> None:
    (cells,) = training_dynamics.run(context, OPTIONS).figures["density"].data
    shares = np.array(cells.z)
    np.testing.assert_allclose(shares.sum(axis=0), 1)
    spike = np.searchsorted(cells.y, -6.5) - 1
    np.testing.assert_allclose(shares[spike], [0, 0, 0, 0, 0.04])
    assert len(cells.x) == 6


def test_a_threshold_with_too_few_firings_reads_below_resolution(context: Context) -> None:
    counts = planted(context).counts // 10
    short = replace(context, training_densities=planted(context)._replace(counts=counts, rows=np.full(5, WINDOW // 10)))
    result = training_dynamics.run(short, OPTIONS)
    assert result.numbers["below_1e-5_final"] == result.numbers["below_1e-5_peak"] == "below resolution"
    assert result.numbers["below_1e-5_peak_tokens"] is None
    assert result.tables["windows"]["below_1e-5"].null_count == 5
    assert [trace.name for trace in result.figures["fractions"].data] == ["density < 0.0001", "dead"]


def test_a_run_shorter_than_a_window_says_so(context: Context) -> None:
    none = planted(context)._replace(counts=np.zeros((0, D_SAE), np.int64), rows=np.zeros(0, np.int64))
    result = training_dynamics.run(replace(context, training_densities=none), OPTIONS)
    assert (result.numbers["windows"], result.numbers["n_windows"]) == ("no windows", 0)
    assert result.numbers["n_resampled"] == 5
    assert result.numbers["ultra_low_final"] is None
    assert not result.figures


def test_one_window_has_no_drift(context: Context) -> None:
    found = planted(context)
    one = replace(context, training_densities=found._replace(counts=found.counts[:1], rows=found.rows[:1]))
    numbers = training_dynamics.run(one, OPTIONS).numbers
    assert (numbers["n_windows"], numbers["drift"]) == (1, None)
    assert numbers["ultra_low_final"] == pytest.approx(0.2)


def test_weights_without_a_log_are_a_clear_error(context: Context) -> None:
    with pytest.raises(InputError, match="log of a training"):
        training_dynamics.run(replace(context, training_densities=None), OPTIONS)
