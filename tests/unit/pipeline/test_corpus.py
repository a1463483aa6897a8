import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Source
from pipeline.corpus import BadDocuments, FileSource, is_held_out_text, open_source
from storage.errors import InputError

TEXTS = [f"Document number {i} says something." for i in range(300)]
LINES = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in TEXTS)


def source(*patterns: Path | str, text_field: str = "text") -> FileSource:
    return FileSource(Source(name="mine", kind="files", files=tuple(map(str, patterns)), text_field=text_field))


def texts(file_source: FileSource, *, skip: bool = False) -> list[str]:
    return [
        document.text
        for split in ("train", "held_out")
        for document in file_source.documents(split, BadDocuments(skip=skip))
    ]


def test_jsonl_gzip_parquet_and_text_give_the_same_documents(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(LINES)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as handle:
        handle.write(LINES)
    pq.write_table(pa.table({"text": TEXTS, "n": list(range(300))}), tmp_path / "c.parquet")
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS[:20]):
        (folder / f"{i:03d}.txt").write_text(text)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert sorted(texts(source(tmp_path / name))) == sorted(TEXTS), name
    assert sorted(texts(source(folder / "*.txt"))) == sorted(TEXTS[:20])


def test_split_is_by_text_and_covers_everything_once(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(LINES)
    mine = source(tmp_path / "a.jsonl")
    bad = BadDocuments(skip=False)
    held_out = {document.text for document in mine.documents("held_out", bad)}
    train = {document.text for document in mine.documents("train", bad)}
    assert held_out == {text for text in TEXTS if is_held_out_text(text)}
    assert train == set(TEXTS) - held_out


def test_identity_is_content_alone(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.jsonl").write_text(LINES)
    assert source(tmp_path / "a.jsonl").identity() == source(tmp_path / "b.jsonl").identity()
    (tmp_path / "b.jsonl").write_text(LINES + "{}\n")
    assert source(tmp_path / "a.jsonl").identity() != source(tmp_path / "b.jsonl").identity()


def test_a_malformed_line_is_named(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "fine"}\n{"text": bro\n{"text": "fine"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 3"):
        texts(source(tmp_path / "a.jsonl"))


def test_a_truncated_gzip_is_named(tmp_path: Path):
    whole = gzip.compress(LINES.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"malformed file.*a\.jsonl\.gz"):
        texts(source(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize(
    ("row", "kind"),
    [({"text": None}, "null text"), ({"text": "  \n"}, "empty text"), ({"text": 3}, "text is not a string")],
)
def test_bad_documents_stop_or_are_counted(tmp_path: Path, row: dict[str, object], kind: str):
    rows = [row] if kind == "text is not a string" else [{"text": "fine"}, row]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    mine = source(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=f"{kind}.*row {len(rows)}"):
        texts(mine)
    bad = BadDocuments(skip=True)
    list(mine.documents("train", bad))
    assert bad.counts == {kind: 1}


def test_missing_files_fields_and_kinds_are_named(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(InputError, match="no file of source mine"):
        source(tmp_path / "*.parquet")
    with pytest.raises(InputError, match=r"not a kind of file.*\.jsonl"):
        source(tmp_path / "a.csv")
    with pytest.raises(InputError, match="expected body"):
        texts(source(tmp_path / "a.jsonl", text_field="body"))


def test_standard_library_order_is_seeded_and_complete():
    def names(seed: int) -> list[str]:
        prose = open_source(Source(name="prose", kind="standard-library-prose"), seed)
        return [document.name for document in prose.documents("held_out", BadDocuments(skip=False))]

    first, second = names(0), names(1)
    assert first != second
    assert sorted(first) == sorted(second)
