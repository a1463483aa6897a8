"""The reference engine: autograd for the gradients of the loss as written, then projection and Adam in plain torch.

No training uses it: every engine is tested against this one in float64.
"""

import torch
from torch import Tensor

from .. import losses
from .interface import Forward, Moments, Objective, Stepped, Update, Weights
from .update import stepped


class ReferenceEngine:
    """Plain PyTorch; holds no state."""

    def gradients(self, weights: Weights, rows: Tensor, objective: Objective) -> tuple[Weights, Forward]:
        """Gradients of the objective by autograd, in the precision of the weights."""
        leaves = Weights(*(tensor.detach().requires_grad_() for tensor in weights))
        with torch.enable_grad():
            loss = losses.autoencoder_loss(leaves, rows, objective)
        return Weights(*torch.autograd.grad(loss.total, tuple(leaves))), loss.forward

    def step(self, weights: Weights, moments: Moments, rows: Tensor, objective: Objective, update: Update) -> Stepped:
        """Takes one step in place, or none where the loss is not finite."""
        grads, forward = self.gradients(weights, rows, objective)
        return stepped(weights, moments, grads, forward, objective, update)

    def invalidate(self) -> None:
        """Nothing is kept between steps."""
