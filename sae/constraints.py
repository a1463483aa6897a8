"""Constraints on decoder norms and encoder directions, as plain torch operations on feature-major rows.

Order in a step: gradients are projected, Adam moves the weights, then encoder rows are projected again and decoder rows
renormalised; tied encoder rows are then the decoder's. The sparse engine does the same arithmetic row by row. Source:
the post's code (``make_decoder_weights_and_grad_unit_norm``) for the three decoder variants.
"""

import torch
from torch import Tensor

from .errors import InvalidTensor
from .kernels.interface import Update, Weights

UNIT_TOLERANCE = 1e-3
"""How far a given direction's norm may be from 1."""


def orthonormal_basis(directions: Tensor | None, d_in: int) -> Tensor | None:
    """Checks unit directions and orthonormalises them.

    Args:
        directions: None, or (k, d_in) rows of unit norm, linearly independent.
        d_in: width of the activations.

    Returns:
        None, or (k, d_in) float32 rows spanning the same space.

    Raises:
        InvalidTensor: the shape is wrong, a direction is not of unit length, or they are dependent.
    """
    if directions is None:
        return None
    if directions.ndim != 2 or directions.shape[1] != d_in or not 0 < directions.shape[0] < d_in:
        raise InvalidTensor(
            "encoder directions", found=tuple(directions.shape), expected=f"(k, {d_in}) with 0 < k < d_in"
        )
    norms = directions.double().norm(dim=1)
    if not bool(((norms - 1).abs() <= UNIT_TOLERANCE).all()):
        raise InvalidTensor("encoder directions", found=f"norms {norms.tolist()}", expected="unit length")
    q, r = torch.linalg.qr(directions.double().T)
    if bool((r.diagonal().abs() < 1e-6).any()):
        raise InvalidTensor("encoder directions", found="linearly dependent rows", expected="independent ones")
    return q.T.float().contiguous()


def remove_components_(rows: Tensor, basis: Tensor | None) -> None:
    """Makes each row orthogonal to an orthonormal basis, in place; None leaves them alone."""
    if basis is not None:
        rows.sub_((rows @ basis.T) @ basis)


def project_gradients_(grads: Weights, weights: Weights, update: Update) -> None:
    """Removes, in place, the gradient components that the constraints forbid; of tied weights both become the sum."""
    if update.tied:
        grads.dec.add_(grads.enc)
    if update.decoder_norm != "free":
        unit = unit_rows(weights.dec)
        grads.dec.sub_((grads.dec * unit).sum(dim=1, keepdim=True) * unit)
    if update.tied:
        remove_components_(grads.dec, update.encoder_basis)
        grads.enc.copy_(grads.dec)
    else:
        remove_components_(grads.enc, update.encoder_basis)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their norm; a zero row stays zero."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
