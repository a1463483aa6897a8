"""The embedded corpus: the running Python's own standard library, as code and as English prose.

Every CPython carries about 12 MB of source, so a demo needs no download. A module's docstrings become one
document of *prose*; its source with those docstrings cut out becomes one document of *code*: no text counts twice.
``pydoc_data/topics.py``, the language reference as strings, gives one document of prose a topic and no code.

Held-out text is chosen by module, before anything is extracted, by a hash of the module's path. So the choice is the
same under every Python version and on every machine, and the shipped language model, trained on the same side of the
same split, has never seen a held-out module of any Python.

Rejected: splitting by document or by prompt (a module's docstrings and its code would land on both sides).
"""

import ast
import hashlib
import inspect
import io
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

HELD_OUT_FRACTION = 0.1
_SPLIT_SALT = "sparsemill held-out split 2"
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TOPICS = "pydoc_data/topics.py"

Kind = Literal["code", "prose"]


@dataclass(frozen=True)
class Module:
    """One source file of the standard library.

    Attributes:
        path: POSIX path relative to the library's root, such as ``json/decoder.py``.
        source: the file's bytes.
    """

    path: str
    source: bytes

    @property
    def sha256(self) -> str:
        """Of the file's bytes, hexadecimal."""
        return hashlib.sha256(self.source).hexdigest()

    def parse(self) -> tuple[str, ast.Module] | None:
        """Text, decoded as Python itself would, and syntax tree; None if this Python cannot parse it."""
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(self.source).readline)
            text = io.TextIOWrapper(io.BytesIO(self.source), encoding).read()
            return text, ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
            return None  # the library's tests hold files that are broken on purpose


def is_held_out(module_path: str) -> bool:
    """Whether a module belongs to the held-out tenth; a pure function of its POSIX path."""
    digest = hashlib.sha256(f"{_SPLIT_SALT}\n{module_path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_FRACTION * 2**64


def library_root() -> Path:
    """Folder of the running interpreter's standard library (the base Python's, inside a virtual environment)."""
    return Path(sysconfig.get_path("stdlib"))


def read_modules(root: Path | None = None, *, tests: bool = False) -> list[Module]:
    """Reads the library's modules, sorted by path.

    Args:
        root: the library's folder; the running interpreter's by default.
        tests: whether the library's own tests are read too. Many distributions do not install them, so the demo
            corpus goes without; the shipped language model was trained with those of the training side.
    """
    root = library_root() if root is None else root
    modules: list[Module] = []
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        path = file.relative_to(root).as_posix()
        folders = set(PurePosixPath(path).parts[:-1])
        if folders & _SKIPPED_FOLDERS or (not tests and folders & _TEST_FOLDERS):
            continue
        modules.append(Module(path, file.read_bytes()))
    return modules


def corpus_sha256(modules: list[Module]) -> str:
    """Identity of the corpus: sha256 over the sorted (module path, file sha256) list."""
    lines = sorted(f"{module.path}\t{module.sha256}\n" for module in modules)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def documents(module: Module, kind: Kind) -> Iterator[tuple[str, str]]:
    """Yields (document name, text) of one module: its code without docstrings, or its prose.

    A file that this Python cannot parse has neither.
    """
    parsed = module.parse()
    if parsed is None:
        return
    text, tree = parsed
    if module.path == _TOPICS:
        if kind == "prose":
            yield from _topics(module.path, tree)
        return
    nodes = list(_docstring_nodes(tree))
    if kind == "code":
        code = _cut(text, nodes)
        if code.strip():
            yield module.path, code
        return
    paragraphs = [paragraph for node in nodes if (paragraph := _docstring_text(node))]
    if paragraphs:
        yield module.path, "\n\n".join(paragraphs) + "\n"


def _topics(path: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for name, text in topics.items():
                yield f"{path}#{name}", text.strip() + "\n"


def _docstring_nodes(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            yield first.value


def _docstring_text(node: ast.Constant) -> str:
    return inspect.cleandoc(str(node.value))


def _cut(text: str, nodes: list[ast.Constant]) -> str:
    """Source without the given string constants; a line left blank by the cut goes too. Columns count UTF-8 bytes."""
    lines = [f"{line}\n".encode() for line in text.split("\n")]  # not splitlines: a form feed ends no line for ast
    emptied: set[int] = set()
    for node in nodes:
        end_line, end_column = node.end_lineno or node.lineno, node.end_col_offset or 0  # ast.parse always sets both
        first, last = node.lineno - 1, end_line - 1
        head, tail = lines[first][: node.col_offset], lines[last][end_column:]
        lines[first] = head + tail
        for index in range(first + 1, last + 1):
            lines[index] = b""
        if not lines[first].strip():
            emptied.add(first)
    return b"".join(line for index, line in enumerate(lines) if index not in emptied).decode().removesuffix("\n")
