import pytest
import torch

from sae.constraints import orthonormal_basis, project_gradients_, remove_components_, unit_rows
from sae.errors import InvalidTensor

from .cases import random_rows, random_weights, update


def unit_directions(count: int, d_in: int) -> torch.Tensor:
    return unit_rows(random_rows(count, d_in))


def test_basis_is_orthonormal_and_spans_the_directions():
    directions = unit_directions(3, 8)
    basis = orthonormal_basis(directions, 8)
    assert basis is not None
    torch.testing.assert_close(basis @ basis.T, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(directions @ basis.T @ basis, directions, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (torch.ones(8), "shape|found"),
        (torch.eye(8)[:2, :7], "found"),
        (2 * torch.eye(8)[:2], "unit length"),
        (torch.eye(8)[[0, 0]], "dependent"),
        (torch.eye(8), "0 < k"),
    ],
)
def test_bad_directions_are_refused(directions: torch.Tensor, message: str):
    with pytest.raises(InvalidTensor, match=message):
        orthonormal_basis(directions, 8)


def test_no_directions_constrain_nothing():
    rows = random_rows(4, 8)
    kept = rows.clone()
    remove_components_(rows, orthonormal_basis(None, 8))
    assert torch.equal(rows, kept)


@pytest.mark.parametrize(("decoder_norm", "along"), [("fixed", 0.0), ("as-published", 0.0), ("free", 1.0)])
def test_projection_removes_the_component_along_each_row(decoder_norm: str, along: float):
    weights, grads = random_weights(8, 5), random_weights(8, 5, seed=3)
    weights.dec.mul_(1.5)  # rows need not be of unit norm
    before = (grads.dec * weights.dec).sum(dim=1)
    project_gradients_(grads, weights, update(decoder_norm=decoder_norm))
    torch.testing.assert_close((grads.dec * weights.dec).sum(dim=1), along * before, atol=1e-6, rtol=1e-5)


def test_encoder_gradients_lose_the_given_directions():
    weights, grads = random_weights(8, 5), random_weights(8, 5, seed=3)
    directions = unit_directions(2, 8)
    project_gradients_(grads, weights, update(encoder_basis=orthonormal_basis(directions, 8)))
    torch.testing.assert_close(grads.enc @ directions.T, torch.zeros(5, 2), atol=1e-6, rtol=0)


def test_a_zero_row_stays_zero():
    assert torch.equal(unit_rows(torch.zeros(1, 3)), torch.zeros(1, 3))
