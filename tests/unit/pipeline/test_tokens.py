import json
from pathlib import Path

import numpy as np
import pytest

from pipeline import text_encoding, tokenizing, tokens
from pipeline.config import Runtime, Source, TokenizeConfig, load_preset
from pipeline.corpus.documents import Document, Place, Row, text_document
from pipeline.model_files import find_files
from pipeline.progress import Quiet
from pipeline.tokens import TokenTable
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.errors import CorruptArtifact, InputError


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(Runtime(root=tmp_path / "store"), Quiet())


def config(preset: Path, **changes: object) -> TokenizeConfig:
    return load_preset(str(preset)).tokenize.model_copy(update=changes)


def made(preset: Path, workspace: Workspace, **changes: object) -> Artifact:
    return tokens.tokenize(config(preset, **changes), workspace).artifact


def test_prompts_are_whole_begin_with_bos_and_stay_within_the_budget(tiny_preset: Path, workspace: Workspace):
    table = TokenTable(made(tiny_preset, workspace))
    prompts = table.prompts("train")
    assert prompts.shape == (40_000 // 16, 16)
    assert (prompts[:, 0] == 0).all()
    assert (prompts[:, 1:] != 0).all()
    assert table.prompts("held_out").shape == (600 // 16, 16)
    np.testing.assert_array_equal(table.prompts("train", [7, 3, 7]), prompts[[7, 3, 7]])


def test_a_prompt_belongs_to_the_document_it_begins_in(tiny_preset: Path, tiny_corpus: Path, workspace: Workspace):
    table = TokenTable(made(tiny_preset, workspace))
    texts = [json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()]
    documents = table.documents().to_pylist()
    first = table.column("train", "document")
    for prompt in (0, 17, 900):
        document = documents[first[prompt]]
        words = texts[int(document["name"].partition("#")[2]) - 1].split()
        head = [int(token) for token in table.prompts("train", [prompt])[0, 1:]]
        head = head[: head.index(1)] if 1 in head else head
        spelled = [f"word_{token - 2}" for token in head]
        assert any(words[i : i + len(spelled)] == spelled for i in range(len(words)))
        assert document["split"] == "train"


def test_duplicates_are_left_out_once_and_counted(tiny_preset: Path, tmp_path: Path, workspace: Workspace):
    rows = [{"text": f"word_{i % 50} word_3 word_{i // 50}"} for i in range(1000)]
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + rows[:200]))
    source = config(tiny_preset).sources[0].model_copy(update={"files": (str(path),)})
    artifact = made(tiny_preset, workspace, sources=(source,), held_out_tokens=32)
    documents = facts(artifact)["train"]["sources"]["words"]
    held_out = facts(artifact)["held_out"]["sources"]["words"]
    assert documents["duplicates_left_out"] + held_out["duplicates_left_out"] >= 195
    numbered = TokenTable(artifact).documents()
    assert len(set(numbered["number"].to_pylist())) == len(numbered)


def test_shares_divide_the_tokens(tiny_preset: Path, tiny_corpus: Path, tmp_path: Path, workspace: Workspace):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"word_1 word_{i % 60} word_{i % 61}"}) + "\n" for i in range(3000)))
    one = config(tiny_preset).sources[0]
    sources = (
        one.model_copy(update={"name": "a", "share": 0.75}),
        one.model_copy(update={"name": "b", "share": 0.25, "files": (str(other),)}),
    )
    artifact = made(tiny_preset, workspace, sources=sources, train_tokens=16_000, held_out_tokens=160)
    shares = {name: source["share_of_tokens"] for name, source in facts(artifact)["train"]["sources"].items()}
    assert shares == {"a": 0.75, "b": 0.25}
    source = TokenTable(artifact).column("train", "source")
    assert np.bincount(source).tolist() == [750, 250]


def test_no_usable_text_is_an_error_and_commits_nothing(tiny_preset: Path, tmp_path: Path, workspace: Workspace):
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "word_1"}\n')
    source = config(tiny_preset).sources[0].model_copy(update={"files": (str(path),)})
    with pytest.raises(InputError, match="no usable tokens"):
        made(tiny_preset, workspace, sources=(source,))
    assert workspace.store.list() == []


def test_identity_follows_content_and_ignores_where_files_lie(
    tiny_preset: Path, tiny_corpus: Path, tmp_path: Path, workspace: Workspace
):
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(tiny_corpus.read_bytes())
    source = config(tiny_preset).sources[0].model_copy(update={"files": (str(moved),)})
    assert made(tiny_preset, workspace, sources=(source,)).id == made(tiny_preset, workspace).id
    assert made(tiny_preset, workspace, seed=1).id != made(tiny_preset, workspace).id


def test_files_split_over_several_arrow_files_read_back_alike(
    tiny_preset: Path, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = TokenTable(made(tiny_preset, workspace)).prompts("train")
    monkeypatch.setattr(tokenizing, "PROMPTS_PER_ROUND", 700)
    other = Workspace.open(Runtime(root=tmp_path / "other"), Quiet())
    table = TokenTable(made(tiny_preset, other))
    assert sum(name.startswith("train-") for name in table.artifact.manifest.files) == 4
    np.testing.assert_array_equal(table.prompts("train"), whole)


def test_prompts_come_from_every_file_in_any_order(
    tiny_preset: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    whole = TokenTable(made(tiny_preset, workspace)).prompts("train")
    monkeypatch.setattr(tokenizing, "PROMPTS_PER_ROUND", 300)
    elsewhere = Workspace.open(Runtime(root=workspace.runtime.root.with_name("small-files")))
    table = TokenTable(made(tiny_preset, elsewhere))
    assert len([name for name in table.artifact.manifest.files if name.startswith("train-")]) == 9
    numbers = np.random.default_rng(0).integers(0, 2500, 400)
    np.testing.assert_array_equal(table.prompts("train", numbers), whole[numbers])
    np.testing.assert_array_equal(table.prompts("train"), whole)
    assert table.prompts("train", []).shape == (0, 16)


@pytest.mark.parametrize("number", [-1, 2500])
def test_a_prompt_that_is_not_there_is_named(tiny_preset: Path, workspace: Workspace, number: int):
    table = TokenTable(made(tiny_preset, workspace))
    with pytest.raises(InputError, match=f"no such train prompt.*{number}"):
        table.prompts("train", [0, number])


def test_a_flipped_token_is_an_error_not_another_prompt(tiny_preset: Path, workspace: Workspace):
    artifact = made(tiny_preset, workspace)
    path = artifact.folder / "train-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    table = TokenTable(artifact)
    assert table.prompts("held_out").shape == (600 // 16, 16)
    with pytest.raises(CorruptArtifact, match=r"train-00000\.arrow"):
        table.prompts("train", [0])


def test_a_tokenizing_killed_after_any_round_goes_on_and_ends_with_the_same_bytes(
    tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class KilledError(Exception):
        pass

    monkeypatch.setattr(tokenizing, "PROMPTS_PER_ROUND", 600)
    whole = made(tiny_preset, Workspace.open(Runtime(root=tmp_path / "whole"), Quiet()))
    finish = tokenizing.Tokenizing._finish_round
    root = tmp_path / "killed"
    for rounds in range(1, 5):

        def finish_and_die(self: tokenizing.Tokenizing, *rest: object) -> None:
            finish(self, *rest)  # type: ignore[arg-type]
            raise KilledError

        monkeypatch.setattr(tokenizing.Tokenizing, "_finish_round", finish_and_die)
        with pytest.raises(KilledError):
            made(tiny_preset, Workspace.open(Runtime(root=root), Quiet()))
        assert len(list(root.glob(".staging/tokenize-*/files/train-*.arrow"))) == rounds
    monkeypatch.setattr(tokenizing.Tokenizing, "_finish_round", finish)
    resumed = made(tiny_preset, Workspace.open(Runtime(root=root), Quiet()))
    assert resumed.manifest_sha256 == whole.manifest_sha256


def test_a_long_text_is_encoded_in_pieces_whose_ids_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    tokenizer = find_files("demo").read_tokenizer()
    rng = np.random.default_rng(0)
    words = ["alpha", "beta,", "  gamma", "def f(x):\n    return x", "1234567", "\n\n", "naïve", "日本語"]
    text = " ".join(words[i] for i in rng.integers(0, len(words), 5000))
    monkeypatch.setattr(text_encoding, "PIECE_CHARACTERS", 1000)
    document = text_document("long", text)
    assert isinstance(document, Document)
    with text_encoding.ThreadWork(tokenizer, 2) as threads:
        encoder = text_encoding.TextEncoder(tokenizer, threads)
        (encoded,) = encoder.encode([Row(Place(0, 1), document)], set[int]().__contains__)
    assert encoded.inexact_cuts == 0
    assert encoded.ids is not None
    assert np.concatenate(encoded.ids).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_prompts_without_bos_and_eos_hold_nothing_but_text(tiny_preset: Path, workspace: Workspace):
    table = TokenTable(made(tiny_preset, workspace, bos=False, eos=False))
    assert (table.prompts("train") > 1).all()
    assert (TokenTable(made(tiny_preset, workspace, eos=False)).prompts("train")[:, 1:] > 1).all()


def test_rows_of_ids_are_cut_as_the_post_cut_them(tiny_preset: Path, tmp_path: Path, workspace: Workspace):
    rows = np.random.default_rng(0).integers(2, 64, (400, 1024 // 8))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"tokens": row.tolist()}) + "\n" for row in rows))
    source = Source(name="ids", kind="tokenized", files=(str(path),))
    table = TokenTable(made(tiny_preset, workspace, sources=(source,), train_tokens=30_000, held_out_tokens=64))
    expected = rows.reshape(-1, 16).copy()
    expected[:, 0] = 0
    found = np.concatenate([table.prompts("train"), table.prompts("held_out")])
    assert {tuple(row) for row in found.tolist()} <= {tuple(row) for row in expected.tolist()}
    assert len(table.prompts("train")) == 30_000 // 16
