"""Activations without a disk: the store's batches, computed while training asks for them.

For corpora larger than the disk. A chunk is one model batch: the training prompts of a tokens artifact are permuted
once, as a harvest permutes them, and cut into model batches of fixed composition, so a row has the same bits in every
order, in every epoch and after every resumption. The pools of storage.batches ask for a chunk a refill before its rows
may leave; it is then computed up to the hook, and kept in the harvest's encoding.

This is the published buffer (4096 x 384 rows; half used, half refilled, reshuffled) done right. There a row may stay
for ever, so only a replay of the whole run finds a batch again; here it leaves within three refills (storage.order), so
a resumption computes the chunks that the pools hold then and nothing before them. There the last batch before a refill
is a view of memory that the refill overwrites, so one batch in 192 is 32 whole consecutive prompts, and the rows it
should have had are never trained on; here batches are copies, and each row comes once an epoch.

What mixing that gives. The rows of a prompt enter together and leave over three refills, half a pool of m rows each. So
two rows of a batch share a prompt with chance L / (1.5 m), whatever the model batch and however large the corpus, as in
the published buffer without its bug: N / (1.5 m) times what a uniform shuffle of N rows has; in the first refill and
at the epoch's end L / m. Measured on ids alone with storage.certificate, in batches of 4096, L = 128, m = 1,572,864,
over an epoch of N = 8,388,608 rows:

=====================  =====================  =====================  ====================
..                     same-prompt pairs      over the uniform rate  distinct prompts
                       of a batch             (the certificate)      of a batch
=====================  =====================  =====================  ====================
a uniform shuffle            127                     1                    3,972
this source                  458                     3.61                 3,671
published, bug fixed         484                     3.81                 3,655
published                  1,686                    13.3                  3,638
=====================  =====================  =====================  ====================

At N = 2e9 the certificate of this source is 845, since a uniform shuffle has half a pair a batch; distinct prompts are
3,677 of 4,095. A store is shuffled uniformly at every size: harvest what fits the disk, take this for what does not.

Cost: one forward pass a model batch an epoch, behind the training; the few chunks that do not go round the lanes are
computed by each lane that has a part of them. Memory: 2 to 2.5 m encoded rows, as rows are computed a refill ahead, and
a chunk a lane (the published buffer: m rows). Prompts that do not fill a last model batch are left out.
Rejected: pools of rows, refilled in place (half the memory, at the price of a second kind of pool and order), and
several threads of forward passes (torch has threads of its own, and a model's hooks are not safe to share).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from pipeline.language_model import LanguageModel
from pipeline.tokens import TokenTable
from pipeline.windows import cast_rows
from storage.artifact import Artifact
from storage.batches import ShuffledBatches
from storage.encoding import Encoded, Encoding, Floats, encode, stored_dtype
from storage.errors import InputError, NumericsError
from storage.shuffle import prompt_order

Compute = Callable[[npt.NDArray[np.int32]], torch.Tensor]
"""Prompt numbers (n,) -> the activations of their rows, float32 (n, positions, d_in), on any device."""


@dataclass(frozen=True)
class _Format:
    """Of an array's rows, for ``storage.pool``."""

    dtype: np.dtype[np.generic]
    row_shape: tuple[int, ...] = ()


class PromptChunks:
    """Model batches by their tokens alone, which is all that mixing depends on; a ``storage.pool.ChunkSource``.

    Args:
        n_prompts: training prompts of the tokens artifact.
        model_batch_prompts: prompts a forward pass; fewer, left over at the end, are left out.
        positions: L, rows a prompt.
        first_position: the prompt position of its first row: 1 leaves BOS out, 0 keeps it.
        seed: of the order in which prompts are cut into model batches.

    Raises:
        InputError: the prompts do not fill one model batch.
    """

    def __init__(
        self, *, n_prompts: int, model_batch_prompts: int, positions: int, first_position: int = 1, seed: int = 0
    ):
        n_chunks = n_prompts // model_batch_prompts
        if n_chunks == 0:
            raise InputError(
                "the training prompts do not fill one model batch", found=n_prompts, expected=model_batch_prompts
            )
        order = prompt_order(seed, n_prompts)[: n_chunks * model_batch_prompts]
        self.prompts = order.reshape(n_chunks, model_batch_prompts).astype(np.int32)
        self.positions = positions
        self.first_position = first_position
        self.arrays = {"prompt": _Format(np.dtype("<i4")), "position": _Format(np.dtype("<u2"))}

    def load(self, chunk: int, out: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Writes the tokens of a model batch's rows; see ``storage.pool.ChunkSource``."""
        prompts = self.prompts[chunk]
        if "prompt" in out:
            out["prompt"][:] = np.repeat(prompts, self.positions)
        if "position" in out:
            out["position"][:] = np.tile(np.arange(self.positions) + self.first_position, len(prompts))

    def batches(self) -> ShuffledBatches:
        """Batches of prompt numbers; for certificates, which need no model."""
        return _shuffled(self, self, "float32")


class LiveChunks:
    """Model batches computed when they are asked for; a ``storage.pool.ChunkSource``.

    Args:
        tokens: what is computed.
        compute: one model batch at a time, from whatever thread.
        d_in: width of an activation.
        encoding: as which rows are kept.
    """

    def __init__(self, tokens: PromptChunks, compute: Compute, *, d_in: int, encoding: Encoding):
        self._tokens = tokens
        self._compute = compute
        self._computing = Lock()
        self._encoding: Encoding = encoding
        self._d_in = d_in
        self.arrays = {**tokens.arrays, "activations": _Format(stored_dtype(encoding), (d_in,))}
        if encoding == "uint8":
            self.arrays["scale"] = _Format(np.dtype("<f4"), (2,))

    def load(self, chunk: int, out: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Computes a model batch, if more than its tokens is asked for; see ``storage.pool.ChunkSource``.

        Raises:
            NumericsError: a value is not finite or overflows the encoding; names its prompt and position.
        """
        self._tokens.load(chunk, out)
        if "activations" not in out:
            return
        prompts = self._tokens.prompts[chunk]
        with self._computing:  # several iterators may ask at once
            rows = self._compute(prompts).reshape(-1, self._d_in)
        codes = cast_rows(rows, rows.amin(0), rows.amax(0), self._encoding)
        if codes is not None:
            out["activations"][:] = codes
            return
        encoded = self._encode(prompts, rows.cpu().numpy())
        out["activations"][:] = encoded.codes
        if encoded.scale is not None:
            out["scale"][:] = encoded.scale

    def batches(self) -> ShuffledBatches:
        """What a ``ShardReader`` has for training: ``batches``, ``epoch``, ``prompts``..."""
        return _shuffled(self, self._tokens, self._encoding)

    def _encode(self, prompts: npt.NDArray[np.int32], rows: Floats) -> Encoded:
        try:
            return encode(rows, self._encoding)
        except NumericsError as error:
            row = error.row or 0
            prompt, position = prompts[row // self._tokens.positions], row % self._tokens.positions
            raise NumericsError(
                error.what,
                row=row,
                where=f"prompt {prompt}, position {self._tokens.first_position + position}",
                found=error.found,
                remedy="choose another encoding, or look at what the model computes there",
            ) from error


def live_activations(activations: Artifact, tokens: TokenTable, model: LanguageModel) -> ShuffledBatches:
    """The batches of a harvest that goes on over all training prompts, without a store.

    Args:
        activations: the harvest, which may be of a few windows; names site, encoding, model batch and seed.
        tokens: the harvest's own.
        model: the harvest's own; used in another thread, so share it with nobody.

    Raises:
        InputError: the prompts do not fill one model batch.
    """
    config = cast("dict[str, Any]", activations.config)
    hook_name, first_position = str(config["hook_name"]), 0 if config["include_bos"] else 1

    def compute(prompts: npt.NDArray[np.int32]) -> torch.Tensor:
        return model.activations(tokens.ids("train", prompts), hook_name)[:, first_position:].float()

    chunks = PromptChunks(
        n_prompts=tokens.n_prompts("train"),
        model_batch_prompts=config["model_batch_prompts"],
        positions=tokens.prompt_tokens - first_position,
        first_position=first_position,
        seed=config["seed"],
    )
    d_in = compute(chunks.prompts[0, :1]).shape[-1]
    return LiveChunks(chunks, compute, d_in=d_in, encoding=config["encoding"]).batches()


def _shuffled(source: PromptChunks | LiveChunks, tokens: PromptChunks, encoding: Encoding) -> ShuffledBatches:
    n_chunks, model_batch_prompts = tokens.prompts.shape
    return ShuffledBatches(
        source,
        n_chunks=n_chunks,
        chunk_rows=model_batch_prompts * tokens.positions,
        positions=tokens.positions,
        encoding=encoding,
        threads=1,
    )
