import pytest
import torch
from scipy.optimize import minimize

from sae.constraints import orthonormal_basis
from sae.errors import InvalidTensor
from sae.initialisation import calibrated_biases, geometric_median, initial_weights, kaiming_decoder

from .cases import config, random_rows


def test_kaiming_norms_are_the_posts():
    rows = random_rows(4, 128)
    weights = initial_weights(config(d_sae=1024), rows, rows.mean(dim=0), None)
    # fan-in d_sae: uniform within sqrt(6 / d_sae), so columns of norm sqrt(2 d_in / d_sae): 0.5 at 2048 -> 16384
    assert float(weights.enc.norm(dim=1).mean()) == pytest.approx(0.5, rel=0.01)
    torch.testing.assert_close(weights.dec.norm(dim=1), torch.ones(1024))
    raw = kaiming_decoder(1024, 128, torch.Generator().manual_seed(0))
    assert float(raw.norm(dim=1).mean()) == pytest.approx(2**0.5, rel=0.01)
    assert float(weights.b_enc.abs().max()) == float(weights.b_dec.abs().max()) == 0
    cosines = torch.nn.functional.cosine_similarity(weights.enc, weights.dec)
    assert float(cosines.abs().mean()) < 0.15


def test_tied_start_transposes_the_decoder():
    rows = random_rows(4, 12)
    weights = initial_weights(config(init="tied"), rows, rows.mean(dim=0), None)
    assert torch.equal(weights.enc, weights.dec)
    assert weights.enc.data_ptr() != weights.dec.data_ptr()


def test_seeds_differ_and_repeat():
    rows = random_rows(4, 12)
    one, again, other = (initial_weights(config(seed=seed), rows, rows[0], None) for seed in (0, 0, 1))
    assert torch.equal(one.enc, again.enc)
    assert not torch.equal(one.enc, other.enc)


@pytest.mark.parametrize("init", ["kaiming", "tied"])
def test_encoder_starts_orthogonal_to_given_directions(init: str):
    rows, basis = random_rows(4, 12), orthonormal_basis(torch.eye(12)[:2], 12)
    weights = initial_weights(config(init=init), rows, rows.mean(dim=0), basis)
    assert float(weights.enc[:, :2].abs().max()) < 1e-6


def test_centres():
    rows = random_rows(101, 12) + 3
    mean = rows.mean(dim=0)
    assert torch.equal(initial_weights(config(b_dec_init="mean"), rows, mean, None).b_dec, mean)
    median = initial_weights(config(b_dec_init="geometric-median"), rows, mean, None).b_dec
    points = rows.double().numpy()
    found = minimize(lambda x: float(((points - x) ** 2).sum(axis=1).__pow__(0.5).sum()), mean.double().numpy())
    torch.testing.assert_close(median.double(), torch.from_numpy(found.x), atol=1e-3, rtol=0)


def test_geometric_median_ignores_an_outlier():
    points = torch.cat([torch.zeros(9, 3), torch.full((1, 3), 1e3)])
    assert float(geometric_median(points).norm()) < 1e-3


def test_calibrated_biases_start_at_the_target_with_no_feature_dead():
    rows = random_rows(1000, 12) @ torch.diag(torch.linspace(0.1, 5, 12)) + 2
    settings = config(d_sae=2000, b_enc_init="calibrated", target_l0=50, b_dec_init="mean")
    weights = initial_weights(settings, rows, rows.mean(dim=0), None)
    fired = (rows - weights.b_dec) @ weights.enc.T + weights.b_enc > 0
    assert float(fired.sum(dim=1).double().mean()) == pytest.approx(50, rel=1e-3)
    assert fired.sum(dim=0).unique().tolist() == [25]


def test_calibration_needs_two_rows():
    with pytest.raises(InvalidTensor, match="sample"):
        calibrated_biases(torch.ones(3, 2), torch.ones(1, 2), 1.0)
