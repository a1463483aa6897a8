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


def autoencoder_loss(weights: Weights, rows: Tensor, objective: Objective) -> Loss:
    """Computes the objective densely, in the precision of the weights.

    Args:
        weights: feature-major weights.
        rows: (B, d_in) activations.
        objective: coefficients and variants.
    """
    sae_in = rows - weights.b_dec if objective.subtract_b_dec else rows
    acts = torch.relu(sae_in @ weights.enc.T + weights.b_enc)
    error = acts @ weights.dec + weights.b_dec - rows
    l2 = error.square().sum(dim=1)
    l1 = acts @ weights.dec.norm(dim=1) if objective.l1_by_decoder_norm else acts.sum(dim=1)
    active = acts.detach() > 0
    deviation = (rows - objective.mean).square().sum(dim=1)
    forward = Forward(l2.detach(), l1.detach(), active.sum(dim=1), deviation, active.sum(dim=0))
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
