import os
from collections.abc import Iterator

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from pipeline import text_encoding
from pipeline.corpus.documents import Defect, Document, Flaw, Place, Row, text_document
from pipeline.model_files import find_files
from pipeline.text_encoding import Encoded, TextEncoder, ThreadWork, pieces

WORDS = [
    "alpha", "beta,", "  gamma", "def f(x):\n    return x", "1234567", "\n\n", "naïve", "日本語", "🤖🤖", "don't", "\t",
]  # fmt: skip


def demo() -> Tokenizer:
    return find_files("demo").read_tokenizer()


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *" ".join(WORDS).split()])}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def metaspace() -> Tokenizer:
    """As SentencePiece makes them: a word begins with a sign for the space before it, the text with one of its own."""
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator([text(2000)], trainer)
    return tokenizer


def prepended() -> Tokenizer:
    """As older conversions of SentencePiece: each text gets a space of its own, so no cut is exact."""
    tokenizer = metaspace()
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[list-item]
    return tokenizer


def text(n: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), n))


def row(number: int, content: str) -> Row:
    document = text_document(str(number), content)
    assert isinstance(document, Document)
    return Row(Place(0, number), document)


def encoded(tokenizer: Tokenizer, rows: list[Row], known: frozenset[int] = frozenset()) -> list[Encoded]:
    with ThreadWork(tokenizer, 2) as threads:
        return list(TextEncoder(tokenizer, threads).encode(rows, known.__contains__))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoding, "PIECE_CHARACTERS", 1000)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("make", [demo, words, metaspace])
def test_ids_of_a_long_texts_pieces_are_those_of_the_whole(make: object):
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    for seed in range(3):
        whole = text(2000, seed)
        (found,) = encoded(tokenizer, [row(1, whole)])
        assert found.ids is not None
        assert np.concatenate(found.ids).tolist() == tokenizer.encode(whole, add_special_tokens=False).ids
        assert found.inexact_cuts == 0


@pytest.mark.usefixtures("small_pieces")
def test_ids_of_a_long_text_come_in_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_encoding, "_BLOCK_IDS", 2000)
    whole, short = text(5000), text(20)
    first, second = encoded(words(), [row(1, whole), row(2, short)])
    assert first.ids is not None
    assert second.ids is not None
    assert all(len(block) > 2000 for block in first.ids[:-1])
    assert len(first.ids) > 2
    assert np.concatenate(first.ids).tolist() == words().encode(whole).ids
    assert np.concatenate(second.ids).tolist() == words().encode(short).ids


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("make", "whole"), [(prepended, text(600)), (demo, "0123456789" * 400)])
def test_cuts_that_may_change_ids_are_made_and_counted(make: object, whole: str):
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    (found,) = encoded(tokenizer, [row(1, whole)])
    cut = [piece for piece, _, _ in pieces(whole, lambda part: tokenizer.encode(part, add_special_tokens=False).ids)]
    assert "".join(cut) == whole
    assert found.inexact_cuts == len(cut) - 1 == (len(whole) - 1) // 1000
    assert found.ids is not None
    assert np.concatenate(found.ids).tolist() == [
        i for piece in cut for i in tokenizer.encode(piece, add_special_tokens=False).ids
    ]


@pytest.mark.usefixtures("small_pieces")
def test_rows_of_all_kinds_come_in_their_order_and_known_texts_are_not_encoded():
    tokenizer = words()
    rows = [row(i, "alpha " + text(1 + i % 700, seed=i)) for i in range(300)]
    known = frozenset(one.content.digest for one in rows[::7] if isinstance(one.content, Document))
    rows.insert(11, Row(Place(0, 999), Defect("a.jsonl, line 999", Flaw("null text"))))
    rows.insert(150, Row(Place(1, 1), Document("ids", np.array([3, 1, 2], np.int32), 5, held_out=False)))
    found = encoded(tokenizer, rows, known)
    assert [one.row.after for one in found] == [one.after for one in rows]
    for one, read in zip(found, rows, strict=True):
        assert one.row is read or (isinstance(read.content, Document) and len(read.content.content) > 1000)
        content = read.content
        if isinstance(content, Defect) or content.digest in known:
            assert one.ids is None
        elif isinstance(content.content, str):
            assert one.ids is not None
            assert np.concatenate(one.ids).tolist() == tokenizer.encode(content.content).ids
        else:
            assert one.ids == (content.content,)


def test_padding_truncation_and_special_tokens_of_the_tokenizers_file_are_not_applied():
    tokenizer = words()
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(3)
    (found,) = encoded(tokenizer, [row(1, "alpha beta, naïve don't 日本語")])
    assert found.ids is not None
    assert len(found.ids[0]) == 5


def test_reading_ahead_is_bounded():
    read = 0

    def endless() -> Iterator[Row]:
        nonlocal read
        while True:
            read += 1
            yield row(read, "alpha " * 1000)

    with ThreadWork(words(), 2) as threads:
        stream = TextEncoder(words(), threads).encode(endless(), frozenset[int]().__contains__, most_ahead=60_000)
        for _ in range(50):
            next(stream)
        assert 50 < read <= 50 + 60_000 // 6000 + 6


@pytest.mark.parametrize("before", [None, "true"])
def test_the_switch_of_tokenizers_own_threads_is_put_back(before: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    with ThreadWork(words(), 1):
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before
