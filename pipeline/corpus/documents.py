"""What every source gives: documents, and defects where a document should have been, each with the place behind it.

A document carries 64 bits of its content's sha256, by which equal ones are told, and the side it falls on. Texts of
files and of the Hub fall on a side by the hash of the text: equal ones on one side, whatever file they stand in.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from storage.errors import InputError

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
HELD_OUT_FRACTION = 0.01

Ids: TypeAlias = npt.NDArray[np.int32]


class Place(NamedTuple):
    """How far a source has been read.

    Attributes:
        file: number of the file that is being read, in the source's order.
        row: rows (lines) of it that have been read.
    """

    file: int
    row: int


START = Place(0, 0)


@dataclass(frozen=True)
class Document:
    """One text, or one row of token ids.

    Attributes:
        name: unique in its source: a module's path, or file and row.
        content: the text as read, never empty; or int32 ids.
        digest: 64 bits of the content's sha256.
        held_out: the side it falls on.
    """

    name: str
    content: str | Ids
    digest: int
    held_out: bool


@dataclass(frozen=True)
class Flaw:
    """Why something read is no document: a kind, what was found, and what was expected."""

    kind: str
    found: object = None
    expected: object = None


@dataclass(frozen=True)
class Defect:
    """A flaw, and the file and the row that have it."""

    where: str
    flaw: Flaw


class Row(NamedTuple):
    """One thing read, and the place behind it, from which reading can go on."""

    after: Place
    content: Document | Defect


class DocumentSource(Protocol):
    """Where documents come from."""

    def identity(self) -> Mapping[str, Any]:
        """Hashes, or pinned names, that name the content."""
        ...

    def rows(self, split: Split, start: Place = START) -> Iterator[Row]:
        """Documents of one side and all defects, behind a place, always in the same order."""
        ...


@dataclass
class BadDocuments:
    """Counts by kind what was skipped; or refuses the first.

    Attributes:
        skip: whether bad documents are skipped.
        counts: skipped documents by kind.
    """

    skip: bool
    counts: dict[str, int] = field(default_factory=dict[str, int])

    def meet(self, defect: Defect) -> None:
        """Counts a bad document, or raises ``InputError`` naming file and row."""
        flaw = defect.flaw
        if not self.skip:
            raise InputError(
                f"bad document: {flaw.kind}", where=defect.where, found=flaw.found, expected=flaw.expected,
                remedy="mend the file, or go on without such documents: --set tokenize.on_bad_document=skip",
            )  # fmt: skip
        self.counts[flaw.kind] = self.counts.get(flaw.kind, 0) + 1


def text_document(name: str, value: Any, held_out: bool | None = None) -> Document | Flaw:
    """A document of a text, or why there is none.

    Args:
        name: of the document.
        value: what stood where a text should: a string, or UTF-8 as bytes.
        held_out: its side; by default the hash of the text chooses.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return Flaw("invalid UTF-8", str(error))
    if not isinstance(value, str):
        return Flaw("null text" if value is None else "text is not a string", repr(value)[:40])
    if not value or value.isspace():
        return Flaw("empty text")
    try:
        digest = hashlib.sha256(value.encode()).digest()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no character
        return Flaw("lone surrogate", f"\\u{ord(value[error.start]):04x} at character {error.start}")
    return Document(name, value, _key(digest), _side(digest) if held_out is None else held_out)


def token_document(name: str, value: Any, d_vocab: int) -> Document | Flaw:
    """A document of token ids, or why there is none.

    Args:
        name: of the document.
        value: what stood where a list of ids should.
        d_vocab: size of the model's vocabulary.
    """
    if value is None:
        return Flaw("null token ids")
    ids = np.asarray(value) if isinstance(value, list | np.ndarray) else np.empty(0)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        return Flaw("not a row of token ids", repr(value)[:40], "a list of integers")
    beyond = np.flatnonzero((ids < 0) | (ids >= d_vocab))
    if len(beyond):
        found = f"{ids[beyond[0]]} at position {beyond[0]}"
        return Flaw("token id outside the vocabulary", found, f"0 to {d_vocab - 1}, the model's")
    ids = ids.astype(np.int32)
    digest = hashlib.sha256(ids.astype("<i4").tobytes()).digest()
    return Document(name, ids, _key(digest), _side(digest))


def is_held_out_text(text: str) -> bool:
    """Whether a document of a file, or of the Hub, is held out: a hundredth of all texts, by their hash."""
    return _side(hashlib.sha256(text.encode()).digest())


def _side(digest: bytes) -> bool:
    return int.from_bytes(digest[:8], "big") < HELD_OUT_FRACTION * 2**64


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[8:16], "big")  # not the bytes that choose the side, which one side has in common
