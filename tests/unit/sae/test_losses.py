import numpy as np
import pytest

from sae.losses import autoencoder_loss, batch_loss

from .cases import double, objective, random_rows, random_weights


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("subtract", [False, True])
def test_loss_equals_numpy_in_float64(by_norm: bool, subtract: bool):
    weights, rows = double(random_weights(5, 9, bias=0.0)), random_rows(11, 5).double()
    weights.dec.mul_(1.7)
    options = {"l1_by_decoder_norm": by_norm, "subtract_b_dec": subtract, "encoder_l1": 0.3, "encoder_l2": 0.7}
    goal = objective(5, l1_coeff=0.2, **options)
    enc, b_enc, dec, b_dec = (tensor.numpy() for tensor in weights)
    x = rows.numpy()
    acts = np.maximum((x - subtract * b_dec) @ enc.T + b_enc, 0)
    l2 = ((acts @ dec + b_dec - x) ** 2).sum(axis=1)
    l1 = (acts * (np.linalg.norm(dec, axis=1) if by_norm else 1)).sum(axis=1)
    expected = l2.mean() + 0.2 * l1.mean() + 0.3 * np.abs(enc).sum() + 0.7 * (enc**2).sum()
    loss = autoencoder_loss(weights, rows, goal)
    assert float(loss.total) == pytest.approx(expected, rel=1e-12)
    assert batch_loss(loss.forward, goal, weights.enc) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(loss.forward.l2, l2)
    np.testing.assert_allclose(loss.forward.l1, l1)
    np.testing.assert_array_equal(loss.forward.l0, (acts > 0).sum(axis=1))
    np.testing.assert_array_equal(loss.forward.fired, (acts > 0).sum(axis=0))
    np.testing.assert_allclose(loss.forward.deviation, (x**2).sum(axis=1))


def test_a_batch_sum_of_l1_is_the_same_loss_with_a_coefficient_batch_rows_larger():
    weights, rows = double(random_weights(5, 9, bias=0.0)), random_rows(16, 5).double()
    as_published = 3e-4
    forward = autoencoder_loss(weights, rows, objective(5)).forward
    theirs = float(forward.l2.mean() + as_published * forward.l1.sum())
    ours = batch_loss(forward, objective(5, l1_coeff=as_published * 16), weights.enc)
    assert ours == pytest.approx(theirs, rel=1e-12)
