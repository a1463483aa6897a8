"""The reference engine: autograd for the gradients, torch's own fused Adam, constraints in plain torch.

Cost: six matrix products of 2 B d_in d_sae operations a step, whatever the sparsity. Runs on any device. Every other
engine is tested against this one in float64.
"""

import math

import torch
from torch import Tensor
from torch.optim.adam import adam

from .. import constraints, losses
from .interface import Forward, Moments, Objective, Stepped, Update, Weights


class DenseEngine:
    """Plain PyTorch; keeps nothing between steps."""

    def __init__(self, *, bfloat16: bool = False) -> None:
        """Makes the engine.

        Args:
            bfloat16: round the factors of matrix products; weights, gradients' sums and Adam stay as they are.
        """
        self._bfloat16 = bfloat16

    def gradients(self, weights: Weights, rows: Tensor, objective: Objective) -> tuple[Weights, Forward]:
        """Gradients of the objective by autograd, in the precision of the weights."""
        leaves = Weights(*(tensor.detach().requires_grad_() for tensor in weights))
        with torch.enable_grad():
            loss = losses.autoencoder_loss(leaves, rows, objective, bfloat16=self._bfloat16)
        return Weights(*torch.autograd.grad(loss.total, tuple(leaves))), loss.forward

    def step(self, weights: Weights, moments: Moments, rows: Tensor, objective: Objective, update: Update) -> Stepped:
        """Takes one step in place, or none where the loss is not finite."""
        grads, forward = self.gradients(weights, rows, objective)
        loss = losses.batch_loss(forward, objective, weights.enc)
        if not math.isfinite(loss):
            return Stepped(forward, loss, math.nan, weights.dec.norm(dim=1))
        grad_norm = apply_gradients(weights, moments, grads, update)
        return Stepped(forward, loss, grad_norm, weights.dec.norm(dim=1))

    def invalidate(self) -> None:
        """Nothing is kept between steps."""


def apply_gradients(weights: Weights, moments: Moments, grads: Weights, update: Update) -> float:
    """Projects and clips gradients (in place), and moves the weights.

    Returns:
        The global norm of the projected gradient, before clipping.
    """
    constraints.project_gradients_(grads, weights, update)
    counted = grads[1:] if update.tied else grads
    norm = math.hypot(*(float(torch.linalg.vector_norm(grad, dtype=torch.float64)) for grad in counted))
    if update.clip_norm is not None and norm > update.clip_norm:
        for grad in grads:
            grad.mul_(update.clip_norm / norm)
    if update.decoder_norm == "renormalise-before":
        weights.dec.copy_(constraints.unit_rows(weights.dec))
    adam(
        list(weights),
        list(grads),
        list(moments.first),
        list(moments.second),
        max_exp_avg_sqs=[],
        state_steps=[torch.tensor(float(update.step - 1), device=weights.enc.device) for _ in weights],
        fused=True,
        amsgrad=False,
        beta1=update.betas[0],
        beta2=update.betas[1],
        lr=update.learning_rate,
        weight_decay=0.0,
        eps=update.epsilon,
        maximize=False,
    )
    constraints.remove_components_(weights.dec if update.tied else weights.enc, update.encoder_basis)
    if update.decoder_norm == "fixed":
        weights.dec.copy_(constraints.unit_rows(weights.dec))
    if update.tied:
        for tensors in (weights, *moments):
            tensors.enc.copy_(tensors.dec)
    return norm
