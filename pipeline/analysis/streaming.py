"""Passes of the encoder over rows of the store, in bounded memory.

``encode_rows`` yields feature activations a small block of rows at a time: with 1,024 rows of 2,048 features a block is
8 MiB and stays in cache for the reductions that follow, which then cost a tenth of the matrix product; at 4,096 rows
they cost half of it. Counting runs on ``sign`` and a product with ones, several times faster than a boolean sum.
Rejected: keeping the active entries of a whole pass, which grows with the store.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from pipeline.analysis.context import Integers, RowSource
from sae.autoencoder import Autoencoder

READ_ROWS = 16_384
BLOCK_ROWS = 1_024


class EncodedBlock(NamedTuple):
    """Feature activations of some rows.

    Attributes:
        feature_acts: (b, d_sae), nowhere negative.
        prompt: training prompt of each row, int64 (b,).
        position: position of each row, int64 (b,).
    """

    feature_acts: torch.Tensor
    prompt: Integers
    position: Integers


def encode_rows(
    sae: Autoencoder, reader: RowSource, n_rows: int, *, block_rows: int = BLOCK_ROWS
) -> Iterator[EncodedBlock]:
    """Encodes the first rows of the store, in the order they lie in.

    The store is shuffled over its whole corpus, so a front part is an unbiased sample.

    Args:
        sae: the autoencoder, or a part of its features (``take_features``).
        reader: the store.
        n_rows: rows to encode; fewer where the store has fewer.
        block_rows: rows of a block.
    """
    left = min(n_rows, reader.n_rows)
    for batch in reader.sequential(min(READ_ROWS, max(left, 1))):
        if left <= 0:
            return
        rows = as_tensor(batch.rows)[:left]
        prompt = np.asarray(batch.prompt, np.int64)
        position = np.asarray(batch.position, np.int64)
        left -= len(rows)
        for start in range(0, len(rows), block_rows):
            stop = min(start + block_rows, len(rows))
            with torch.inference_mode():
                feature_acts = sae.encode(rows[start:stop])
            yield EncodedBlock(feature_acts, prompt[start:stop], position[start:stop])


def take_features(sae: Autoencoder, features: Integers) -> Autoencoder:
    """The autoencoder with these features only, in this order; the biases b_dec stay."""
    index = torch.from_numpy(features)
    return Autoencoder(
        sae.W_enc[:, index].contiguous(),
        sae.b_enc[index],
        sae.W_dec[index],
        sae.b_dec,
        subtract_b_dec=sae.subtract_b_dec,
    )


def as_tensor(values: object) -> torch.Tensor:
    """A float32 tensor of rows that come as numpy (read-only or not) or torch."""
    if isinstance(values, torch.Tensor):
        return values.float()
    return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
