"""Sources of documents: the embedded standard library, and files of text read through ``datasets``.

A source says who it is (hashes of what it reads), and yields documents of one side of its train / held-out split. The
standard library is split by module; files are split by a hash of the document's text, so equal texts fall on one side.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline import standard_library
from pipeline.config import Source
from storage.errors import InputError
from storage.fingerprint import sha256_file

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

_BUILDERS = {".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: unique in its source: a module's path, or file and row.
        text: as read; never empty.
    """

    name: str
    text: str


@dataclass
class BadDocuments:
    """Counts by kind what was skipped; or refuses the first.

    Attributes:
        skip: whether bad documents are skipped.
        counts: skipped documents by kind.
    """

    skip: bool
    counts: dict[str, int] = field(default_factory=dict[str, int])

    def meet(self, kind: str, where: str, found: object = None) -> None:
        """Counts a bad document, or raises ``InputError`` naming file and row."""
        if not self.skip:
            raise InputError(
                f"bad document: {kind}", where=where, found=found,
                remedy="mend the file, or go on without such documents: --set tokenize.on_bad_document=skip",
            )  # fmt: skip
        self.counts[kind] = self.counts.get(kind, 0) + 1


class TextSource(Protocol):
    """Where documents come from."""

    def identity(self) -> Mapping[str, Any]:
        """Hashes that name the content."""
        ...

    def documents(self, split: Split, bad: BadDocuments) -> Iterator[Document]:
        """Documents of one side, always in the same order."""
        ...


def open_source(source: Source, seed: int) -> TextSource:
    """The reader of a configured source."""
    if source.kind == "files":
        return FileSource(source)
    return StandardLibrarySource("code" if source.kind == "standard-library-code" else "prose", seed)


class StandardLibrarySource:
    """The running Python's library, modules in the order of a seeded hash of their paths.

    So a budget of tokens takes a fair sample of the modules rather than those early in the alphabet.
    """

    def __init__(self, kind: standard_library.Kind, seed: int):
        self._kind: standard_library.Kind = kind
        self._modules = _library()
        self._seed = seed

    def identity(self) -> Mapping[str, Any]:
        """Sha256 over the sorted (module path, file sha256) list."""
        return {"corpus_sha256": standard_library.corpus_sha256(self._modules)}

    def documents(self, split: Split, bad: BadDocuments) -> Iterator[Document]:  # noqa: ARG002 - the library has none
        """One document a module and kind; see ``standard_library``."""
        for module in sorted(self._modules, key=lambda module: self._rank(module.path)):
            if standard_library.is_held_out(module.path) == (split == "held_out"):
                for name, text in standard_library.documents(module, self._kind):
                    yield Document(name, text)

    def _rank(self, path: str) -> bytes:
        return hashlib.sha256(f"{self._seed}\n{path}".encode()).digest()


@cache
def _library() -> list[standard_library.Module]:
    return standard_library.read_modules()  # 12 MB, which both kinds of source share


class FileSource:
    """Files of documents, in the order of the patterns and, within one, of the names."""

    def __init__(self, source: Source):
        self._source = source
        self._files = [path for pattern in source.files for path in self._expand(pattern)]

    def identity(self) -> Mapping[str, Any]:
        """Sha256 of each file, in order; names and folders do not count."""
        return {"files": [sha256_file(path) for path in self._files], "text_field": self._source.text_field}

    def documents(self, split: Split, bad: BadDocuments) -> Iterator[Document]:
        """Rows of the files; a bad one is met by ``bad``."""
        for path in self._files:
            for row, text in enumerate(self._texts(path), start=1):
                where = f"{path}, row {row}"
                if not isinstance(text, str):
                    bad.meet("null text" if text is None else "text is not a string", where, found=repr(text)[:40])
                elif not text.strip():
                    bad.meet("empty text", where)
                elif is_held_out_text(text) == (split == "held_out"):
                    yield Document(f"{path.name}#{row}", text)

    def _expand(self, pattern: str) -> list[Path]:
        paths = sorted(Path(path) for path in glob(pattern, recursive=True))  # noqa: PTH207 - patterns may be absolute
        if not paths:
            raise InputError(
                f"no file of source {self._source.name}", found=pattern, expected="a file that exists, or a pattern"
            )
        for path in paths:
            _builder(path)
        return paths

    def _texts(self, path: Path) -> Iterator[Any]:
        from datasets import load_dataset
        from datasets.exceptions import DatasetGenerationError

        builder = _builder(path)
        options: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
        column = "text" if builder == "text" else self._source.text_field
        try:
            rows = load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)
            for row in rows:
                if column not in row:
                    raise InputError("no such field", where=path, found=sorted(row), expected=column)
                yield row[column]
        except (ValueError, OSError, EOFError, DatasetGenerationError) as error:
            line, why = _first_bad_line(path) if builder == "json" else (0, str(error))
            raise InputError(
                "malformed file", where=f"{path}, line {line}" if line else path, found=why,
                expected="a JSON object a line" if builder == "json" else f"a {builder} file",
            ) from error  # fmt: skip


def is_held_out_text(text: str) -> bool:
    """Whether a document of a file is held out: a hundredth of all texts, by their hash."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < 0.01 * 2**64


def _builder(path: Path) -> str:
    for suffix, builder in _BUILDERS.items():
        if path.name.endswith(suffix):
            return builder
    raise InputError("not a kind of file that is read", where=path, expected=", ".join(_BUILDERS))


def _first_bad_line(path: Path) -> tuple[int, str]:
    """Line number and reason of the first line that is no JSON object; (0, reason) where the file itself breaks."""
    import gzip

    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    line = 0
    try:
        with opener(path, "rt", encoding="utf-8") as handle:
            for line, text in enumerate(handle, start=1):  # noqa: B007 - the line reached is reported
                json.loads(text)
    except (ValueError, OSError, EOFError) as error:
        return line + (0 if isinstance(error, json.JSONDecodeError) else 1), str(error)
    return 0, "datasets could not read it, though every line is JSON: the fields' types differ between rows"
