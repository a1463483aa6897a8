"""The loss, written once in plain differentiable torch.

L2 is the squared error summed over d_in; L1 the sum of feature activations (which are non-negative); both are means
over the batch. Source: Towards Monosemanticity, appendix. The post's code sums L1 over the batch: the same loss with a
coefficient ``batch_rows`` times larger.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.interface import Forward, Objective, Weights


class Loss(NamedTuple):
    """A differentiable scalar and what it is made of."""

    total: Tensor
    forward: Forward


def autoencoder_loss(weights: Weights, rows: Tensor, objective: Objective, *, bfloat16: bool = False) -> Loss:
    """Computes the objective densely, in the precision of the weights.

    Args:
        weights: feature-major weights.
        rows: (B, d_in) activations.
        objective: coefficients and variants.
        bfloat16: round the factors and results of matrix products, and of their gradients, to bfloat16; nothing else.
    """

    def affine(offset: Tensor, left: Tensor, right: Tensor) -> Tensor:
        if not bfloat16:
            return torch.addmm(offset, left, right)  # one pass less than a product and a sum
        with torch.autocast(left.device.type, torch.bfloat16):
            product = left @ right
        return offset + product

    sae_in = rows - weights.b_dec if objective.subtract_b_dec else rows
    acts = torch.relu(affine(weights.b_enc, sae_in, weights.enc.T))
    error = affine(weights.b_dec - rows, acts, weights.dec)
    l2 = error.square().sum(dim=1)
    l1 = acts @ weights.dec.norm(dim=1) if objective.l1_by_decoder_norm else acts.sum(dim=1)
    active = (acts.detach() > 0).to(acts.dtype)  # summing booleans takes several times as long
    l0, fired = (active.sum(dim=dim).to(torch.int64) for dim in (1, 0))
    deviation = (rows - objective.mean).square().sum(dim=1)
    forward = Forward(l2.detach(), l1.detach(), l0, deviation, fired)
    total = l2.mean() + objective.l1_coeff * l1.mean() + encoder_penalty(weights.enc, objective)
    return Loss(total, forward)


def encoder_penalty(enc: Tensor, objective: Objective) -> Tensor:
    """The part of the objective that looks at encoder weights alone; a scalar."""
    penalty = enc.new_zeros(())
    if objective.encoder_l1:
        penalty = penalty + objective.encoder_l1 * enc.abs().sum()
    if objective.encoder_l2:
        penalty = penalty + objective.encoder_l2 * enc.square().sum()
    return penalty


def batch_loss(forward: Forward, objective: Objective, enc: Tensor) -> float:
    """The objective's value from per-row sums, added in float64 so that the order of rows hardly matters."""
    rows = forward.l2.shape[0]
    l2, l1 = (float(per_row.double().sum()) / rows for per_row in (forward.l2, forward.l1))
    return l2 + objective.l1_coeff * l1 + float(encoder_penalty(enc, objective))
