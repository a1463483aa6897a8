"""Token ids -> prompts of equal length, without padding: documents laid end to end, or rows of ids cut up.

``Packer`` lays the documents of one source end to end, an EOS id after each, and cuts the stream every
``prompt_tokens - 1`` ids; each piece gets a BOS id in front. (Without BOS it cuts every ``prompt_tokens``; without EOS
one document follows the other at once.) The stream's last, incomplete piece is left out. A prompt belongs to the
document its first text token comes from. ``RowSplitter`` cuts rows that were packed already, a row at a time, and puts
BOS over the first id of each piece, as the post did (rows of 1024 into 8 prompts of 128).

Documents only queue until prompts are taken: a few list operations a document, and one copy an id. Rejected: one
document a prompt (most docstrings are shorter than a prompt, so padding or loss), and cutting per document (drops on
average half a prompt a document).
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Prompts = npt.NDArray[np.int32]
_IDS_AT_ONCE = 1 << 20


class Packed(NamedTuple):
    """Prompts, and where they come from.

    Attributes:
        prompts: int32 (n, prompt_tokens).
        document: int32 (n,), the number of the document that each prompt's first text token comes from.
    """

    prompts: Prompts
    document: npt.NDArray[np.int32]


class Packing(Protocol):
    """Makes prompts of what is added to it."""

    prompt_tokens: int

    @property
    def whole(self) -> int:
        """Prompts that can be taken."""
        ...

    def add(self, number: int, *ids: npt.NDArray[np.int32]) -> None:
        """Adds a document's ids, without BOS or EOS, in one array or several."""
        ...

    def take(self) -> Packed:
        """All whole prompts."""
        ...


@dataclass
class Packer:
    """Packs a stream of documents.

    Attributes:
        prompt_tokens: length of a prompt, BOS included.
        bos_id: id put at position 0 of each prompt, or None.
        eos_id: id put after each document, or None.
        carry: after :meth:`take`, the ids that do not fill a prompt yet: fewer than one holds.
        owner: number of the document that the first of them comes from.
    """

    prompt_tokens: int
    bos_id: int | None
    eos_id: int | None
    carry: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32), init=False)
    owner: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._body = self.prompt_tokens - (self.bos_id is not None)
        self._end = np.array([] if self.eos_id is None else [self.eos_id], np.int32)
        self._restart()

    @property
    def whole(self) -> int:
        """Prompts that can be taken."""
        return self._total // self._body

    def add(self, number: int, *ids: npt.NDArray[np.int32]) -> None:
        """Adds a document's ids, without BOS or EOS, in one array or several."""
        self._pieces += (*ids, self._end)
        self._numbers.append(number)
        self._total += sum(map(len, ids)) + len(self._end)
        self._ends.append(self._total)

    def take(self) -> Packed:
        """All whole prompts; what remains is carried."""
        whole, body = self.whole, self._body
        prompts = np.empty((whole, self.prompt_tokens), np.int32)
        prompts[:, : self.prompt_tokens - body] = 0 if self.bos_id is None else self.bos_id
        text, done, rest = prompts[:, self.prompt_tokens - body :], 0, np.empty(0, np.int32)
        while self._pieces:
            ids = np.concatenate([rest, *self._some_pieces()], dtype=np.int32)
            n = len(ids) // body
            text[done : done + n] = ids[: n * body].reshape(n, body)
            done, rest = done + n, ids[n * body :].copy()
        starts = np.arange(whole + 1) * body
        owners = np.array([*self._numbers, 0], np.int32)[np.searchsorted(self._ends, starts, side="right")]
        self.carry, self.owner = rest, int(owners[-1])
        self._restart()
        return Packed(prompts, owners[:-1])

    def _some_pieces(self) -> Iterator[npt.NDArray[np.int32]]:
        """Pieces that are not packed yet, of a million ids at most; this lets go of them."""
        room = _IDS_AT_ONCE
        while self._pieces and room:
            piece = self._pieces.popleft()
            yield piece[:room]
            if len(piece) > room:
                self._pieces.appendleft(piece[room:])
            room -= min(len(piece), room)

    def resume(self, carry: npt.NDArray[np.int32], owner: int) -> None:
        """Goes on from what another one carried."""
        self.carry, self.owner = carry, owner
        self._restart()

    def _restart(self) -> None:
        self._pieces = deque([self.carry])
        self._numbers, self._ends, self._total = [self.owner], [len(self.carry)], len(self.carry)


@dataclass
class RowSplitter:
    """Cuts rows of ids; what is left of a row is left out.

    Attributes:
        prompt_tokens: length of a prompt.
        bos_id: id written over position 0 of each prompt, or None.
    """

    prompt_tokens: int
    bos_id: int | None

    def __post_init__(self) -> None:
        self._pieces: list[Packed] = []
        self.whole = 0

    def add(self, number: int, *ids: npt.NDArray[np.int32]) -> None:
        """Adds a row, of one array."""
        (row,) = ids
        n = len(row) // self.prompt_tokens
        prompts = row[: n * self.prompt_tokens].reshape(n, self.prompt_tokens)
        self._pieces.append(Packed(prompts, np.full(n, number, np.int32)))
        self.whole += n

    def take(self) -> Packed:
        """All prompts."""
        empty = Packed(np.empty((0, self.prompt_tokens), np.int32), np.empty(0, np.int32))
        prompts, document = (np.concatenate(column) for column in zip(empty, *self._pieces, strict=True))
        if self.bos_id is not None:
            prompts[:, 0] = self.bos_id
        self._pieces, self.whole = [], 0
        return Packed(prompts, document)


def pack_documents(
    documents: Iterable[tuple[int, npt.NDArray[np.int32]]], *, prompt_tokens: int, bos_id: int, eos_id: int
) -> Iterator[Packed]:
    """Packs a stream of documents into prompts, a block at a time, in memory bounded by the longest document.

    Args:
        documents: (document number, token ids) in order; ids without BOS or EOS.
        prompt_tokens: length of a prompt, BOS included.
        bos_id: id put at position 0 of each prompt.
        eos_id: id put after each document.
    """
    packer = Packer(prompt_tokens, bos_id, eos_id)
    for number, ids in documents:
        packer.add(number, ids)
        if packer.whole:
            yield packer.take()


def interleave(blocks: Iterable[Packed]) -> tuple[Packed, npt.NDArray[np.int16]]:
    """Mixes blocks of prompts evenly: any stretch of the result holds about the same shares of each.

    Args:
        blocks: of the sources, in order.

    Returns:
        the prompts, and int16 (n,) the number of each one's block.
    """
    whole = list(blocks)
    sizes = [len(block.document) for block in whole]
    if len(whole) == 1:
        return whole[0], np.zeros(sizes[0], np.int16)
    keys = np.concatenate([(np.arange(size) + 0.5) / max(size, 1) for size in sizes])
    order = np.argsort(keys, kind="stable")
    places = np.split(np.argsort(order), np.cumsum(sizes)[:-1])  # of each block's prompts in the mixture
    prompts = np.empty((len(order), whole[0].prompts.shape[1]), np.int32)
    for block, place in zip(whole, places, strict=True):
        prompts[place] = block.prompts  # straight away: a round may hold a long document
    document = np.concatenate([block.document for block in whole])[order]
    return Packed(prompts, document), np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)[order]
