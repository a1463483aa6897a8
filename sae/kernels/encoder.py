"""Encoding many rows with one autoencoder: the active features alone, exact, at the cost of a bfloat16 product.

The same screen and the same float32 decision as the training step's (``screen``, ``compiled``), so what is active is
what an encoder in float32 finds, up to the rounding of its sums; ``Autoencoder.encode`` is the plain reference.
Results do not depend on the number of threads. Cost: one product of B d_in d_sae in bfloat16 where that is fast, in
float32 elsewhere, and about 1.5 L0 dot products a row. Rejected: a dense product and ``nonzero`` (three times as slow,
and a dense block of activations a batch).
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..autoencoder import Autoencoder
from . import compiled
from .screen import ROW_BLOCK, EncoderView, Screen, bfloat16_is_faster
from .workers import Workers

FEATURE_BLOCK = 256
F32 = NDArray[np.float32]


class ActiveFeatures(NamedTuple):
    """Feature activations of B rows in compressed rows; row t's lie at pointer[t]:pointer[t + 1], features ascending.

    Attributes:
        pointer: int64 (B + 1,).
        feature: int32 (n,).
        activation: float32 (n,), above zero.
    """

    pointer: NDArray[np.int64]
    feature: NDArray[np.int32]
    activation: F32


class SparseEncoder:
    """One autoencoder's encoder, ready for batch after batch; owns threads and buffers."""

    def __init__(self, sae: Autoencoder, *, threads: int, bfloat16: bool | None = None) -> None:
        """Copies the encoder, one contiguous row a feature, and starts worker threads.

        Args:
            sae: the autoencoder, float32 on the CPU.
            threads: at least 1. Does not change results.
            bfloat16: screen with bfloat16 products; None: where they prove faster. Does not change results.
        """
        self._enc: F32 = np.ascontiguousarray(sae.W_enc.detach().float().numpy().T)
        self._b_enc: F32 = np.ascontiguousarray(sae.b_enc.detach().float().numpy())
        self._centre = sae.b_dec.detach().float() if sae.subtract_b_dec else torch.zeros(sae.d_in)
        self._bfloat16 = bfloat16_is_faster(sae.d_in, sae.d_sae) if bfloat16 is None else bfloat16
        self._workers = Workers(threads)
        self._view = EncoderView.empty(sae.d_sae, sae.d_in)
        self._screens: list[Screen] = []

        def look(block: int) -> None:
            part = block * FEATURE_BLOCK, min(sae.d_sae, (block + 1) * FEATURE_BLOCK)
            compiled.screen_rows(*part, self._enc, self._view.rounded, self._view.norms)

        self._workers.run(-(-sae.d_sae // FEATURE_BLOCK), look)

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self._enc.shape[0]

    def encode(self, rows: F32) -> ActiveFeatures:
        """Encodes rows.

        Args:
            rows: float32 (B, d_in) activations, B at least 1.
        """
        n_blocks = -(-len(rows) // ROW_BLOCK)
        blocks: dict[int, ActiveFeatures] = {}

        def encode_block(block: int) -> None:
            part = torch.from_numpy(rows[block * ROW_BLOCK : (block + 1) * ROW_BLOCK])
            blocks[block] = self._encode_block((part - self._centre).numpy())

        self._workers.run(n_blocks, encode_block)
        return _joined([blocks[block] for block in range(n_blocks)])

    def _encode_block(self, sae_in: F32) -> ActiveFeatures:
        d_sae, d_in = self._enc.shape
        screen = self._screens.pop() if self._screens else Screen(d_in, d_sae, bfloat16=self._bfloat16)
        screen.candidates(sae_in, self._enc, self._b_enc, self._view)
        pointer = screen.pointer[: len(sae_in) + 1].copy()
        values = np.empty(pointer[-1], np.float32)
        compiled.encode(sae_in, self._enc, self._b_enc, screen.found, pointer, values)
        active = ActiveFeatures(pointer, screen.found[: pointer[-1]].copy(), values[: pointer[-1]])
        self._screens.append(screen)
        return active


def _joined(blocks: list[ActiveFeatures]) -> ActiveFeatures:
    starts = np.cumsum([0, *(block.pointer[-1] for block in blocks)])
    pointers = [block.pointer[1:] + start for block, start in zip(blocks, starts[:-1], strict=True)]
    return ActiveFeatures(
        np.concatenate([np.zeros(1, np.int64), *pointers]),
        np.concatenate([block.feature for block in blocks]),
        np.concatenate([block.activation for block in blocks]),
    )
