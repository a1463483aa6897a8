"""The tokenize stage: documents -> prompts of equal length, in Arrow files that are memory-mapped when read.

Every source fills its share of the tokens asked for, in its own order; documents whose exact text was seen before, in
any source or on the training side, are left out. A prompt keeps its source and the document it begins in.

Layout of the artifact: ``train-00000.arrow``... and ``held_out-00000.arrow``... (columns ``tokens`` fixed_size_list
of int32, ``source`` int16, ``document`` int32), and ``documents.parquet`` (number, split, source, name, tokens).
"""

import hashlib
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import torch
from tokenizers import Tokenizer

from pipeline import language_model
from pipeline.config import Source, TokenizeConfig
from pipeline.corpus import SPLITS, BadDocuments, Document, Split, TextSource, open_source
from pipeline.packing import pack_documents
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.errors import InputError
from storage.fingerprint import Json

OUTPUT_VERSION = 1
PROMPTS_PER_FILE = 65_536
_DOCUMENTS_PER_BATCH = 512

Prompts = npt.NDArray[np.int32]


def tokenize(config: TokenizeConfig, workspace: Workspace) -> Made:
    """Makes, or finds, the tokens artifact of a config.

    Raises:
        ConfigError: no such model.
        InputError: a file is missing or malformed, or the sources hold too little text for one prompt.
    """
    tokenizer, model_identity = tokenizer_of(config.language_model)
    sources = {source.name: open_source(source, config.seed) for source in config.sources}
    spec = Spec(
        "tokenize",
        OUTPUT_VERSION,
        {
            "prompt_tokens": config.prompt_tokens,
            "train_tokens": config.train_tokens,
            "held_out_tokens": config.held_out_tokens,
            "on_bad_document": config.on_bad_document,
            "seed": config.seed,
            "tokenizer_sha256": model_identity["tokenizer_sha256"],
            "sources": [
                {"name": source.name, "kind": source.kind, "share": source.share, **sources[source.name].identity()}
                for source in config.sources
            ],
        },
        {},
    )
    stage = _Tokenizing(config, tokenizer, sources, workspace)
    return workspace.make(spec, stage.produce, provenance=_provenance())


def _provenance() -> dict[str, Json]:
    """What the prompts depend on beside the spec: no arithmetic, so no device and no threads."""
    return {"python": platform.python_version(), "tokenizers": tokenizers.__version__, "pyarrow": pa.__version__}


@dataclass
class _Tally:
    """What one source gave to one split."""

    documents: int = 0
    duplicates: int = 0
    prompts: int = 0
    tokens: int = 0
    characters: int = 0


@dataclass
class _Tokenizing:
    """One run of the stage."""

    config: TokenizeConfig
    tokenizer: Tokenizer
    sources: dict[str, TextSource]
    workspace: Workspace
    seen: set[bytes] = field(default_factory=set[bytes])
    documents: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def produce(self, staging: Staging) -> Result:
        """Writes both splits; training first, so that a text on both sides stays out of the held-out one."""
        bos = language_model.special_token_id(self.tokenizer, language_model.BOS_NAMES)
        eos = language_model.special_token_id(self.tokenizer, language_model.EOS_NAMES)
        stats: dict[str, Any] = {"bos_id": bos, "eos_id": eos, "prompt_tokens": self.config.prompt_tokens}
        bad = BadDocuments(skip=self.config.on_bad_document == "skip")
        for split in SPLITS:
            tallies = self._write_split(staging, split, bos, eos, bad if split == "train" else BadDocuments(skip=True))
            stats[split] = _summary(tallies)
        table = pa.Table.from_pylist(self.documents)
        staging.write_bytes("documents.parquet", _parquet(table))
        return Result(stats | {"bad_documents": bad.counts})

    def _write_split(self, staging: Staging, split: Split, bos: int, eos: int, bad: BadDocuments) -> dict[str, _Tally]:
        tallies = {source.name: _Tally() for source in self.config.sources}
        wanted = self.config.train_tokens if split == "train" else self.config.held_out_tokens
        files = _PromptFiles(staging, split)
        with self.workspace.reporter.track(f"tokenize {split}", wanted, "tokens") as advance:
            for number, source in enumerate(self.config.sources):
                tally = tallies[source.name]
                budget = round(wanted * source.share) // self.config.prompt_tokens
                for prompts, document in islice_rows(self._prompts(source, split, bos, eos, tally, bad), budget):
                    files.add(prompts, np.full(len(prompts), number, np.int16), document)
                    tally.prompts += len(prompts)
                    tally.tokens += prompts.size
                    advance(prompts.size)
        files.close()
        if not any(tally.prompts for tally in tallies.values()):
            raise InputError(
                f"the sources hold no usable tokens for the {split} side",
                found=f"{sum(tally.documents for tally in tallies.values())} documents",
                expected=f"text for at least one prompt of {self.config.prompt_tokens} tokens",
            )
        return tallies

    def _prompts(
        self, source: Source, split: Split, bos: int, eos: int, tally: _Tally, bad: BadDocuments
    ) -> Iterator[tuple[Prompts, npt.NDArray[np.int32]]]:
        documents = self._fresh(self.sources[source.name].documents(split, bad), tally)
        return pack_documents(
            self._encoded(documents, source, split, tally),
            prompt_tokens=self.config.prompt_tokens,
            bos_id=bos,
            eos_id=eos,
        )

    def _fresh(self, documents: Iterator[Document], tally: _Tally) -> Iterator[Document]:
        for document in documents:
            digest = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()[:16]
            if digest in self.seen:
                tally.duplicates += 1
                continue
            self.seen.add(digest)
            yield document

    def _encoded(
        self, documents: Iterator[Document], source: Source, split: Split, tally: _Tally
    ) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
        while batch := list(islice(documents, _DOCUMENTS_PER_BATCH)):
            encodings = self.tokenizer.encode_batch_fast(
                [document.text for document in batch], add_special_tokens=False
            )
            for document, encoding in zip(batch, encodings, strict=True):
                ids = np.array(encoding.ids, np.int32)
                number = len(self.documents)
                self.documents.append(
                    {"number": number, "split": split, "source": source.name, "name": document.name, "tokens": len(ids)}
                )
                tally.documents += 1
                tally.characters += len(document.text)
                yield number, ids


class _PromptFiles:
    """Writes prompts into Arrow files of equal numbers of rows."""

    def __init__(self, staging: Staging, split: Split):
        self._staging, self._split = staging, split
        self._blocks: list[tuple[npt.NDArray[Any], ...]] = []
        self._rows = self._files = 0

    def add(self, prompts: Prompts, source: npt.NDArray[np.int16], document: npt.NDArray[np.int32]) -> None:
        while len(prompts):
            take = min(len(prompts), PROMPTS_PER_FILE - self._rows)
            self._blocks.append((prompts[:take], source[:take], document[:take]))
            self._rows += take
            prompts, source, document = prompts[take:], source[take:], document[take:]
            if self._rows == PROMPTS_PER_FILE:
                self.close()

    def close(self) -> None:
        if not self._blocks:
            return
        prompts, source, document = (np.concatenate(column) for column in zip(*self._blocks, strict=True))
        flat = pa.array(prompts.ravel())
        columns = {
            "tokens": pa.FixedSizeListArray.from_arrays(flat, prompts.shape[1]),
            "source": pa.array(source),
            "document": pa.array(document),
        }
        table = pa.table(columns)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=PROMPTS_PER_FILE)
        name = f"{self._split}-{self._files:05d}.arrow"
        self._staging.write_bytes(name, sink.getvalue().to_pybytes())
        self._blocks, self._rows, self._files = [], 0, self._files + 1


class TokenTable:
    """Reads a tokens artifact, from several threads if need be.

    Files are memory-mapped, and their sha256 compared when they are first used; rows are copied only when taken.
    """

    def __init__(self, artifact: Artifact):
        self.artifact = artifact
        self.prompt_tokens: int = facts(artifact)["prompt_tokens"]
        self.bos_id: int = facts(artifact)["bos_id"]
        self._files: dict[Split, list[_PromptFile]] = {split: self._open(split) for split in SPLITS}
        self._ends = {split: np.cumsum([file.n_prompts for file in files]) for split, files in self._files.items()}

    def n_prompts(self, split: Split) -> int:
        """Prompts of a split."""
        return sum(file.n_prompts for file in self._files[split])

    def prompts(self, split: Split, numbers: npt.NDArray[np.integer[Any]] | Sequence[int] | None = None) -> Prompts:
        """Token ids of prompts.

        Args:
            split: ``train`` or ``held_out``.
            numbers: which prompts, in any order; all by default.

        Returns:
            int32 (n, prompt_tokens).

        Raises:
            InputError: there is no such prompt.
            CorruptArtifact: a file is not as it was committed.
        """
        n = self.n_prompts(split)
        wanted = np.arange(n) if numbers is None else np.asarray(numbers, np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < n:
            raise InputError(
                f"no such {split} prompt", where=self.artifact.id,
                found=int(wanted.min() if wanted.min() < 0 else wanted.max()), expected=f"0 to {n - 1}",
            )  # fmt: skip
        out = np.empty((len(wanted), self.prompt_tokens), np.int32)
        files = np.searchsorted(self._ends[split], wanted, side="right")
        for number in np.unique(files).tolist():
            file, here = self._files[split][number], files == number
            first = self._ends[split][number] - file.n_prompts
            out[here] = file.tokens.reshape(-1, self.prompt_tokens)[wanted[here] - first]
        return out

    def ids(self, split: Split, numbers: npt.NDArray[np.integer[Any]] | Sequence[int] | None = None) -> torch.Tensor:
        """As ``prompts``, as the model wants them: int64 tensor (n, prompt_tokens)."""
        return torch.from_numpy(self.prompts(split, numbers).astype(np.int64))

    def documents(self) -> pa.Table:
        """The table of documents: number, split, source, name, tokens."""
        return pq.read_table(self.artifact.checked_file("documents.parquet"))

    def column(self, split: Split, name: str) -> npt.NDArray[Any]:
        """A column of the prompts, ``source`` or ``document``: (n_prompts,)."""
        return pa.chunked_array([file.table[name].combine_chunks() for file in self._files[split]]).to_numpy()

    def _open(self, split: Split) -> "list[_PromptFile]":
        names = sorted(name for name in self.artifact.manifest.files if name.startswith(f"{split}-"))
        return [_PromptFile(self.artifact, name) for name in names]


class _PromptFile:
    """One Arrow file of prompts."""

    def __init__(self, artifact: Artifact, name: str):
        self._artifact = artifact
        self._name = name
        with pa.memory_map(str(artifact.file(name))) as source:
            self.n_prompts = pa.ipc.open_file(source).count_rows()

    @cached_property
    def table(self) -> pa.Table:
        """Its columns, memory-mapped."""
        return pa.ipc.open_file(pa.memory_map(str(self._artifact.checked_file(self._name)))).read_all()

    @cached_property
    def tokens(self) -> npt.NDArray[np.int32]:
        """Token ids of all prompts, one after the other, int32; a view of the mapped file."""
        return self.table["tokens"].chunk(0).flatten().to_numpy()  # a file is one record batch


def islice_rows(
    blocks: Iterator[tuple[Prompts, npt.NDArray[np.int32]]], rows: int
) -> Iterator[tuple[Prompts, npt.NDArray[np.int32]]]:
    """The first ``rows`` rows of a stream of blocks; reads no block further."""
    while rows > 0:
        block = next(blocks, None)
        if block is None:
            return
        prompts, document = block
        yield prompts[:rows], document[:rows]
        rows -= len(prompts)


def tokenizer_of(name: str) -> tuple[Tokenizer, dict[str, str]]:
    """A language model's tokenizer and the model's identity, without loading weights where its files can be found."""
    files = language_model.find_files(name)
    if files is not None:
        return language_model.load_tokenizer(files.tokenizer), files.identity
    model = language_model.load(name)
    return model.tokenizer, model.identity


def _summary(tallies: dict[str, _Tally]) -> dict[str, Any]:
    total = sum(tally.tokens for tally in tallies.values())
    return {
        "prompts": sum(tally.prompts for tally in tallies.values()),
        "tokens": total,
        "sources": {
            name: {
                "prompts": tally.prompts, "tokens": tally.tokens, "share_of_tokens": round(tally.tokens / total, 4),
                "documents_read": tally.documents, "duplicates_left_out": tally.duplicates,
            }
            for name, tally in tallies.items()
        },
    }  # fmt: skip


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()
