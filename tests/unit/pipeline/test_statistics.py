import numpy as np
import pytest
import torch

from pipeline.statistics import Moments, Sums


@pytest.fixture
def activations() -> torch.Tensor:
    return torch.randn(12, 5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 1


def sums(batch: torch.Tensor, *, outer: bool) -> Sums:
    rows = batch.flatten(0, 1).numpy()
    total = rows.sum(0, dtype=np.float64)
    return Sums(len(rows), total, rows.min(0), rows.max(0), rows.T @ rows if outer else None)


def test_moments_equal_a_float64_recomputation(activations: torch.Tensor):
    moments = Moments.empty(7)
    for number, batch in enumerate(activations.split(4)):
        moments.add(sums(batch, outer=number % 2 == 0))
    rows = activations.double().flatten(0, 1).numpy()
    sampled = torch.cat([activations[:4], activations[8:]]).double().flatten(0, 1).numpy()
    assert moments.rows == 60
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_array_equal(moments.low, rows.min(0))
    np.testing.assert_array_equal(moments.high, rows.max(0))
    assert moments.sampled_rows == 40
    np.testing.assert_allclose(moments.second_moment, sampled.T @ sampled, rtol=1e-5)


def test_merging_windows_equals_one_pass_and_survives_a_file(activations: torch.Tensor):
    whole = Moments.empty(7)
    parts = []
    for batch in activations.split(4):
        part = Moments.empty(7)
        part.add(sums(batch, outer=True))
        parts.append(Moments.from_arrays(part.to_arrays()))
        whole.add(sums(batch, outer=True))
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.rows == whole.rows
    np.testing.assert_array_equal(merged.total, whole.total)
    np.testing.assert_array_equal(merged.low, whole.low)
    np.testing.assert_allclose(merged.second_moment, whole.second_moment, rtol=1e-6)


def test_singular_vectors_are_those_of_the_rows(activations: torch.Tensor):
    moments = Moments.empty(7)
    for batch in activations.split(4):
        moments.add(sums(batch, outer=True))
    values, vectors = moments.singular_vectors()
    _, expected_values, expected_vectors = np.linalg.svd(activations.double().flatten(0, 1).numpy())
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(vectors * expected_vectors, axis=1)), 1, atol=1e-4)


def test_singular_values_of_a_sample_are_scaled_to_all_rows():
    rows = torch.randn(4000, 1, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([5.0, 2.0, 1.0])
    moments = Moments.empty(3)
    for number, batch in enumerate(rows.split(100)):
        moments.add(sums(batch, outer=number % 4 == 0))
    values, _ = moments.singular_vectors()
    assert moments.sampled_rows == 1000
    np.testing.assert_allclose(values, np.linalg.svd(rows.double()[:, 0].numpy())[1], rtol=0.1)
