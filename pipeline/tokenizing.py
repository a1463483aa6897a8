"""The work of the tokenize stage: rounds of prompts, mixed by token share, from which a killed run goes on.

A *round* makes some 65,536 prompts and is a unit of the staging journal. In it each source reads on until its prompts
so far are its share of all prompts so far; the round's prompts are then interleaved evenly, so that any stretch of the
artifact holds the mixture. Documents are always finished within a round: a round may be a document larger, the next one
evens it out, and what a source carries over is less than a prompt. What a round leaves (each source's place, its carry,
its counts) stands in its journal line, the digests of the documents met in its table of documents; a resumed run reads
those, passes over rows that were read, and does what the killed one would have done.

A document counts as a duplicate if an equal one was *taken* before, in the order of rounds and sources, so what threads
read ahead of that order changes nothing. Digests are 64 bits: that a corpus of 6 million documents loses one by mistake
has a chance of one in a million. They take 8 bytes of memory a document. Rejected: 128 bits in a set (100 bytes).
"""

import io
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Source, TokenizeConfig
from pipeline.corpus.documents import (
    HELD_OUT_FRACTION,
    SPLITS,
    START,
    BadDocuments,
    Defect,
    DocumentSource,
    Place,
    Row,
    Split,
)
from pipeline.packing import Packed, Packer, Packing, RowSplitter, interleave
from pipeline.text_encoding import MOST_AHEAD_CHARACTERS, Encoded, TextEncoder
from pipeline.workspace import Workspace
from storage import atomic
from storage.artifacts import Staging
from storage.errors import InputError

PROMPTS_PER_ROUND = 65_536
_PROMPTS_PER_REPORT = 1024
_CHARACTERS_PER_TOKEN = 4  # about: only bounds what is read ahead
_MOST_RECENT_DIGESTS = 65_536
_DOCUMENTS = pa.schema(
    {
        "number": pa.int32(),
        "split": pa.string(),
        "source": pa.string(),
        "name": pa.string(),
        "tokens": pa.int64(),
        "digest": pa.uint64(),
    }
)


@dataclass
class Tally:
    """What one source gave to one split."""

    documents: int = 0
    duplicates: int = 0
    prompts: int = 0
    inexact_cuts: int = 0


class SeenDigests:
    """A set of 64-bit numbers in 8 bytes each: sorted, behind a small set that is merged into it when full."""

    def __init__(self) -> None:
        self._sorted = array("Q")
        self._recent: set[int] = set()

    def __contains__(self, digest: int) -> bool:
        if digest in self._recent:
            return True
        place = bisect_left(self._sorted, digest)
        return place < len(self._sorted) and self._sorted[place] == digest

    def add(self, digest: int) -> None:
        """Adds a number that is not in it."""
        self._recent.add(digest)
        if len(self._recent) >= _MOST_RECENT_DIGESTS:
            self.extend(np.fromiter(self._recent, np.uint64))
            self._recent = set()

    def extend(self, digests: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
        """Adds numbers none of which is in it; in place, as they may be hundreds of millions."""
        self._sorted.frombytes(digests.tobytes())
        np.frombuffer(self._sorted, np.uint64).sort()


class Ledger:
    """The documents taken, by all sources and on both sides.

    Attributes:
        bad: counts defects.
        count: documents taken.
    """

    def __init__(self, bad: BadDocuments):
        self.bad = bad
        self.count = 0
        self.seen = SeenDigests()
        self._new = _no_documents()

    def take(self, split: Split, source: str, name: str, tokens: int, digest: int) -> int:
        """Enters a document and gives its number."""
        number = self.count
        for column, value in zip(self._new, (number, split, source, name, tokens, digest), strict=True):
            column.append(value)
        self.seen.add(digest)
        self.count += 1
        return number

    def write(self, staging: Staging, file: str) -> None:
        """Writes the documents entered since the last time as Parquet."""
        arrays = [pa.array(column, kind.type) for column, kind in zip(self._new, _DOCUMENTS, strict=True)]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_arrays(arrays, schema=_DOCUMENTS), sink)
        staging.write_bytes(file, sink.getvalue().to_pybytes())
        self._new = _no_documents()

    def read(self, staging: Staging, file: str) -> None:
        """Takes over the documents that a round wrote."""
        digests = pq.read_table(staging.path(file), columns=["digest"])["digest"].to_numpy()
        self.seen.extend(digests)
        self.count += len(digests)


def _no_documents() -> list[list[int | str]]:
    return [[] for _ in _DOCUMENTS]  # columns: a tuple a document is one more object a document for the collector


class SourceStream:
    """One source on one side: reads documents until it has made the prompts asked for.

    Attributes:
        budget: prompts that it may make in all.
        tally: what it gave so far.
        is_dry: whether it has no documents left.
    """

    def __init__(
        self, name: str, split: Split, budget: int, source: DocumentSource, packing: Packing, encoder: TextEncoder,
        ledger: Ledger,
    ):  # fmt: skip
        self.name, self.budget = name, budget
        self.tally = Tally()
        self.is_dry = False
        self._split: Split = split
        self._source, self._packing, self._ledger = source, packing, ledger
        self._encoder = encoder
        self._at = START
        self._encoded: Iterator[Encoded] | None = None

    def fill(self, prompts: int, advance: Callable[[int], None]) -> Packed:
        """Reads whole documents until the prompts made are so many, or the source is dry; gives the new ones."""
        wanted = min(prompts, self.budget) - self.tally.prompts
        reported = 0
        while self._packing.whole < wanted and self._meet(next(self._stream(), None)):
            if self._packing.whole - reported >= _PROMPTS_PER_REPORT:
                advance(min(self._packing.whole, wanted) - reported)
                reported = self._packing.whole
        self.is_dry = self._packing.whole < wanted
        packed = self._packing.take()
        kept = min(len(packed.document), self.budget - self.tally.prompts)
        advance(max(kept - reported, 0))
        self.tally.prompts += kept
        return Packed(packed.prompts[:kept], packed.document[:kept])

    def state(self) -> dict[str, Any]:
        """From which :meth:`restore` goes on, as JSON."""
        state: dict[str, Any] = {"at": list(self._at), "is_dry": self.is_dry, "tally": asdict(self.tally)}
        if isinstance(self._packing, Packer):
            state |= {"carry": self._packing.carry.tolist(), "owner": self._packing.owner}
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where a round ended."""
        self._at, self.is_dry, self.tally = Place(*state["at"]), state["is_dry"], Tally(**state["tally"])
        if isinstance(self._packing, Packer):
            self._packing.resume(np.array(state["carry"], np.int32), state["owner"])

    def _stream(self) -> Iterator[Encoded]:
        if self._encoded is None:
            rows: Iterator[Row] = self._source.rows(self._split, self._at)
            ahead = min(MOST_AHEAD_CHARACTERS, self.budget * self._packing.prompt_tokens * _CHARACTERS_PER_TOKEN)
            self._encoded = self._encoder.encode(rows, self._ledger.seen.__contains__, ahead)
        return self._encoded

    def _meet(self, encoded: Encoded | None) -> bool:
        """Takes in what was read, which no caller holds, as it may be long; whether there was anything."""
        if encoded is None:
            return False
        self._at, content = encoded.row
        if isinstance(content, Defect):
            if self._split == "train" or not self._ledger.bad.skip:  # the same rows: not counted twice
                self._ledger.bad.meet(content)
        elif encoded.ids is None or content.digest in self._ledger.seen:
            self.tally.duplicates += 1
        else:
            n_ids = sum(map(len, encoded.ids))
            number = self._ledger.take(self._split, self.name, content.name, n_ids, content.digest)
            self._packing.add(number, *encoded.ids)
            self.tally.documents += 1
            self.tally.inexact_cuts += encoded.inexact_cuts
        return True


@dataclass
class Tokenizing:
    """One run of the stage.

    Attributes:
        config: the stage's.
        sources: by name.
        encoder: texts to ids, entered already.
        bos_id: put at position 0, or None.
        eos_id: put after each document, or None.
        workspace: whose progress is shown.
        staging: what is written to.
    """

    config: TokenizeConfig
    sources: Mapping[str, DocumentSource]
    encoder: TextEncoder
    bos_id: int | None
    eos_id: int | None
    workspace: Workspace
    staging: Staging
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(BadDocuments(skip=self.config.on_bad_document == "skip"))

    def run(self) -> dict[str, Any]:
        """Writes both splits; training first, so that a text on both sides stays out of the held-out one."""
        self._drop_rounds_behind_a_gap()
        stats = {split: _summary(self._write_split(split), self.config.prompt_tokens) for split in SPLITS}
        return stats | {"bad_documents": self.ledger.bad.counts}

    def _write_split(self, split: Split) -> list[SourceStream]:
        length = self.config.prompt_tokens
        wanted = self.config.train_tokens if split == "train" else self.config.held_out_tokens
        streams = [
            self._stream(source, split, round(wanted * source.share) // length) for source in self.config.sources
        ]
        total = sum(stream.budget for stream in streams)
        first = self._resume(split, streams)
        done = sum(stream.tally.prompts for stream in streams)
        with self.workspace.reporter.track(f"tokenize {split}", wanted, "tokens", start=done * length) as advance:
            for number in range(first, -(-total // PROMPTS_PER_ROUND)):
                if all(stream.is_dry for stream in streams):
                    break
                end = min((number + 1) * PROMPTS_PER_ROUND, total)
                blocks = [
                    stream.fill(
                        stream.budget * end // total, lambda prompts: advance(prompts * length, note=self.encoder.note)
                    )
                    for stream in streams
                ]
                self._finish_round(split, number, blocks, streams)
        if not any(stream.tally.prompts for stream in streams):
            raise InputError(
                f"the sources hold no usable tokens for the {split} side",
                found=f"{sum(stream.tally.documents for stream in streams)} documents",
                expected=f"text for at least one prompt of {length} tokens",
                remedy=f"give more documents: {HELD_OUT_FRACTION:.0%} of them, by the hash of their text, is held out",
            )
        return streams

    def _stream(self, source: Source, split: Split, budget: int) -> SourceStream:
        length = self.config.prompt_tokens
        packing = (
            RowSplitter(length, self.bos_id) if source.kind == "tokenized" else Packer(length, self.bos_id, self.eos_id)
        )
        return SourceStream(
            source.name, split, budget, self.sources[source.name], packing, self.encoder, self.ledger
        )  # fmt: skip

    def _finish_round(
        self, split: Split, number: int, blocks: Sequence[Packed], streams: Sequence[SourceStream]
    ) -> None:
        (prompts, document), source = interleave(blocks)
        files = [f"documents-{_round_name(split, number)}.parquet"]
        self.ledger.write(self.staging, files[0])
        if len(prompts):
            files.append(f"{_round_name(split, number)}.arrow")
            atomic.write_file(self.staging.path(files[1]), _arrow(prompts, source, document))
        finished = list(self.staging.finished)
        state = {
            "after": finished[-1] if finished else "",
            "sources": {stream.name: stream.state() for stream in streams},
            "bad": self.ledger.bad.counts,
        }
        self.staging.finish(_round_name(split, number), files, cast("Any", state))

    def _drop_rounds_behind_a_gap(self) -> None:
        """A round whose files were damaged is no longer finished; those behind it are then made again too."""
        last = ""
        for name, state in list(self.staging.finished.items()):
            if state["after"] == last:
                last = name
            else:
                self.staging.discard(f"documents-{name}.parquet")

    def _resume(self, split: Split, streams: Sequence[SourceStream]) -> int:
        """Takes over the rounds that were finished; the number of the next one."""
        number = 0
        while (state := self.staging.finished.get(_round_name(split, number))) is not None:
            self.ledger.read(self.staging, f"documents-{_round_name(split, number)}.parquet")
            self.ledger.bad.counts = dict(cast("Any", state)["bad"])
            for stream in streams:
                stream.restore(cast("Any", state)["sources"][stream.name])
            number += 1
        return number


def _round_name(split: Split, number: int) -> str:
    return f"{split}-{number:05d}"


class _Gathered(io.RawIOBase):
    """Keeps what is written to it piece by piece; large pieces are the writer's own memory."""

    def __init__(self) -> None:
        self.pieces: list[memoryview] = []
        self._bytes = 0

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Appends; ``data`` does not change afterwards."""
        self.pieces.append(memoryview(data))
        self._bytes += len(data)
        return len(data)

    def tell(self) -> int:
        """How much was written."""
        return self._bytes


def _arrow(
    prompts: np.ndarray[Any, Any], source: np.ndarray[Any, Any], document: np.ndarray[Any, Any]
) -> list[memoryview]:
    """An Arrow file in pieces, those with the columns being the arrays themselves: a round may hold a long document."""
    columns = {
        "tokens": pa.FixedSizeListArray.from_arrays(pa.array(prompts.ravel()), prompts.shape[1]),
        "source": pa.array(source),
        "document": pa.array(document),
    }
    table = pa.table(columns)
    gathered = _Gathered()
    with pa.ipc.new_file(pa.PythonFile(gathered, mode="w"), table.schema) as writer:
        writer.write_table(table, max_chunksize=max(len(table), 1))
    return gathered.pieces


def _summary(streams: Sequence[SourceStream], prompt_tokens: int) -> dict[str, Any]:
    prompts = sum(stream.tally.prompts for stream in streams)
    return {
        "prompts": prompts,
        "tokens": prompts * prompt_tokens,
        "sources": {
            stream.name: {
                "prompts": stream.tally.prompts,
                "tokens": stream.tally.prompts * prompt_tokens,
                "share_of_tokens": round(stream.tally.prompts / prompts, 4),
                "documents_read": stream.tally.documents,
                "duplicates_left_out": stream.tally.duplicates,
                "inexact_cuts": stream.tally.inexact_cuts,
            }
            for stream in streams
        },
    }
