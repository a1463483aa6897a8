"""Matrix products for all entries, active or not: the faster step where many features are active, on any device.

Gradients are written out, so that of the six products of 2 B d_in d_sae operations that autograd makes one is left out:
b_dec's gradient through the encoder is minus the sum over rows of what reaches the pre-activations, which is b_enc's
gradient, through W_enc. What has a number for each row and feature is made in memory that is kept between steps: on a
CPU, fresh pages of that size cost as much as a product. Cost: five products, and three arrays of (B, d_sae).
"""

import torch
from torch import Tensor

from ..constraints import unit_rows
from .interface import Forward, Moments, Objective, Stepped, Update, Weights
from .update import stepped


class DenseEngine:
    """Keeps memory between steps, no numbers."""

    def __init__(self, *, bfloat16: bool = False) -> None:
        """Makes the engine.

        Args:
            bfloat16: round the factors and results of matrix products; sums, weights and Adam stay as they are.
        """
        self._bfloat16 = bfloat16
        self._memory: dict[str, Tensor] = {}

    def gradients(self, weights: Weights, rows: Tensor, objective: Objective) -> tuple[Weights, Forward]:
        """Gradients of the objective, in the precision of the weights."""
        count = rows.shape[0]
        norms = weights.dec.norm(dim=1) if objective.l1_by_decoder_norm else None
        sae_in = rows - weights.b_dec if objective.subtract_b_dec else rows
        acts = self._kept("acts", rows, weights)
        self._product(sae_in, weights.enc.T, acts).add_(weights.b_enc).relu_()
        active = torch.gt(acts, 0, out=self._kept("active", rows, weights))  # as numbers: summing booleans is slow
        error = self._product(acts, weights.dec, torch.empty_like(rows)).add_(weights.b_dec - rows)
        forward = Forward(
            l2=error.square().sum(dim=1),
            l1=acts.sum(dim=1) if norms is None else acts @ norms,
            l0=active.sum(dim=1).to(torch.int64),
            deviation=(rows - objective.mean).square().sum(dim=1),
            fired=active.sum(dim=0).to(torch.int64),
        )
        d_error = error.mul_(2 / count)
        l1_weight = objective.l1_coeff / count
        d_pre = self._product(d_error, weights.dec.T, self._kept("d_pre", rows, weights))
        d_pre.add_(l1_weight if norms is None else l1_weight * norms).mul_(active)
        grads = Weights(
            enc=self._product(d_pre.T, sae_in, torch.empty_like(weights.enc)),
            b_enc=d_pre.sum(dim=0),
            dec=self._product(acts.T, d_error, torch.empty_like(weights.dec)),
            b_dec=d_error.sum(dim=0),
        )
        if objective.subtract_b_dec:
            grads.b_dec.sub_(grads.b_enc @ weights.enc)
        if norms is not None:
            grads.dec.addcmul_(unit_rows(weights.dec), acts.sum(dim=0)[:, None], value=l1_weight)
        if objective.encoder_l1:
            grads.enc.add_(weights.enc.sign(), alpha=objective.encoder_l1)
        if objective.encoder_l2:
            grads.enc.add_(weights.enc, alpha=2 * objective.encoder_l2)
        return grads, forward

    def step(self, weights: Weights, moments: Moments, rows: Tensor, objective: Objective, update: Update) -> Stepped:
        """Takes one step in place, or none where the loss is not finite."""
        grads, forward = self.gradients(weights, rows, objective)
        return stepped(weights, moments, grads, forward, objective, update)

    def invalidate(self) -> None:
        """No numbers are kept between steps."""

    def _product(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        if self._bfloat16:
            return out.copy_(left.bfloat16() @ right.bfloat16())
        return torch.mm(left, right, out=out)

    def _kept(self, name: str, rows: Tensor, weights: Weights) -> Tensor:
        """Memory of (B, d_sae); a batch that is shorter takes a part of it."""
        count, d_sae = rows.shape[0], weights.enc.shape[0]
        kept = self._memory.get(name)
        if kept is None or kept.shape[0] < count or kept.shape[1] != d_sae or kept.dtype != rows.dtype:
            kept = self._memory[name] = rows.new_empty(count, d_sae)
        return kept[:count]
