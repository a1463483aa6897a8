"""The tokens artifact: prompts of equal length, in Arrow files that are memory-mapped when read.

Every source fills its share of the tokens asked for, in its own order; documents whose exact content was seen before,
in any source or on the training side, are left out. A prompt keeps its source and the document it begins in.
``pipeline.tokenizing`` does the work.

Layout of the artifact: ``train-00000.arrow``... and ``held_out-00000.arrow``... (columns ``tokens`` fixed_size_list
of int32, ``source`` int16, ``document`` int32), each holding the mixture of the sources; and beside each a table
``documents-train-00000.parquet``... of the documents begun in it (number, split, source, name, tokens, digest).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer

from pipeline import language_model
from pipeline.config import TokenizeConfig
from pipeline.corpus import open_source
from pipeline.corpus.documents import SPLITS, Split
from pipeline.model_files import ModelFiles, find_files
from pipeline.packing import Prompts
from pipeline.text_encoding import provenance
from pipeline.text_work import encoder_for
from pipeline.tokenizing import Tokenizing
from pipeline.workspace import Workspace, facts, require_version
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.errors import CorruptArtifact, InputError

OUTPUT_VERSION = 2


def tokenize(config: TokenizeConfig, workspace: Workspace) -> Made:
    """Makes, or finds, the tokens artifact of a config.

    Raises:
        ConfigError: no such model.
        InputError: a file is missing or malformed, the tokenizer is not the model's, or the sources hold too little
            text for one prompt.
    """
    files = find_files(config.language_model)
    tokenizer = files.read_tokenizer()
    d_vocab = _d_vocab(files, tokenizer)
    sources = {source.name: open_source(source, seed=config.seed, d_vocab=d_vocab) for source in config.sources}
    spec = Spec(
        "tokenize",
        OUTPUT_VERSION,
        {
            "prompt_tokens": config.prompt_tokens,
            "train_tokens": config.train_tokens,
            "held_out_tokens": config.held_out_tokens,
            "bos": config.bos,
            "eos": config.eos,
            "on_bad_document": config.on_bad_document,
            "seed": config.seed,
            "tokenizer_sha256": files.tokenizer_sha256,
            "sources": [
                {"name": source.name, "kind": source.kind, "share": source.share, **sources[source.name].identity()}
                for source in config.sources
            ],
        },
        {},
    )

    def produce(staging: Staging) -> Result:
        bos = language_model.special_token_id(tokenizer, language_model.BOS_NAMES) if config.bos else None
        eos = language_model.special_token_id(tokenizer, language_model.EOS_NAMES) if config.eos else None
        with encoder_for(config, files, tokenizer, workspace, staging) as encoder:
            stats = Tokenizing(config, sources, encoder, bos, eos, workspace, staging).run()
        return Result({"bos_id": bos, "eos_id": eos, "prompt_tokens": config.prompt_tokens, **stats})

    return workspace.make(spec, produce, provenance=provenance())


def _d_vocab(files: ModelFiles, tokenizer: Tokenizer) -> int:
    """The model's; where its config does not say, as many as the tokenizer has."""
    return int(files.settings.get("d_vocab") or files.settings.get("vocab_size") or tokenizer.get_vocab_size())


class TokenTable:
    """Reads a tokens artifact, from several threads if need be.

    Files are memory-mapped, and their sha256 compared when they are first used; rows are copied only when taken. A
    split's files are opened when something of it is first asked for: of an artifact in a remote they have to come.

    Attributes:
        artifact: the tokens artifact.
        prompt_tokens: length of a prompt.
        bos_id: id at position 0 of each prompt; None where they begin without one.

    Raises:
        UnsupportedFormat: the tokens are of another output version.
    """

    def __init__(self, artifact: Artifact):
        require_version(artifact, OUTPUT_VERSION)
        self.artifact = artifact
        self.prompt_tokens: int = facts(artifact)["prompt_tokens"]
        self.bos_id: int | None = facts(artifact)["bos_id"]
        self._opened: dict[Split, list[_PromptFile]] = {}

    def n_prompts(self, split: Split) -> int:
        """Prompts of a split."""
        return sum(file.n_prompts for file in self._files(split))

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
        opened = self._files(split)
        ends = np.cumsum([file.n_prompts for file in opened])
        files = np.searchsorted(ends, wanted, side="right")
        for number in np.unique(files).tolist():
            file, here = opened[number], files == number
            first = ends[number] - file.n_prompts
            out[here] = file.tokens.reshape(-1, self.prompt_tokens)[wanted[here] - first]
        return out

    def ids(self, split: Split, numbers: npt.NDArray[np.integer[Any]] | Sequence[int] | None = None) -> torch.Tensor:
        """As ``prompts``, as the model wants them: int64 tensor (n, prompt_tokens)."""
        return torch.from_numpy(self.prompts(split, numbers).astype(np.int64))

    def documents(self) -> pa.Table:
        """The table of documents, by number: number, split, source, name, tokens, digest."""
        names = sorted(name for name in self.artifact.manifest.files if name.startswith("documents-"))
        ordered = [name for split in SPLITS for name in names if name.startswith(f"documents-{split}-")]
        return pa.concat_tables([pq.read_table(self.artifact.checked_file(name)) for name in ordered])

    def column(self, split: Split, name: str) -> npt.NDArray[Any]:
        """A column of the prompts, ``source`` or ``document``: (n_prompts,)."""
        return pa.chunked_array([file.table[name].combine_chunks() for file in self._files(split)]).to_numpy()

    def _files(self, split: Split) -> "list[_PromptFile]":
        if split not in self._opened:  # two threads may both open them: the same files
            names = sorted(name for name in self.artifact.manifest.files if name.startswith(f"{split}-"))
            self.artifact.fetch(names)
            opened = [_PromptFile(self.artifact, name) for name in names]
            if sum(file.n_prompts for file in opened) != facts(self.artifact)[split]["prompts"]:
                for name in names:
                    self.artifact.checked_file(name)  # names the one whose count is damaged
            self._opened[split] = opened
        return self._opened[split]


class _PromptFile:
    """One Arrow file of prompts."""

    def __init__(self, artifact: Artifact, name: str):
        self._artifact = artifact
        self._name = name
        try:
            with pa.memory_map(str(artifact.file(name))) as source:
                self.n_prompts = pa.ipc.open_file(source).count_rows()
        except (pa.ArrowException, OSError):
            artifact.checked_file(name)  # says what is damaged
            raise
        if self.n_prompts > artifact.manifest.files[name].bytes:
            raise self._lies(f"{self.n_prompts:,} prompts", "no more than it has bytes")

    @cached_property
    def table(self) -> pa.Table:
        """Its columns, memory-mapped."""
        table = pa.ipc.open_file(pa.memory_map(str(self._artifact.checked_file(self._name)))).read_all()
        try:
            table.validate()
        except pa.ArrowException as error:
            raise self._lies(error, "columns as long as they say") from error
        return table

    def _lies(self, found: object, expected: str) -> CorruptArtifact:
        """The error of a file that is as its manifest says, but was none of ours."""
        what, where = f"{self._name} of {self._artifact.id} contradicts itself", self._artifact.folder / self._name
        return CorruptArtifact(what, where=where, found=found, expected=expected)

    @cached_property
    def tokens(self) -> npt.NDArray[np.int32]:
        """Token ids of all prompts, one after the other, int32; a view of the mapped file."""
        return self.table["tokens"].chunk(0).flatten().to_numpy()  # a file is one record batch


def tokenizer_of(name: str) -> tuple[Tokenizer, dict[str, str]]:
    """A language model's tokenizer and its hash; needs no weights."""
    files = find_files(name)
    return files.read_tokenizer(), {"tokenizer_sha256": files.tokenizer_sha256}
