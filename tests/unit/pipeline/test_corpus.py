import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Source
from pipeline.corpus import open_source
from pipeline.corpus.documents import BadDocuments, Defect, Document, DocumentSource, Place, is_held_out_text
from storage.errors import InputError

TEXTS = [f"Document number {i} says something." for i in range(300)]
LINES = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in TEXTS)


def source(*patterns: Path | str, kind: str = "files", **fields: Any) -> DocumentSource:
    settings = Source.model_validate({"name": "mine", "kind": kind, "files": tuple(map(str, patterns))} | fields)
    return open_source(settings, seed=0, d_vocab=64)


def contents(of: DocumentSource, *, skip: bool = False) -> list[Any]:
    """Documents of both sides; defects stop, or are skipped."""
    bad = BadDocuments(skip=skip)
    found: list[Any] = []
    for split in ("train", "held_out"):
        for row in of.rows(split):
            if isinstance(row.content, Defect):
                bad.meet(row.content)
            else:
                found.append(row.content.content)
    return found


def write_every_format(folder: Path) -> list[Path]:
    (folder / "a.jsonl").write_text(LINES)
    with gzip.open(folder / "b.jsonl.gz", "wt") as handle:
        handle.write(LINES)
    (folder / "c.json.zst").write_bytes(pa.Codec("zstd").compress(LINES.encode(), asbytes=True))
    table = pa.table({"text": TEXTS, "n": list(range(300))})
    pq.write_table(table, folder / "d.parquet", row_group_size=70)
    with pa.ipc.new_file(folder / "e.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=90)
    with pa.ipc.new_stream(folder / "f.arrow", table.schema) as writer:
        writer.write_table(table)
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_documents(tmp_path: Path):
    for path in write_every_format(tmp_path):
        assert sorted(contents(source(path))) == sorted(TEXTS), path.name
    texts = tmp_path / "texts"
    texts.mkdir()
    for i, text in enumerate(TEXTS[:20]):
        (texts / f"{i:03d}.txt").write_text(text)
    assert sorted(contents(source(texts / "*.txt"))) == sorted(TEXTS[:20])


def test_reading_goes_on_behind_any_place(tmp_path: Path):
    write_every_format(tmp_path)
    mine = source(tmp_path / "*")
    rows = list(mine.rows("train"))
    assert len(rows) > 1500
    for number in (0, 1, 69, 298, 299, 700, len(rows) - 1):
        assert list(mine.rows("train", rows[number].after)) == rows[number + 1 :]


def test_split_is_by_text_and_covers_everything_once(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(LINES)
    sides = {}
    for split in ("train", "held_out"):
        found = [row.content for row in source(tmp_path / "a.jsonl").rows(split)]
        assert all(isinstance(one, Document) and one.held_out == (split == "held_out") for one in found)
        sides[split] = {one.content for one in found if isinstance(one, Document)}
    assert sides["held_out"] == {text for text in TEXTS if is_held_out_text(text)}
    assert sides["train"] == set(TEXTS) - sides["held_out"]


def test_identity_is_content_alone(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.jsonl").write_text(LINES)
    assert source(tmp_path / "a.jsonl").identity() == source(tmp_path / "b.jsonl").identity()
    (tmp_path / "b.jsonl").write_text(LINES + "{}\n")
    assert source(tmp_path / "a.jsonl").identity() != source(tmp_path / "b.jsonl").identity()


FINE = b'{"text": "fine words"}\n'


@pytest.mark.parametrize(
    ("name", "data", "kind", "line"),
    [
        ("malformed.jsonl", FINE + FINE + b'{"text": bro\n' + FINE, "malformed line", 3),
        ("list.jsonl", FINE + b"[1]\n", "malformed line", 2),
        ("field.jsonl", FINE + b'{"body": "x"}\n', "missing field", 2),
        ("null.jsonl", FINE + b'{"text": null}\n', "null text", 2),
        ("number.jsonl", b'{"text": 3}\n', "text is not a string", 1),
        ("blank.jsonl", FINE + b'{"text": "  \\n"}\n', "empty text", 2),
        ("utf8.jsonl", FINE + b'{"text": "\xff\xfe"}\n', "invalid UTF-8", 2),
        ("surrogate.jsonl", FINE + b'{"text": "a \\ud800 b"}\n', "lone surrogate", 2),
        ("deep.jsonl", FINE + b"[" * 100_000 + b"\n", "malformed line", 2),
        ("utf8.txt", b"\xff\xfe", "invalid UTF-8", 1),
        ("broken.parquet", b"PAR1 not really", "broken file", 1),
    ],
)
def test_a_bad_document_stops_naming_file_and_row_or_is_counted(
    tmp_path: Path, name: str, data: bytes, kind: str, line: int
):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{kind}.*{name}, (line|row) {line}"):
        contents(source(tmp_path / name))
    bad = BadDocuments(skip=True)
    kept = 0
    for row in source(tmp_path / name).rows("train"):
        if isinstance(row.content, Defect):
            bad.meet(row.content)
        else:
            kept += 1
    assert bad.counts == {kind: 1}
    assert kept == data.count(FINE)


def test_a_truncated_gzip_gives_what_it_holds_and_is_named(tmp_path: Path):
    whole = gzip.compress(LINES.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz, line"):
        contents(source(tmp_path / "a.jsonl.gz"))
    assert set(contents(source(tmp_path / "a.jsonl.gz"), skip=True)) < set(TEXTS)


def test_bom_crlf_and_a_missing_last_newline_are_no_defects(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "one"}\r\n\r\n{"text": "two"}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree\r\n")
    assert sorted(contents(source(tmp_path / "*"))) == ["one", "three\r\n", "two"]


def test_missing_files_fields_and_kinds_are_named(tmp_path: Path):
    write_every_format(tmp_path)
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(InputError, match="nothing for source mine"):
        source(tmp_path / "*.xyz")
    with pytest.raises(InputError, match=r"not a kind of file.*\.jsonl"):
        source(tmp_path / "a.csv")
    for name in ("a.jsonl", "d.parquet", "e.arrow"):
        with pytest.raises(InputError, match="expected body"):
            contents(source(tmp_path / name, text_field="body"))


def test_rows_of_ids_are_read_and_ids_outside_the_vocabulary_named(tmp_path: Path):
    rows = np.random.default_rng(0).integers(0, 64, (50, 32))
    pq.write_table(pa.table({"tokens": rows.tolist()}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"tokens": row.tolist()}) + "\n" for row in rows))
    for name in ("a.parquet", "b.jsonl"):
        found = contents(source(tmp_path / name, kind="tokenized"))
        assert sorted(row.tolist() for row in found) == sorted(rows.tolist())
        assert all(row.dtype == np.int32 for row in found)
    (tmp_path / "c.jsonl").write_text('{"tokens": [1, 2, 64]}\n{"tokens": null}\n{"tokens": ["x"]}\n')
    with pytest.raises(InputError, match=r"outside the vocabulary.*c\.jsonl, line 1.*64 at position 2.*0 to 63"):
        contents(source(tmp_path / "c.jsonl", kind="tokenized"))
    assert contents(source(tmp_path / "c.jsonl", kind="tokenized"), skip=True) == []


def test_a_folder_of_code_leaves_out_what_is_none(tmp_path: Path):
    files = {
        "a.py": b"a = 1\n", "b/c.py": b"c = 2\n", "b/d.txt": b"text", ".hidden/e.py": b"e = 3\n", ".f.py": b"f = 4\n",
        "g.py": b"\0binary", "h.py": b" \n",
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert sorted(contents(source(tmp_path, kind="folder"))) == ["a = 1\n", "c = 2\n"]
    assert sorted(contents(source(tmp_path, kind="folder", suffixes=(".txt",)))) == ["text"]


def test_standard_library_order_is_seeded_and_complete():
    def names(seed: int) -> list[str]:
        prose = open_source(Source(name="prose", kind="standard-library-prose"), seed=seed, d_vocab=10)
        return [row.content.name for row in prose.rows("held_out") if isinstance(row.content, Document)]

    first, second = names(0), names(1)
    assert first != second
    assert sorted(first) == sorted(second)
    prose = open_source(Source(name="prose", kind="standard-library-prose"), seed=0, d_vocab=10)
    rows = list(prose.rows("held_out"))
    assert list(prose.rows("held_out", rows[5].after)) == rows[6:]
    assert rows[0].after > Place(0, 0)
