"""Lines of JSON: what the fast parser makes of them is what the standard library does."""

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.corpus import readers
from pipeline.corpus.documents import Flaw

NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats()  # beyond these an integer comes as a float
ANY_TEXT = st.text(st.characters(codec=None))  # half surrogate pairs too
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)


def equal(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)  # NaN is itself, 1 is not 1.0


@given(VALUES, st.booleans())
def test_a_line_of_any_value(value: Any, ascii_only: bool):
    line = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert equal(readers._parsed([line]), readers._parsed_plainly([line]))
    if ascii_only:
        assert equal(readers._parsed([line]), value)


@given(VALUES, st.data())
@example({}, None)
def test_a_damaged_line(value: Any, data: st.DataObject | None):
    line = bytearray(json.dumps(value).encode())
    if data is not None:
        at = data.draw(st.integers(0, len(line) - 1))
        line[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    line = bytes(line)
    plain = readers._parsed_plainly([line])
    if "e" not in line.decode(errors="replace").lower() and not _has_large_integer(plain):
        assert equal(readers._parsed([line]), plain)


@given(st.binary(max_size=40))
@example(b"\xef\xbb\xbf{}")
@example(b"[" * 3000)
@example(b'{"a": NaN}')
@example(b'{"a": "\\ud800"}')
@example(b'{"a": "x\ty"}')
def test_a_line_of_any_bytes(line: bytes):
    assert equal(readers._parsed([line]), readers._parsed_plainly([line]))


def test_the_line_is_let_go_of():
    box = [b'{"text": "a"}']
    assert readers._json_value(box, "text") == "a"
    box = [b'{"text": ' + b" " * readers._LONG_LINE_BYTES + b'"a"}']
    assert readers._json_value(box, "text") == "a"
    assert box == []


def test_a_number_that_no_parser_holds_is_a_flaw_as_any_other():
    assert isinstance(readers._parsed([b'{"a": 1' + b"0" * 5000 + b"}"]), dict | Flaw)


def _has_large_integer(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_large_integer, value.values()))
    if isinstance(value, list):
        return any(map(_has_large_integer, value))
    return type(value) is int and not -(2**63) <= value < 2**64
