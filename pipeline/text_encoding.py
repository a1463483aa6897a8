"""Texts -> token ids, on all cores, in memory that no document's length moves.

Threads encode batches side by side, each by ``encode_batch_fast`` on its own thread, which lets go of Python's lock
while it works; ids become arrays in the same threads. ``tokenizers``' own threads are switched off meanwhile: sharing
out one batch after the other, they wait for the slowest text of each, and idle while ids are converted. Rejected:
processes. They would spare the lock, which a thread holds for less than a tenth of its time, and would cost an import
of the program each and the sending of texts and ids; on two cores they gained 4 % over the threads.

While it encodes, ``tokenizers`` holds many times a text's size, so a long text is encoded in pieces. A piece ends
before a single whitespace character, where the ids of the text around the cut, encoded whole, are those of its two
sides: then the ids of all pieces are those of the whole, for every tokenizer that looks no further than ``_CONTEXT``
characters. If no such place is found (a hundred thousand characters without one), it is cut where it is, and the cut is
counted.
"""

import os
import re
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from pipeline.corpus.documents import Defect, Ids, Row

PIECE_CHARACTERS = 1 << 18
MOST_AHEAD_CHARACTERS = 1 << 22  # half a second of one core: what is encoded while a round is written
_BATCH_CHARACTERS = 1 << 17
_CONTEXT = 256
_CUT = re.compile(r"(?<=\S)(?=\s\S)")
_MOST_CUTS_TRIED = 32
_SWITCH = "TOKENIZERS_PARALLELISM"


class Encoded(NamedTuple):
    """A row with its ids.

    Attributes:
        row: as it was read; a text that was cut into pieces is let go.
        ids: of a text that is not known yet, or of a row of ids; None for anything else.
        inexact_cuts: places where the text was cut though its ids may differ there.
    """

    row: Row
    ids: Ids | None
    inexact_cuts: int


class _Piece(NamedTuple):
    row: Row
    text: str | None
    inexact: bool = False
    last: bool = True


class TextEncoder:
    """Encodes rows of several sources with one pool of threads; a context manager.

    Args:
        tokenizer: whose padding and truncation, if any, are switched off.
        threads: to encode with.
    """

    def __init__(self, tokenizer: Tokenizer, threads: int):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._threads = threads

    def __enter__(self) -> "TextEncoder":
        self._before = os.environ.get(_SWITCH)
        os.environ[_SWITCH] = "false"
        self._pool = ThreadPoolExecutor(self._threads, "tokenize")
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = self._before

    def encode(
        self, rows: Iterable[Row], is_known: Callable[[int], bool], most_ahead: int = MOST_AHEAD_CHARACTERS
    ) -> Iterator[Encoded]:
        """Encodes texts in their order.

        Args:
            rows: with texts, ids or defects.
            is_known: whether a text of this digest need not be encoded; once it is, it stays so.
            most_ahead: how many characters may be read before they are asked for.
        """
        parts: list[Ids] = []
        inexact = 0
        for piece, ids in self._ahead(self._pieces(rows, is_known), most_ahead):
            if piece.text is None:
                yield Encoded(piece.row, _ids_of(piece.row), 0)
                continue
            parts.append(ids)
            inexact += piece.inexact
            if piece.last:
                yield Encoded(piece.row, ids if len(parts) == 1 else np.concatenate(parts), inexact)
                parts, inexact = [], 0

    def _pieces(self, rows: Iterable[Row], is_known: Callable[[int], bool]) -> Iterator[_Piece]:
        for row in rows:
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
        running: deque[tuple[list[_Piece], int, Future[list[Ids]]]] = deque()
        ahead = 0
        for batch, characters in _batches(stream, min(_BATCH_CHARACTERS, most_ahead // 4)):
            running.append((batch, characters, self._pool.submit(self._encode, [piece.text or "" for piece in batch])))
            ahead += characters
            while ahead > most_ahead and running:
                done, characters, ids = running.popleft()
                ahead -= characters
                yield from zip(done, ids.result(), strict=True)
        for done, _, ids in running:
            yield from zip(done, ids.result(), strict=True)

    def _encode(self, texts: list[str]) -> list[Ids]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.frombuffer(array("i", encoding.ids), np.int32) for encoding in encodings]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


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
