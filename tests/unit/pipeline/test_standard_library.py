import ast
from pathlib import Path

import pytest

from pipeline import standard_library
from pipeline.standard_library import Module, corpus_sha256, documents, is_held_out, read_modules

SOURCE = '''"""Module docstring."""

import os


class Thing:
    """Class docstring,
    on two lines."""

    def method(self):
        "Method docstring."
        return "not a docstring"


def plain(): """One line."""; return 1
'''


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return read_modules()


def module(text: str, path: str = "thing.py") -> Module:
    return Module(path, text.encode())


def test_prose_is_every_docstring_and_code_is_the_rest():
    ((name, prose),) = documents(module(SOURCE), "prose")
    ((_, code),) = documents(module(SOURCE), "code")
    assert name == "thing.py"
    for line in ("Module docstring.", "Class docstring,", "on two lines.", "Method docstring.", "One line."):
        assert line in prose
        assert line not in code
    assert 'return "not a docstring"' in code
    assert "not a docstring" not in prose


def test_no_docstring_of_the_real_library_is_left_in_its_code(modules: list[Module]):
    checked = 0
    for one in modules[:60]:
        for _, code in documents(one, "code"):
            try:
                tree = ast.parse(code)
            except SyntaxError:
                continue  # a body that was its docstring alone is empty now
            checked += 1
            nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
            # A second string after the docstring becomes the first statement; the library has none of those here.
            assert not any(ast.get_docstring(node) for node in nodes), one.path
    assert checked > 20


def test_a_form_feed_does_not_shift_the_cut():
    text = 'x = 1\n\x0c\ndef f():\n    """Gone."""\n    return 2\n'
    ((_, code),) = documents(module(text), "code")
    assert code == "x = 1\n\x0c\ndef f():\n    return 2\n"


def test_columns_count_bytes_not_characters():
    text = 'é = "ü"; \ndef f(): """weg"""; ä = 1\n'
    ((_, code),) = documents(module(text), "code")
    assert code == 'é = "ü"; \ndef f(): ; ä = 1\n'


def test_split_is_a_pure_function_of_the_path():
    # Recorded once from the definition; a change would let a shipped model see held-out text.
    assert is_held_out("json/decoder.py") is is_held_out("json/decoder.py")
    share = sum(is_held_out(f"package/module_{i}.py") for i in range(5000)) / 5000
    assert 0.08 < share < 0.12
    assert not is_held_out("pydoc_data/topics.py")


def test_topics_are_prose_only():
    topics = module("topics = {'a': 'Text of a.', 'b': 'Text of b.'}\n", "pydoc_data/topics.py")
    assert list(documents(topics, "code")) == []
    assert list(documents(topics, "prose")) == [
        ("pydoc_data/topics.py#a", "Text of a.\n"),
        ("pydoc_data/topics.py#b", "Text of b.\n"),
    ]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name, text in {
        "one.py": SOURCE,
        "package/two.py": "y = 2\n",
        "package/test/three.py": "z = 3\n",
        "site-packages/other.py": "w = 4\n",
        "broken.py": "def (:\n",
        "latin.py": "# no coding line: \xe9\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="latin-1")
    return tmp_path


def test_reads_what_parses_and_leaves_out_tests_and_packages(library: Path):
    def parsed(*, tests: bool) -> list[str]:
        return [one.path for one in read_modules(library, tests=tests) if one.parse() is not None]

    assert parsed(tests=False) == ["one.py", "package/two.py"]
    assert parsed(tests=True) == ["one.py", "package/test/three.py", "package/two.py"]


def test_a_file_that_does_not_parse_has_no_documents():
    assert list(documents(module("def (:\n"), "code")) == []
    assert list(documents(Module("latin.py", b"# no coding line: \xe9\n"), "prose")) == []


def test_the_coding_line_and_line_ends_are_honoured():
    (_, code) = next(documents(Module("latin.py", b"# coding: latin-1\r\nx = '\xe9'\r\n"), "code"))
    assert code == "# coding: latin-1\nx = 'é'\n"


def test_identity_follows_content_and_not_order(library: Path):
    modules = read_modules(library)
    before = corpus_sha256(modules)
    assert corpus_sha256(modules[::-1]) == before
    (library / "one.py").write_text("changed = True\n")
    assert corpus_sha256(read_modules(library)) != before


def test_running_library_has_both_kinds_on_both_sides(modules: list[Module]):
    for kind in ("code", "prose"):
        for held_out in (False, True):
            texts = [
                text
                for one in modules
                if standard_library.is_held_out(one.path) is held_out
                for _, text in documents(one, kind)
            ]
            assert sum(map(len, texts)) > 50_000
