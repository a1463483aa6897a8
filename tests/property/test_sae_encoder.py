"""The sparse encoder against float64, on the training step's adversarial inputs."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from sae.autoencoder import Autoencoder
from sae.kernels.encoder import ActiveFeatures, SparseEncoder
from tests.property.test_sae_kernels import Case, cases


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def autoencoder(case: Case) -> Autoencoder:
    weights = case.weights
    return Autoencoder(
        weights.enc.T, weights.b_enc, weights.dec, weights.b_dec, subtract_b_dec=case.objective.subtract_b_dec
    )


def dense(active: ActiveFeatures, d_sae: int) -> np.ndarray:
    acts = np.zeros((len(active.pointer) - 1, d_sae), np.float32)
    acts[np.repeat(np.arange(len(acts)), np.diff(active.pointer)), active.feature] = active.activation
    return acts


@given(cases())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_active_features_are_those_of_the_dense_encoder_up_to_rounding(case: Case):
    sae = autoencoder(case)
    found = [
        SparseEncoder(sae, threads=threads, bfloat16=bfloat16).encode(case.rows.numpy())
        for threads, bfloat16 in ((1, True), (2, False))
    ]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    acts = dense(found[0], sae.d_sae)
    sae_in = (case.rows - sae.b_dec if sae.subtract_b_dec else case.rows).double()
    exact = (sae_in @ sae.W_enc.double() + sae.b_enc.double()).numpy()
    size = (sae_in.abs() @ sae.W_enc.double().abs() + sae.b_enc.double().abs()).numpy()
    rounding = (sae.d_in + 2) * 2.0**-23 * size
    assert (abs(acts - np.maximum(exact, 0)) <= rounding).all()
    assert ((acts > 0) | (exact <= rounding)).all()
    assert ((acts == 0) | (exact >= -rounding)).all()
    assert all((np.diff(row) > 0).all() for row in np.split(found[0].feature, found[0].pointer[1:-1]))
