"""Documents' token ids -> prompts of equal length, without padding.

The documents of one source are laid end to end, an EOS id after each, and the stream is cut every
``prompt_tokens - 1`` ids; each piece gets a BOS id in front. The stream's last, incomplete piece is left out. A prompt
belongs to the document its first text token comes from. Rejected: one document a prompt (most docstrings are shorter
than a prompt, so padding or loss), and cutting per document (drops on average half a prompt a document).
"""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt


def pack_documents(
    documents: Iterable[tuple[int, npt.NDArray[np.int32]]], *, prompt_tokens: int, bos_id: int, eos_id: int
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]:
    """Packs a stream of documents into prompts, a block at a time, in memory bounded by the longest document.

    Args:
        documents: (document number, token ids) in order; ids without BOS or EOS.
        prompt_tokens: length of a prompt, BOS included.
        bos_id: id put at position 0 of each prompt.
        eos_id: id put after each document.

    Yields:
        ``(prompts, document)``: ``prompts`` int32 (n, prompt_tokens); ``document`` int32 (n,), the number of the
        document that each prompt's position 1 comes from.
    """
    body = prompt_tokens - 1
    ids = np.empty(0, np.int32)
    owner = np.empty(0, np.int32)
    for number, document_ids in documents:
        ids = np.concatenate([ids, document_ids.astype(np.int32), np.array([eos_id], np.int32)])
        owner = np.concatenate([owner, np.full(len(document_ids) + 1, number, np.int32)])
        whole = len(ids) // body
        if whole:
            prompts = np.empty((whole, prompt_tokens), np.int32)
            prompts[:, 0] = bos_id
            prompts[:, 1:] = ids[: whole * body].reshape(whole, body)
            yield prompts, owner[: whole * body : body].copy()
            ids, owner = ids[whole * body :], owner[whole * body :]
