"""An exact sparse step on the CPU: dense autograd's gradients from active entries alone.

Forward, in blocks of rows: a screen says which features may be active (``screen``), a float32 dot product decides,
active features are decoded, and each row's error is kept. Then active entries are regrouped by feature. Backward, in
blocks of features: one pass makes each feature's gradient rows, projects them, applies Adam and the constraints while
they are in cache; gradient matrices are written only for clipping. With k active entries a row this costs one bfloat16
product and about 5 k d_in multiply-adds a row, instead of six float32 products of d_in d_sae.

Blocks are of fixed size and write only what is theirs, so the result depends neither on threads nor on their
scheduling. Rejected: accumulating gradients row by row with atomics (order, hence result, would depend on scheduling);
row-major gathers for the gradients of W_dec (every gradient row would pass through memory once an entry).
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import losses
from ..config import DecoderNorm
from . import compiled
from .interface import Forward, Moments, Objective, Stepped, Update, Weights
from .screen import ROW_BLOCK, EncoderView, Screen, bfloat16_is_faster
from .update import stepped
from .workers import Workers

FEATURE_BLOCK: Final = 64
"""Features of a backward block: enough blocks to keep threads busy, few enough calls."""

CONSTRAINTS: Final[dict[DecoderNorm, int]] = {
    "fixed": compiled.FIXED,
    "as-published": compiled.AS_PUBLISHED,
    "renormalise-before": compiled.RENORMALISE_BEFORE,
    "free": compiled.FREE,
}

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class _View:
    """What is kept about the weights from step to step."""

    encoder: EncoderView
    dec_norms: F32


@dataclass(frozen=True)
class _Block:
    """Active entries of a block of rows, row by row."""

    found: NDArray[np.int32]
    values: F32
    pointer: NDArray[np.int64]


@dataclass(frozen=True)
class _Entries:
    """Active entries of a batch, feature by feature, and the rows that the backward pass reads with them.

    Attributes:
        column: (d_sae + 1,) bounds of each feature's entries.
        tokens: (nnz,) row numbers, ascending within a feature.
        acts: (nnz,) activations.
        error: (B, d_in) reconstruction minus row.
        sae_in: (B, d_in) encoder inputs.
        error_total: (d_in,) sum of errors over the batch.
    """

    column: NDArray[np.int64]
    tokens: NDArray[np.int32]
    acts: F32
    error: F32
    sae_in: F32
    error_total: F32


class SparseEngine:
    """The sparse step; owns threads, buffers and a view of the weights."""

    def __init__(self, *, threads: int, bfloat16: bool | None = None) -> None:
        """Starts worker threads.

        Args:
            threads: at least 1.
            bfloat16: screen with bfloat16 products; None: where they prove faster. Results do not depend on it.
        """
        self._workers = Workers(threads)
        self._bfloat16 = bfloat16
        self._view: _View | None = None
        self._screens: list[Screen] = []
        self._rows = np.empty((2, 0, 0), np.float32)

    def invalidate(self) -> None:
        """Forgets what is known of the weights, because something else changed them."""
        self._view = None

    def gradients(self, weights: Weights, rows: Tensor, objective: Objective) -> tuple[Weights, Forward]:
        """Gradients of the objective, unprojected: the variant that writes them out."""
        self.invalidate()
        view = self._current_view(weights)
        entries, forward = self._forward(weights, rows, objective, view)
        grads = self._write_gradients(weights, entries, objective, view)
        self.invalidate()  # the caller is about to change the weights
        return grads, forward

    def step(self, weights: Weights, moments: Moments, rows: Tensor, objective: Objective, update: Update) -> Stepped:
        """Takes one step in place, or none where the loss is not finite."""
        view = self._current_view(weights)
        entries, forward = self._forward(weights, rows, objective, view)
        loss = losses.batch_loss(forward, objective, weights.enc)
        if not math.isfinite(loss):
            return Stepped(forward, loss, math.nan, torch.from_numpy(view.dec_norms.copy()))
        if update.clip_norm is None:
            grad_norm = self._fused(weights, moments, entries, objective, update, view)
            return Stepped(forward, loss, grad_norm, torch.from_numpy(view.dec_norms.copy()))
        grads = self._write_gradients(weights, entries, objective, view)
        self.invalidate()
        return stepped(weights, moments, grads, forward, objective, update)

    def _current_view(self, weights: Weights) -> _View:
        """The view that the last step left, or a new one; buffers are of one shape of weights."""
        shape = weights.enc.shape
        if self._view is None or self._view.encoder.rounded.shape != shape:
            self._screens = [screen for screen in self._screens if screen.shape == shape]
            self._view = self._look_at(weights)
        return self._view

    def _look_at(self, weights: Weights) -> _View:
        d_sae, d_in = weights.enc.shape
        encoder, dec_norms = EncoderView.empty(d_sae, d_in), np.empty(d_sae, np.float32)
        enc, dec = weights.enc.numpy(), weights.dec.numpy()

        def look(block: int) -> None:
            part = _features(block, d_sae)
            compiled.screen_rows(*part, enc, encoder.rounded, encoder.norms)
            compiled.row_norms(*part, dec, dec_norms)

        self._workers.run(-(-d_sae // FEATURE_BLOCK), look)
        return _View(encoder, dec_norms)

    def _forward(self, weights: Weights, rows: Tensor, objective: Objective, view: _View) -> tuple[_Entries, Forward]:
        enc, b_enc, dec, b_dec = _arrays(weights)
        x, mean = rows.numpy(), objective.mean.numpy()
        (count, d_in), d_sae = x.shape, enc.shape[0]
        centre = b_dec if objective.subtract_b_dec else np.zeros_like(b_dec)
        l1_weight = view.dec_norms if objective.l1_by_decoder_norm else np.ones(d_sae, np.float32)
        sae_in, error = self._row_buffers(count, d_in)
        sums, deviation = np.empty((count, 3), np.float32), np.empty(count, np.float32)
        n_blocks = -(-count // ROW_BLOCK)
        fired, error_totals = np.zeros((n_blocks, d_sae), np.int32), np.empty((n_blocks, d_in), np.float32)
        blocks: dict[int, _Block] = {}

        def forward(block: int) -> None:
            part = slice(block * ROW_BLOCK, (block + 1) * ROW_BLOCK)
            compiled.centre_rows(x[part], centre, mean, sae_in[part], deviation[part])
            screen = self._take_screen(d_in, d_sae)
            screen.candidates(sae_in[part], enc, b_enc, view.encoder)
            pointer = screen.pointer[: x[part].shape[0] + 1].copy()
            values = np.empty(pointer[-1], np.float32)
            compiled.activate(
                *(x[part], sae_in[part], enc, b_enc, dec, b_dec, l1_weight, screen.found, pointer, values),
                *(error[part], sums[part], fired[block], error_totals[block]),
            )
            blocks[block] = _Block(screen.found[: pointer[-1]].copy(), values[: pointer[-1]], pointer)
            self._screens.append(screen)

        self._bfloat16 = bfloat16_is_faster(d_in, d_sae) if self._bfloat16 is None else self._bfloat16
        self._workers.run(n_blocks, forward)
        column, tokens, acts = self._by_feature([blocks[block] for block in range(n_blocks)], fired)
        entries = _Entries(column, tokens, acts, error, sae_in, error_totals.sum(axis=0))
        measured = (torch.from_numpy(array) for array in (*sums.T, deviation, np.diff(column)))
        return entries, Forward(*measured)

    def _by_feature(
        self, blocks: list[_Block], fired: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], F32]:
        """Regroups entries by feature; each block's places are known from the counts, so blocks never meet."""
        column = np.zeros(fired.shape[1] + 1, np.int64)
        np.cumsum(fired.sum(axis=0, dtype=np.int64), out=column[1:])
        cursor = column[:-1] + np.cumsum(fired, axis=0, dtype=np.int64) - fired
        tokens, acts = np.empty(column[-1], np.int32), np.empty(column[-1], np.float32)

        def scatter(number: int) -> None:
            block = blocks[number]
            compiled.scatter(block.found, block.values, block.pointer, number * ROW_BLOCK, cursor[number], tokens, acts)

        self._workers.run(len(blocks), scatter)
        return column, tokens, acts

    def _fused(
        self, weights: Weights, moments: Moments, entries: _Entries, objective: Objective, update: Update, view: _View
    ) -> float:
        """Makes gradients and moves the weights in one pass; returns the global norm of the projected gradient."""
        enc, b_enc, dec, b_dec = _arrays(weights)
        (enc1, b_enc1, dec1, b_dec1), (enc2, b_enc2, dec2, b_dec2) = (_arrays(moment) for moment in moments)
        d_sae, d_in = enc.shape
        n_blocks = -(-d_sae // FEATURE_BLOCK)
        squares, bias_parts = np.empty(d_sae, np.float64), np.empty((n_blocks, d_in), np.float32)
        data, scalars, adam = _data(entries, view), _scalars(objective, entries), _adam(update)
        basis = np.empty((0, d_in), np.float32) if update.encoder_basis is None else update.encoder_basis.numpy()
        kept = (view.encoder.rounded, view.encoder.norms, view.dec_norms)

        def backward(block: int) -> None:
            compiled.step_features(
                *_features(block, d_sae),
                *(data, (enc, dec), scalars, (b_enc, b_enc1, b_enc2), (enc1, enc2, dec1, dec2)),
                *(adam, CONSTRAINTS[update.decoder_norm], update.tied, basis, kept, squares, bias_parts[block]),
            )

        self._workers.run(n_blocks, backward)
        grad_b_dec = scalars[0] * entries.error_total
        if objective.subtract_b_dec:
            grad_b_dec -= bias_parts.sum(axis=0)
        compiled.adam_row(b_dec, grad_b_dec, b_dec1, b_dec2, adam)
        return float(np.sqrt(squares.sum() + np.square(grad_b_dec, dtype=np.float64).sum()))

    def _write_gradients(self, weights: Weights, entries: _Entries, objective: Objective, view: _View) -> Weights:
        enc, b_enc, dec, _ = _arrays(weights)
        grad_enc, grad_b_enc, grad_dec = np.empty_like(enc), np.empty_like(b_enc), np.empty_like(dec)
        data, scalars = _data(entries, view), _scalars(objective, entries)

        def backward(block: int) -> None:
            part = _features(block, enc.shape[0])
            compiled.write_gradients(*part, data, (enc, dec), scalars, grad_enc, grad_b_enc, grad_dec)

        self._workers.run(-(-enc.shape[0] // FEATURE_BLOCK), backward)
        grad_b_dec = scalars[0] * entries.error_total
        if objective.subtract_b_dec:
            grad_b_dec -= grad_b_enc @ enc
        return Weights(*(torch.from_numpy(grad) for grad in (grad_enc, grad_b_enc, grad_dec, grad_b_dec)))

    def _row_buffers(self, count: int, d_in: int) -> tuple[F32, F32]:
        """Room for encoder inputs and errors, kept from step to step: fresh pages would cost more than the writing."""
        if self._rows.shape[1] < count or self._rows.shape[2] != d_in:
            self._rows = np.empty((2, count, d_in), np.float32)
        return self._rows[0, :count], self._rows[1, :count]

    def _take_screen(self, d_in: int, d_sae: int) -> Screen:
        try:
            return self._screens.pop()
        except IndexError:
            return Screen(d_in, d_sae, bfloat16=bool(self._bfloat16))


def _features(block: int, d_sae: int) -> tuple[int, int]:
    return block * FEATURE_BLOCK, min(d_sae, (block + 1) * FEATURE_BLOCK)


def _arrays(weights: Weights) -> tuple[F32, F32, F32, F32]:
    enc, b_enc, dec, b_dec = (tensor.numpy() for tensor in weights)
    return enc, b_enc, dec, b_dec


def _data(entries: _Entries, view: _View) -> tuple[NDArray[np.generic], ...]:
    return entries.column, entries.tokens, entries.acts, entries.error, entries.sae_in, view.dec_norms


def _scalars(objective: Objective, entries: _Entries) -> tuple[np.float32, np.float32, bool, np.float32, np.float32]:
    rows = entries.error.shape[0]
    return (
        np.float32(2 / rows),
        np.float32(objective.l1_coeff / rows),
        objective.l1_by_decoder_norm,
        np.float32(objective.encoder_l1),
        np.float32(objective.encoder_l2),
    )


def _adam(update: Update) -> tuple[np.float32, ...]:
    beta1, beta2 = update.betas
    step_size = update.learning_rate / (1 - beta1**update.step)
    root = (1 - beta2**update.step) ** 0.5
    return tuple(np.float32(value) for value in (step_size, beta1, beta2, root, update.epsilon))
