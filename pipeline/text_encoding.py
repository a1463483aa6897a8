"""Texts -> token ids, on all cores, in memory that no document's length moves.

Threads encode batches side by side, each by ``encode_batch_fast`` on its own thread, which lets go of Python's lock
while it works; ids become arrays in the same threads. ``tokenizers``' own threads are switched off meanwhile: sharing
out one batch after the other, they wait for the slowest text of each, and idle while ids are converted. Processes, of
this machine or of others, do the same by ``pipeline.text_work``.

While it encodes, ``tokenizers`` holds many times a text's size, so a long text is encoded in pieces. A piece ends
before a single whitespace character, where the ids of the text around the cut, encoded whole, are those of its two
sides: then the ids of all pieces are those of the whole, for every tokenizer that looks no further than ``_CONTEXT``
characters. If no such place is found (a hundred thousand characters without one), it is cut where it is, and the cut is
counted.
"""

import os
import platform
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import tokenizers
from tokenizers import Tokenizer

from pipeline.corpus.documents import Defect, Ids, Row
from storage.fingerprint import Json

PIECE_CHARACTERS = 1 << 18
MOST_AHEAD_CHARACTERS = 1 << 22  # half a second of one core: what is encoded while a round is written
_CHARACTERS_A_CALL = 1 << 17
_BLOCK_IDS = 1 << 23  # 32 MiB, which goes back to the system when let go, as small arrays among others do not
_WORDS_REMEMBERED = 1 << 18
_CONTEXT = 256
_CUT = re.compile(r"(?<=\S)(?=\s\S)")
_MOST_CUTS_TRIED = 32
SWITCH = "TOKENIZERS_PARALLELISM"
"""Of ``tokenizers``' own threads: an environment variable that it reads whenever it is called."""


class Encoded(NamedTuple):
    """A row with its ids.

    Attributes:
        row: as it was read; a text that was cut into pieces is let go.
        ids: of a text that is not known yet, or of a row of ids, in one array or several; None for anything else.
        inexact_cuts: places where the text was cut though its ids may differ there.
    """

    row: Row
    ids: Sequence[Ids] | None
    inexact_cuts: int


class _Piece(NamedTuple):
    row: Row
    text: str | None
    inexact: bool = False
    last: bool = True


@dataclass(frozen=True)
class Texts:
    """A batch of texts to be encoded.

    Attributes:
        number: in its stream.
        texts: none longer than a piece.
        characters: about how much there is to do.
    """

    number: int
    texts: Sequence[str] = field(compare=False, repr=False)
    characters: int = field(compare=False)


class BatchWork(Protocol):
    """Where batches are encoded.

    Attributes:
        batch_characters: size of a batch, which is as many or, by its last text, more.
    """

    batch_characters: int

    @property
    def note(self) -> str:
        """What to say beside the progress."""
        ...

    def in_order(self, batches: Iterable[Texts], most_ahead: int) -> Iterator[list[Ids]]:
        """Ids of each text of each batch.

        Args:
            batches: taken as they are needed.
            most_ahead: how many characters may be taken before their ids are asked for.
        """
        ...


class ThreadWork:
    """Threads of this process, as a :class:`BatchWork`; a context manager.

    Args:
        tokenizer: to encode with.
        threads: how many.
    """

    batch_characters = 1 << 17
    note = ""

    def __init__(self, tokenizer: Tokenizer, threads: int):
        self._tokenizer = prepared(tokenizer)
        self._threads = threads

    def __enter__(self) -> "ThreadWork":
        self._before = os.environ.get(SWITCH)
        os.environ[SWITCH] = "false"
        self._pool = ThreadPoolExecutor(self._threads, "tokenize")
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = self._before

    def in_order(self, batches: Iterable[Texts], most_ahead: int) -> Generator[list[Ids]]:
        """See ``BatchWork``."""
        running: deque[tuple[int, Future[list[Ids]]]] = deque()
        ahead = 0
        for batch in batches:
            running.append((batch.characters, self._pool.submit(encode_texts, self._tokenizer, batch.texts)))
            ahead += batch.characters
            while ahead > most_ahead and running:
                characters, ids = running.popleft()
                ahead -= characters
                yield ids.result()
        while running:
            yield running.popleft()[1].result()


class TextEncoder:
    """Encodes rows of several sources.

    Args:
        tokenizer: whose padding and truncation, if any, are switched off.
        work: where batches are encoded, by a tokenizer like it.
    """

    def __init__(self, tokenizer: Tokenizer, work: BatchWork):
        self._tokenizer = prepared(tokenizer)
        self._work = work

    @property
    def note(self) -> str:
        """What to say beside the progress."""
        return self._work.note

    def encode(
        self, rows: Iterable[Row], is_known: Callable[[int], bool], most_ahead: int = MOST_AHEAD_CHARACTERS
    ) -> Iterator[Encoded]:
        """Encodes texts in their order.

        Args:
            rows: with texts, ids or defects.
            is_known: whether a text of this digest need not be encoded; once it is, it stays so.
            most_ahead: how many characters may be read before they are asked for.
        """
        blocks: list[Ids] = []
        parts: list[Ids] = []
        inexact = 0
        # Row by row, and none is held beside the next: it may be long.
        stream = chain.from_iterable(map(partial(self._pieces, is_known), rows))
        for piece, ids in self._ahead(stream, most_ahead):
            if piece.text is None:
                row_ids = _ids_of(piece.row)
                yield Encoded(piece.row, None if row_ids is None else (row_ids,), 0)
                continue
            parts.append(ids)
            inexact += piece.inexact
            if piece.last or sum(map(len, parts)) > _BLOCK_IDS:
                blocks.append(_joined(parts))
            if piece.last:
                cuts, inexact = inexact, 0
                yield Encoded(piece.row, _taken(blocks), cuts)

    def _pieces(self, is_known: Callable[[int], bool], row: Row) -> Iterator[_Piece]:
        document = row.content
        if isinstance(document, Defect) or not isinstance(document.content, str) or is_known(document.digest):
            yield _Piece(row, None)
        elif len(document.content) <= PIECE_CHARACTERS:
            yield _Piece(row, document.content)
        else:
            light = Row(row.after, replace(document, content=""))
            for text, exact, last in pieces(document.content, self._ids):
                yield _Piece(light, text, not exact, last)

    def _ahead(self, stream: Iterator[_Piece], most_ahead: int) -> Iterator[tuple[_Piece, Ids]]:
        begun: deque[list[_Piece]] = deque()

        def texts() -> Iterator[Texts]:
            size = min(self._work.batch_characters, most_ahead // 4)
            for number, (batch, characters) in enumerate(_batches(stream, size)):
                begun.append(batch)
                yield Texts(number, [piece.text or "" for piece in batch], characters)

        for ids in self._work.in_order(texts(), most_ahead):
            yield from zip(begun.popleft(), ids, strict=True)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """Ids of each text; not too many in a call, as what ``tokenizers`` holds meanwhile is many times their size."""
    ids: list[Ids] = []
    for together in _groups(texts, _CHARACTERS_A_CALL):
        encodings = tokenizer.encode_batch_fast(together, add_special_tokens=False)
        ids += [np.fromiter(encoding.ids, np.int32, len(encoding)) for encoding in encodings]
    return ids


def _groups(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    """The texts in groups of so many characters or, by the last of each, more."""
    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if characters >= size:
            yield group
            group, characters = [], 0
    if group:
        yield group


def prepared(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, which pads and truncates no more, and remembers the ids of more words than it does by itself.

    By itself it keeps the first 10,000 different words that it meets, and works out all others each time.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if resize := getattr(tokenizer.model, "_resize_cache", None):  # BPE and Unigram; the others look words up
        resize(_WORDS_REMEMBERED)
    return tokenizer


def provenance() -> dict[str, Json]:
    """What prompts depend on beside their spec: no arithmetic, so no device and no threads."""
    return {"python": platform.python_version(), "tokenizers": tokenizers.__version__, "pyarrow": pa.__version__}


def pieces(text: str, encode: Callable[[str], list[int]]) -> Iterator[tuple[str, bool, bool]]:
    """Cuts a long text into pieces whose ids, one after the other, are those of the whole.

    Args:
        text: of more than ``PIECE_CHARACTERS``.
        encode: text to ids.

    Yields:
        the piece, whether its end is known to be such a place, and whether it is the last.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = _cut(text, start, encode)
        yield text[start : end or start + PIECE_CHARACTERS], end is not None, False
        start = end or start + PIECE_CHARACTERS
    yield text[start:], True, True


def _cut(text: str, start: int, encode: Callable[[str], list[int]]) -> int | None:
    """The last good place to cut within a piece's second half; None where none is found."""
    first = start + PIECE_CHARACTERS // 2
    places = [first + found.start() for found in _CUT.finditer(text[first : start + PIECE_CHARACTERS])]
    for place in reversed(places[-_MOST_CUTS_TRIED:]):
        before, after = text[max(0, place - _CONTEXT) : place], text[place : place + _CONTEXT]
        if encode(before + after) == encode(before) + encode(after):
            return place
    return None


def _joined(parts: list[Ids]) -> Ids:
    """The parts as one array; the list is emptied."""
    return parts.pop() if len(parts) == 1 else np.concatenate(_taken(parts))


def _taken(arrays: list[Ids]) -> list[Ids]:
    """The arrays; the list is emptied, so that whoever holds it does not hold them."""
    taken = arrays.copy()
    arrays.clear()
    return taken


def _ids_of(row: Row) -> Ids | None:
    return None if isinstance(row.content, Defect) or isinstance(row.content.content, str) else row.content.content


def _batches(stream: Iterator[_Piece], size: int) -> Iterator[tuple[list[_Piece], int]]:
    """Batches of so many characters, or a few more, each with their number; ids count for four of them each."""
    batch: list[_Piece] = []
    characters = 0
    for piece in stream:
        batch.append(piece)
        ids = _ids_of(piece.row)
        characters += 100 + (len(piece.text or "") if ids is None else 4 * len(ids))
        if characters >= size:
            yield batch, characters
            batch, characters = [], 0
    if batch:
        yield batch, characters
