"""One step shared by ranks: each makes the gradients of its own rows, their sum moves every rank's weights alike.

The global batch is the ranks' rows one after another; losses, metrics and firing counts are those of the global batch
on every rank, so that whatever follows from them (the next engine, resampling, divergence) is decided alike. Weights
stay equal without being sent, since equal sums move them. Cost: gradients are written out (two matrices of d_sae d_in)
and all-reduced once a step. Rejected: torch's DistributedDataParallel, which wants a module and autograd's hooks.
"""

import torch
from torch import Tensor

from ..collective import Collective, gathered
from .interface import Engine, Forward, Moments, Objective, Stepped, Update, Weights
from .update import stepped


class SharedEngine:
    """An engine's gradients, summed over ranks."""

    def __init__(self, engine: Engine, collective: Collective) -> None:
        """Wraps an engine.

        Args:
            engine: makes the gradients of this rank's rows.
            collective: the ranks.
        """
        self._engine = engine
        self._collective = collective

    def gradients(self, weights: Weights, rows: Tensor, objective: Objective) -> tuple[Weights, Forward]:
        """Gradients and measurements of the global batch.

        Args:
            weights: equal on all ranks.
            rows: (b, d_in) of this rank; b may be 0.
            objective: equal on all ranks.
        """
        grads, forward = self._own(weights, rows, objective)
        columns = torch.stack([forward.l2, forward.l1, forward.l0.to(forward.l2.dtype), forward.deviation], dim=1)
        everything, _ = gathered(self._collective, columns)
        share = rows.shape[0] / everything.shape[0]
        for grad in grads:
            grad.mul_(share)
        fired = forward.fired.to(torch.int64)
        self._collective.sum_([*grads, fired])
        l2, l1, l0, deviation = everything.T.contiguous()
        return grads, Forward(l2, l1, l0, deviation, fired)

    def step(self, weights: Weights, moments: Moments, rows: Tensor, objective: Objective, update: Update) -> Stepped:
        """Takes one step in place, on every rank, or none where the loss is not finite."""
        grads, forward = self.gradients(weights, rows, objective)
        self._engine.invalidate()
        return stepped(weights, moments, grads, forward, objective, update)

    def invalidate(self) -> None:
        """Tells the engine that something else changed the weights."""
        self._engine.invalidate()

    def _own(self, weights: Weights, rows: Tensor, objective: Objective) -> tuple[Weights, Forward]:
        if rows.shape[0]:
            return self._engine.gradients(weights, rows, objective)
        nothing, none = rows.new_zeros(0), torch.zeros(weights.enc.shape[0], dtype=torch.int64, device=rows.device)
        return Weights(*(torch.zeros_like(tensor) for tensor in weights)), Forward(
            nothing, nothing, nothing, nothing, none
        )
