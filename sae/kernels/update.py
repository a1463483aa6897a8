"""From gradients to new weights in plain torch: projection, clipping, fused Adam, and the constraints around it."""

import math

import torch
from torch.optim.adam import adam

from .. import constraints, losses
from .interface import Forward, Moments, Objective, Stepped, Update, Weights


def stepped(
    weights: Weights, moments: Moments, grads: Weights, forward: Forward, objective: Objective, update: Update
) -> Stepped:
    """Moves the weights by what a forward and backward pass found; leaves them where the loss is not finite."""
    loss = losses.batch_loss(forward, objective, weights.enc)
    finite = math.isfinite(loss)
    grad_norm = apply_gradients(weights, moments, grads, update) if finite else math.nan
    return Stepped(forward, loss, grad_norm, weights.dec.norm(dim=1))


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
