"""The kinds of source: rows of files, here or of the Hub; folders of source code; the embedded standard library."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from glob import glob
from pathlib import Path
from typing import Any, Protocol

from pipeline import standard_library
from pipeline.corpus.documents import START, Defect, Document, Flaw, Place, Row, Split, text_document
from pipeline.corpus.readers import format_of
from storage.errors import InputError
from storage.fingerprint import sha256_file


@dataclass(frozen=True)
class DataFile:
    """A file of rows.

    Attributes:
        name: short, for the names of its documents.
        where: in full, for messages.
        fetch: gives the path at which it can be read, fetching it first if need be.
    """

    name: str
    where: str
    fetch: Callable[[], Path]


class Files(Protocol):
    """Files of rows, in order."""

    def identity(self) -> Mapping[str, Any]:
        """What names their content."""
        ...

    def list(self) -> Sequence[DataFile]:
        """The files; none is fetched."""
        ...


class RowSource:
    """Documents that are rows of files.

    Args:
        files: in order.
        field: which holds the document, where rows have fields.
        parse: makes a document of a name and what the field holds, or says what is wrong with it.
    """

    def __init__(self, files: Files, field: str, parse: Callable[[str, Any], Document | Flaw]):
        self._files = files
        self._field = field
        self._parse = parse

    def identity(self) -> Mapping[str, Any]:
        """Of the files, and the field."""
        return {**self._files.identity(), "field": self._field}

    def rows(self, split: Split, start: Place = START) -> Iterator[Row]:
        """See ``DocumentSource``."""
        for number, file in enumerate(self._files.list()):
            if number < start.file:
                continue
            read = format_of(file.name).read(file.fetch(), self._field, start.row if number == start.file else 0)
            yield from filter(None, map(partial(self._row, split, number, file), read))  # which hold no document

    def _row(self, split: Split, number: int, file: DataFile, found: tuple[int, Any]) -> Row | None:
        row, value = found
        document = value if isinstance(value, Flaw) else self._parse(f"{file.name}#{row}", value)
        if isinstance(document, Flaw):
            return Row(Place(number, row), Defect(f"{file.where}, {format_of(file.name).unit} {row}", document))
        return Row(Place(number, row), document) if document.held_out == (split == "held_out") else None


class LocalFiles:
    """Files in the order of the patterns and, within one, of the names.

    Args:
        source: name of the source, for messages.
        patterns: paths, or glob patterns.

    Raises:
        InputError: a pattern matches nothing, or a kind of file that is not read.
    """

    def __init__(self, source: str, patterns: Sequence[str]):
        self._paths = [path for pattern in patterns for path in _expand(source, pattern)]
        for path in self._paths:
            format_of(str(path))

    def identity(self) -> Mapping[str, Any]:
        """Sha256 of each file, in order; names and folders do not count."""
        return {"files": [sha256_file(path) for path in self._paths]}

    def list(self) -> Sequence[DataFile]:
        """See ``Files``."""
        return [DataFile(path.name, str(path), lambda path=path: path) for path in self._paths]


class FolderSource:
    """Folders of source code: a document a file, those in the order of a seeded hash of their paths.

    So a budget of tokens takes a fair sample of the files rather than those early in the alphabet. Left out: files and
    folders whose name begins with a dot, links, binary files (with a zero byte) and blank ones.

    Args:
        source: name of the source, for messages.
        folders: to search with all folders below.
        suffixes: of the files that are read.
        seed: of the order.
    """

    def __init__(self, source: str, folders: Sequence[str], suffixes: Sequence[str], seed: int):
        self._roots = [path for folder in folders for path in _expand(source, folder)]
        self._suffixes = tuple(suffixes)
        self._seed = seed

    def identity(self) -> Mapping[str, Any]:
        """Sha256 over the list of (path within the folder, sha256 of the file)."""
        lines = "".join(f"{name}\t{sha256_file(path)}\n" for name, path in self._files)
        return {"files_sha256": hashlib.sha256(lines.encode()).hexdigest()}

    def rows(self, split: Split, start: Place = START) -> Iterator[Row]:
        """See ``DocumentSource``."""
        numbers = range(start.file, len(self._files))
        return filter(None, map(partial(self._row, split), numbers))

    def _row(self, split: Split, number: int) -> Row | None:
        name, path = self._files[number]
        after, content = Place(number + 1, 0), path.read_bytes()
        if b"\0" in content or not content.strip():
            return None
        found = text_document(name, content)
        if isinstance(found, Flaw):
            return Row(after, Defect(str(path), found))
        return Row(after, found) if found.held_out == (split == "held_out") else None

    @cached_property
    def _files(self) -> list[tuple[str, Path]]:
        found = [(path.relative_to(root).as_posix(), path) for root in self._roots for path in root.rglob("*")]
        visible = [(name, path) for name, path in found if not any(part[0] == "." for part in name.split("/"))]
        files = [(n, path) for n, path in visible if n.endswith(self._suffixes) and not path.is_symlink()]
        return sorted(
            filter(lambda file: file[1].is_file(), files), key=lambda file: (_rank(self._seed, file[0]), file)
        )


class StandardLibrarySource:
    """The running Python's library, modules in the order of a seeded hash of their paths, split by module.

    Args:
        kind: code or prose.
        seed: of the order.
    """

    def __init__(self, kind: standard_library.Kind, seed: int):
        self._kind: standard_library.Kind = kind
        self._modules = sorted(_library(), key=lambda module: _rank(seed, module.path))

    def identity(self) -> Mapping[str, Any]:
        """Sha256 over the sorted (module path, file sha256) list."""
        return {"corpus_sha256": standard_library.corpus_sha256(self._modules)}

    def rows(self, split: Split, start: Place = START) -> Iterator[Row]:
        """One document a module, or several; see ``standard_library``."""
        for number, module in enumerate(self._modules):
            held_out = standard_library.is_held_out(module.path)
            if number < start.file or held_out != (split == "held_out"):
                continue
            for row, (name, text) in enumerate(standard_library.documents(module, self._kind), start=1):
                document = text_document(name, text, held_out)
                if isinstance(document, Document) and Place(number, row) > start:  # blank ones are none
                    yield Row(Place(number, row), document)


@cache
def _library() -> list[standard_library.Module]:
    return standard_library.read_modules()  # 12 MB, which both kinds of source share


def _rank(seed: int, path: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{path}".encode()).digest()


def _expand(source: str, pattern: str) -> list[Path]:
    expanded = str(Path(pattern).expanduser())
    paths = sorted(Path(path) for path in glob(expanded, recursive=True))  # noqa: PTH207 - patterns may be absolute
    if not paths:
        raise InputError(f"nothing for source {source}", where=pattern, expected="a path that exists, or a pattern")
    return paths
