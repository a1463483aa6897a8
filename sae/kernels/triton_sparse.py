"""The exact sparse step on a CUDA device: ``sparse_cpu``'s, in Triton.

Forward: a screened bfloat16 product lists each row's candidates (``triton_screen``), a program a row decides them by
float32 dot products, decodes what is active and keeps the error. Active entries are then regrouped by feature with a
stable sort. Backward: one kernel makes each feature's gradient rows, projects them, applies Adam and the constraints
and refreshes what the next screen reads; gradient matrices are written only for clipping and for several ranks.
docs/training-cuda.md has the traffic. Equal batches give equal bits on one kind of device: nothing is atomic.

Lists have room for a quarter of d_sae candidates a row: 3 B d_sae bytes, less than one dense block of activations. A
batch with a row of more takes the dense step. The host waits for the device twice before the weights move: the number
of active entries sizes their regrouping, and a loss that is not finite must change nothing.
Rejected: regrouping by counting, which wants a histogram of d_sae bins for each block of rows.
"""

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from .. import losses
from ..config import DecoderNorm
from . import triton_kernels, triton_screen
from .dense import DenseEngine
from .interface import Forward, Moments, Objective, Stepped, Update, Weights
from .triton_screen import Tiles, View, launch
from .update import stepped

FEATURES_A_PROGRAM: Final = 8
"""Features of a backward program, on average: fewer would write more parts of b_dec's gradient."""

MOST_REGISTERS: Final = 128
"""Of a backward thread: above it a processor holds one program of 8 warps, whose every wait it then shares."""

WIDEST: Final = 16384
"""Largest d_in whose rows fit a program's registers; wider ones take the dense step."""

CONSTRAINTS: Final[dict[DecoderNorm, int]] = {
    "fixed": triton_kernels.FIXED.value,
    "as-published": triton_kernels.AS_PUBLISHED.value,
    "renormalise-before": triton_kernels.RENORMALISE_BEFORE.value,
    "free": triton_kernels.FREE.value,
}


class Entries(NamedTuple):
    """Active entries of a batch, feature by feature, and the rows that the backward pass reads with them.

    Attributes:
        column: (d_sae + 1,) int64 bounds of each feature's entries.
        tokens: (nnz,) int32 row numbers, ascending within a feature.
        acts: (nnz,) activations.
        error: (B, d_in) reconstruction minus row.
        centred: (B, d_in) encoder inputs.
    """

    column: Tensor
    tokens: Tensor
    acts: Tensor
    error: Tensor
    centred: Tensor


class TritonEngine:
    """The sparse step; keeps a view of the weights from step to step."""

    def __init__(self, *, capacity: int | None = None) -> None:
        """Allocates nothing.

        Args:
            capacity: candidates that a row has room for; None: a quarter of d_sae, and 128 at least.
        """
        self._capacity = capacity
        self._view: View | None = None
        self._dense = DenseEngine()

    def invalidate(self) -> None:
        """Forgets what is known of the weights, because something else changed them."""
        self._view = None

    def gradients(self, weights: Weights, rows: Tensor, objective: Objective) -> tuple[Weights, Forward]:
        """Gradients of the objective, unprojected: the variant that writes them out."""
        self.invalidate()
        with torch.cuda.device_of(rows):
            found = self.forward(weights, rows, objective)
            if found is None:
                return self._dense.gradients(weights, rows, objective)
            grads = _write_gradients(weights, found[0], objective, self._current_view(weights))
        self.invalidate()  # the caller is about to change the weights
        return grads, found[1]

    def step(self, weights: Weights, moments: Moments, rows: Tensor, objective: Objective, update: Update) -> Stepped:
        """Takes one step in place, or none where the loss is not finite."""
        with torch.cuda.device_of(rows):
            found = self.forward(weights, rows, objective)
            if found is None:
                self.invalidate()
                return self._dense.step(weights, moments, rows, objective, update)
            entries, forward = found
            view = self._current_view(weights)
            loss = losses.batch_loss(forward, objective, weights.enc)
            if not math.isfinite(loss):
                return Stepped(forward, loss, math.nan, view.dec_norms.clone())
            if update.clip_norm is None:
                grad_norm = _fused(weights, moments, entries, forward.fired, objective, update, view)
                return Stepped(forward, loss, grad_norm, view.dec_norms.clone())
            grads = _write_gradients(weights, entries, objective, view)
            self.invalidate()
            return stepped(weights, moments, grads, forward, objective, update)

    def forward(self, weights: Weights, rows: Tensor, objective: Objective) -> tuple[Entries, Forward] | None:
        """Finds a batch's active entries and measures it; None where it has no room for them."""
        (count, d_in), d_sae = rows.shape, weights.enc.shape[0]
        capacity = min(d_sae, self._capacity or max(128, d_sae // 4))
        if d_in > WIDEST:
            return None
        tiles, view = Tiles.of(d_in), self._current_view(weights)
        inputs = triton_screen.centre(rows, weights.b_dec if objective.subtract_b_dec else None, objective.mean, tiles)
        candidates = triton_screen.candidates(inputs, weights.b_enc, view, capacity)
        active = (
            torch.empty_like(candidates.found),
            rows.new_empty(count, capacity),
            torch.empty_like(candidates.counts),
        )
        error, sums = torch.empty_like(rows), rows.new_empty(2, count)
        launch(
            *(triton_kernels.activate, count, rows, inputs.centred, tuple(weights), view.dec_norms),
            *(tuple(candidates), active, error, sums, count, d_in, capacity),
            BY_NORM=objective.l1_by_decoder_norm,
            WIDTH=tiles.width,
            DEPTH=min(8, 2 * tiles.depth),
            num_warps=tiles.warps,
        )
        ends = active[2].cumsum(0)
        most, total = torch.stack([candidates.counts.max().long(), ends[-1]]).tolist()
        if most > capacity:
            return None
        column, tokens, acts = _by_feature(active, ends, total, d_sae)
        entries = Entries(column, tokens, acts, error, inputs.centred)
        return entries, Forward(sums[0], sums[1], active[2].long(), inputs.deviation, column.diff())

    def _current_view(self, weights: Weights) -> View:
        """The view that the last step left, or a new one."""
        if self._view is None or self._view.copies.shape != weights.enc.shape:
            self._view = triton_screen.look_at(weights.enc, weights.dec, Tiles.of(weights.enc.shape[1]))
        return self._view


def _by_feature(
    active: tuple[Tensor, Tensor, Tensor], ends: Tensor, total: int, d_sae: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Regroups entries by feature, rows ascending: column bounds, row numbers, activations."""
    found, values, _ = active
    features, tokens = (found.new_empty(total) for _ in range(2))
    acts = values.new_empty(total)
    rows, capacity = found.shape
    launch(triton_kernels.compact, rows, active, ends, (features, tokens, acts), capacity, BLOCK=128)
    ordered, order = torch.sort(features, stable=True)
    bounds = torch.arange(d_sae + 1, dtype=ordered.dtype, device=ordered.device)
    return torch.searchsorted(ordered, bounds), tokens[order], acts[order]


def _fused(
    weights: Weights,
    moments: Moments,
    entries: Entries,
    fired: Tensor,
    objective: Objective,
    update: Update,
    view: View,
) -> float:
    """Makes gradients and moves the weights in one pass; returns the global norm of the projected gradient."""
    (d_sae, d_in), (first, second) = weights.enc.shape, moments
    tiles, basis = Tiles.of(d_in), update.encoder_basis
    programs = -(-d_sae // FEATURES_A_PROGRAM)
    squares, bias_parts = weights.enc.new_empty(d_sae), weights.enc.new_empty(programs, d_in)
    adam = _adam(update)
    launch(
        *(triton_kernels.step_features, programs, torch.sort(fired, descending=True, stable=True).indices),
        *(tuple(entries), (weights.enc, weights.dec), _scalars(objective, entries)),
        *((weights.b_enc, first.b_enc, second.b_enc), (first.enc, second.enc, first.dec, second.dec)),
        *(adam, weights.enc if basis is None else basis, 0 if basis is None else basis.shape[0]),
        *(tuple(view), squares, bias_parts, d_sae, d_in),
        CONSTRAINT=CONSTRAINTS[update.decoder_norm],
        TIED=update.tied,
        **_variant(objective, tiles),
    )
    grad_b_dec = (2 / entries.error.shape[0]) * entries.error.sum(dim=0)
    if objective.subtract_b_dec:
        grad_b_dec -= bias_parts.sum(dim=0)
    _adam_vector(weights.b_dec, grad_b_dec, first.b_dec, second.b_dec, adam)
    return float((squares.double().sum() + grad_b_dec.double().square().sum()).sqrt())


def _write_gradients(weights: Weights, entries: Entries, objective: Objective, view: View) -> Weights:
    grads = Weights(*(torch.empty_like(tensor) for tensor in weights))
    d_sae, d_in = weights.enc.shape
    launch(
        *(triton_kernels.write_gradients, d_sae, tuple(entries), (weights.enc, weights.dec), view.dec_norms),
        *(_scalars(objective, entries), (grads.enc, grads.b_enc, grads.dec), d_in),
        **_variant(objective, Tiles.of(d_in)),
    )
    torch.sum(entries.error, dim=0, out=grads.b_dec).mul_(2 / entries.error.shape[0])
    if objective.subtract_b_dec:
        grads.b_dec.sub_((grads.b_enc[:, None] * weights.enc).sum(dim=0))
    return grads


def _variant(objective: Objective, tiles: Tiles) -> dict[str, int | bool]:
    return {
        "BY_NORM": objective.l1_by_decoder_norm,
        "PENALISED": bool(objective.encoder_l1 or objective.encoder_l2),
        "WIDTH": tiles.width,
        "DEPTH": tiles.depth,
        "num_warps": tiles.warps,
        "maxnreg": MOST_REGISTERS,
    }


def _scalars(objective: Objective, entries: Entries) -> tuple[float, float, float, float]:
    rows = entries.error.shape[0]
    return 2 / rows, objective.l1_coeff / rows, objective.encoder_l1, objective.encoder_l2


def _adam(update: Update) -> tuple[float, float, float, float, float]:
    beta1, beta2 = update.betas
    step_size = update.learning_rate / (1 - beta1**update.step)
    return step_size, beta1, beta2, (1 - beta2**update.step) ** 0.5, update.epsilon


def _adam_vector(
    values: Tensor, grad: Tensor, first: Tensor, second: Tensor, adam: tuple[float, float, float, float, float]
) -> None:
    """torch.optim.Adam on one small tensor, in place."""
    step_size, beta1, beta2, root, epsilon = adam
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    values.addcdiv_(first, second.sqrt().div_(root).add_(epsilon), value=-step_size)
