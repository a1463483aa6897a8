import numpy as np
import pytest
import torch

from sae.autoencoder import Autoencoder
from sae.errors import InvalidTensor

from .cases import random_rows, random_weights


def make(*, subtract_b_dec: bool = True) -> Autoencoder:
    weights = random_weights(6, 10, bias=0.0)
    return Autoencoder(weights.enc.T, weights.b_enc, weights.dec, weights.b_dec, subtract_b_dec=subtract_b_dec)


@pytest.mark.parametrize("subtract", [True, False])
def test_forward_equals_the_formula_in_float64(subtract: bool):
    sae, x = make(subtract_b_dec=subtract), random_rows(7, 6)
    W_enc, b_enc, W_dec, b_dec, rows = (
        tensor.double().numpy() for tensor in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, x)
    )
    hidden = (rows - subtract * b_dec) @ W_enc + b_enc
    acts = np.maximum(hidden, 0)
    output = sae(x)
    np.testing.assert_allclose(output.hidden_pre, hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(output.feature_acts, acts, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(output.sae_out, acts @ W_dec + b_dec, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sae.decode(sae.encode(x)), output.sae_out)


def test_leading_dimensions_are_kept():
    output = make()(random_rows(6, 6).reshape(2, 3, 6))
    assert output.feature_acts.shape == (2, 3, 10)
    assert output.sae_out.shape == (2, 3, 6)


@pytest.mark.parametrize("name", ["b_enc", "W_dec", "b_dec"])
def test_disagreeing_shapes_are_refused_by_name(name: str):
    sae = make()
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    tensors[name] = tensors[name][:-1]
    with pytest.raises(InvalidTensor, match=name):
        Autoencoder(**tensors)


def test_moving_keeps_every_field():
    moved = make(subtract_b_dec=False).to(torch.float64)
    assert {tensor.dtype for tensor in (moved.W_enc, moved.b_enc, moved.W_dec, moved.b_dec)} == {torch.float64}
    assert not moved.subtract_b_dec
