"""The golden set of bad documents, and of odd but good ones: tests/data/bad_documents, byte for byte as they are."""

import gzip
import json
from pathlib import Path

import pytest

from pipeline.config import Source
from pipeline.corpus import open_source
from pipeline.corpus.documents import BadDocuments, Defect, Document, DocumentSource
from storage.errors import InputError

GOLDEN = Path(__file__).parents[2] / "data" / "bad_documents"
BAD = [
    ("malformed-line.jsonl", "malformed line", "line 3"),
    ("not-an-object.jsonl", "malformed line", "line 3"),
    ("missing-field.jsonl", "missing field", "line 3"),
    ("empty-text.jsonl", "empty text", "line 3"),
    ("whitespace-text.jsonl", "empty text", "line 3"),
    ("null-text.jsonl", "null text", "line 3"),
    ("number-for-text.jsonl", "text is not a string", "line 3"),
    ("invalid-utf8.jsonl", "invalid UTF-8", "line 3"),
    ("lone-surrogate.jsonl", "lone surrogate", "line 3"),
    ("surrogate-bytes.jsonl", "invalid UTF-8", "line 3"),
    ("truncated.jsonl.gz", "broken file", "line 1"),
    ("damaged.jsonl.gz", "broken file", "line 1"),
    ("truncated.jsonl.zst", "broken file", "line 1"),
    ("invalid-utf8.txt", "invalid UTF-8", "row 1"),
    ("blank.txt", "empty text", "row 1"),
    ("null-text.parquet", "null text", "row 3"),
    ("invalid-utf8.parquet", "invalid UTF-8", "row 3"),
    ("truncated.parquet", "broken file", "row 1"),
    ("id-beyond.parquet", "token id outside the vocabulary", "row 3"),
    ("negative-id.arrow", "token id outside the vocabulary", "row 3"),
    ("null-ids.parquet", "null token ids", "row 3"),
    ("words-for-ids.jsonl", "not a row of token ids", "line 3"),
]
TOKENIZED = {"id-beyond.parquet", "negative-id.arrow", "null-ids.parquet", "words-for-ids.jsonl"}
THREE = ["The first document is good.", "The second document is good.", "The last document is good."]
GOOD = {
    "bom.jsonl": THREE,
    "crlf.jsonl": THREE,
    "no-final-newline.jsonl": THREE,
    "blank-lines.jsonl": THREE,
    "two-members.jsonl.gz": THREE,
    "bom-and-crlf.txt": ["The text\r\nas it is.\r\n"],
}


def source(*files: Path, tokenized: bool = False) -> DocumentSource:
    kind = "tokenized" if tokenized else "files"
    return open_source(Source(name="mine", kind=kind, files=tuple(map(str, files))), seed=0, d_vocab=64)


def defects(mine: DocumentSource) -> list[Defect]:
    return [row.content for row in mine.rows("train") if isinstance(row.content, Defect)]


def documents(mine: DocumentSource) -> list[object]:
    rows = [row for split in ("train", "held_out") for row in mine.rows(split)]
    return [row.content.content for row in rows if isinstance(row.content, Document)]


def test_all_of_the_golden_set_is_tested():
    assert {path.name for path in GOLDEN.iterdir()} - {".gitattributes"} == {name for name, _, _ in BAD} | set(GOOD)


@pytest.mark.parametrize(("name", "kind", "place"), BAD)
def test_a_bad_document_is_named_by_file_and_row_and_the_others_are_read(name: str, kind: str, place: str):
    mine = source(GOLDEN / name, tokenized=name in TOKENIZED)
    (defect,) = defects(mine)
    assert (defect.flaw.kind, defect.where) == (kind, f"{GOLDEN / name}, {place}")
    with pytest.raises(InputError, match=f"bad document: {kind}.*{name}, {place}.*on_bad_document=skip"):
        BadDocuments(skip=False).meet(defect)
    bad = BadDocuments(skip=True)
    bad.meet(defect)
    assert bad.counts == {kind: 1}
    assert len(documents(mine)) == (3 if place.endswith("3") else 0)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_what_is_odd_but_good_is_read_as_it_is(name: str):
    mine = source(GOLDEN / name)
    assert sorted(map(str, documents(mine))) == sorted(GOOD[name])
    assert defects(mine) == []


def test_the_lines_before_a_break_are_read_and_the_break_is_met_once(tmp_path: Path):
    lines = "".join(json.dumps({"text": f"Document number {i}."}) + "\n" for i in range(3000)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines) + gzip.compress(b"more")[:-9])
    (tmp_path / "b.jsonl").write_text('{"text": "in the next file"}\n')
    mine = source(tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl")
    rows = list(mine.rows("train"))
    (stop,) = (i for i, row in enumerate(rows) if isinstance(row.content, Defect))
    assert "line 2" in rows[stop].content.where  # type: ignore[union-attr]
    assert stop > 2800
    assert list(mine.rows("train", rows[stop].after)) == rows[stop + 1 :]
    assert "in the next file" in documents(mine)
