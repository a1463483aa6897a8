import numpy as np
import pytest
import torch

from pipeline.statistics import Moments


@pytest.fixture
def activations() -> torch.Tensor:
    return torch.randn(12, 5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 1


def test_moments_equal_a_float64_recomputation(activations: torch.Tensor):
    moments = Moments.empty(7)
    for batch in activations.split(4):
        moments.add(batch, stride=2)
    rows = activations.double().flatten(0, 1).numpy()
    sampled = activations.double()[::2].flatten(0, 1).numpy()
    assert moments.rows == 60
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_array_equal(moments.low, rows.min(0))
    np.testing.assert_array_equal(moments.high, rows.max(0))
    assert moments.sampled_rows == 30
    np.testing.assert_allclose(moments.second_moment, sampled.T @ sampled, rtol=1e-5)


def test_merging_windows_equals_one_pass_and_survives_a_file(activations: torch.Tensor):
    whole = Moments.empty(7)
    parts = []
    for batch in activations.split(4):
        part = Moments.empty(7)
        part.add(batch, stride=1)
        parts.append(Moments.from_arrays(part.to_arrays()))
        whole.add(batch, stride=1)
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.rows == whole.rows
    np.testing.assert_array_equal(merged.total, whole.total)
    np.testing.assert_array_equal(merged.low, whole.low)
    np.testing.assert_allclose(merged.second_moment, whole.second_moment, rtol=1e-6)
