import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.analysis import statistics


def test_kurtosis_equals_scipys() -> None:
    rows = np.random.default_rng(0).standard_t(4, (20, 300))
    expected = stats.kurtosis(rows, axis=1, fisher=True, bias=True)
    np.testing.assert_allclose(statistics.excess_kurtosis(rows), expected, rtol=1e-10)


def test_kurtosis_of_normal_rows_is_near_its_expected_value() -> None:
    d = 200
    found = statistics.excess_kurtosis(np.random.default_rng(1).standard_normal((4000, d)))
    assert found.mean() == pytest.approx(-6 / (d + 1), abs=0.02)


def test_kurtosis_of_a_constant_row_does_not_exist() -> None:
    assert np.isnan(statistics.excess_kurtosis(np.ones((1, 5)))[0])


def test_cosines_of_zero_rows_are_nan_and_others_exact() -> None:
    left = np.array([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    right = np.array([[0.0, 2.0], [1.0, 1.0], [3.0, 4.0]])
    np.testing.assert_allclose(statistics.row_cosines(left, right), [0.0, np.nan, 1.0])
    np.testing.assert_allclose(statistics.cosines_with(left, np.array([0.0, 1.0])), [0.0, np.nan, 0.8])


def test_reductions_leave_out_what_is_not_finite() -> None:
    values = np.array([1.0, np.nan, 3.0])
    assert statistics.mean(values) == 2
    assert statistics.median(values) == 2
    assert statistics.std(values) == 1
    assert statistics.maximum(values) == 3
    assert statistics.mean(np.array([np.nan])) is None
    assert statistics.share(np.zeros(0, np.bool_)) is None


def test_two_planted_gaussians_are_found_with_their_ashman_d() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(-5, 0.3, 6000), rng.normal(-2, 0.6, 4000)])
    fit = statistics.fit_two_gaussians(values)
    assert fit is not None
    assert fit.means == pytest.approx((-5, -2), abs=0.03)
    assert fit.stds == pytest.approx((0.3, 0.6), abs=0.03)
    assert fit.weights == pytest.approx((0.6, 0.4), abs=0.02)
    assert fit.ashman_d == pytest.approx(2**0.5 * 3 / (0.3**2 + 0.6**2) ** 0.5, abs=0.1)


def test_one_gaussian_does_not_read_as_two() -> None:
    fit = statistics.fit_two_gaussians(np.random.default_rng(0).normal(0, 1, 5000))
    assert fit is not None
    assert fit.ashman_d < 2


def test_the_fit_is_no_less_likely_than_the_planted_mixture() -> None:
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.normal(0, 1, 300), rng.normal(4, 0.5, 100)])
    planted = np.log(0.75 * stats.norm.pdf(values, 0, 1) + 0.25 * stats.norm.pdf(values, 4, 0.5)).mean()
    fit = statistics.fit_two_gaussians(values)
    assert fit is not None
    assert fit.log_likelihood >= planted
    assert fit == statistics.fit_two_gaussians(values)


def test_too_few_values_have_no_fit() -> None:
    assert statistics.fit_two_gaussians(np.array([1.0, 1.0, 2.0, 3.0])) is None


def test_weights_become_float64() -> None:
    assert statistics.weights64(torch.ones(2, 2, requires_grad=True)).dtype == np.float64


@pytest.mark.parametrize("kept", [1, 3, 7])
def test_largest_is_a_stable_sort_even_of_equal_values(kept: int) -> None:
    values = np.random.default_rng(0).integers(0, 4, (50, 7)).astype(float)
    values[3] = 0
    values[4, 2:] = -np.inf
    np.testing.assert_array_equal(
        statistics.largest(values, kept), np.argsort(-values, axis=1, kind="stable")[:, :kept]
    )
