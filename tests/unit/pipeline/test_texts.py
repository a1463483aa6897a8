import json
from pathlib import Path

import pytest

from pipeline import tokens
from pipeline.config import Runtime, Source, TokenizeConfig
from pipeline.corpus.documents import is_held_out_text
from pipeline.progress import Quiet
from pipeline.texts import Texts, texts_of
from pipeline.workspace import Workspace
from storage.artifact import Artifact
from storage.artifacts import Result, Spec
from storage.errors import ConfigError, InputError

DOCUMENTS = [
    "def area(width, height):\n    return width * height  # in metres\n" * 3,
    "naïve café — 5 € für 日本語 und 🤖🤖, ſo Ωmega; " * 3,
    "a real replacement sign \ufffd in the text, <b>&amp;</b>; " * 3,
]


def harvested_from(model: str, tokens: Artifact, workspace: Workspace) -> Artifact:
    """What texts_of reads of a harvest: the model's name in its figures."""
    spec = Spec("harvest", 1, {"model": model}, {"tokens": tokens.as_parent()})
    return workspace.make(spec, lambda _: Result({"language_model": model})).artifact


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace.open(Runtime(root=tmp_path_factory.mktemp("home") / "store"), Quiet())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory, workspace: Workspace) -> Artifact:
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    held_out = [text for text in (f"held out {i}" for i in range(2000)) if is_held_out_text(text)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS + held_out))
    source = Source(name="mine", kind="files", files=(str(path),))
    config = TokenizeConfig(
        language_model="demo", sources=(source,), train_tokens=40 * 24, held_out_tokens=24, prompt_tokens=24
    )
    return tokens.tokenize(config, workspace).artifact


@pytest.fixture(scope="module")
def texts(prompts: Artifact, workspace: Workspace) -> Texts:
    return texts_of(harvested_from("demo", prompts, workspace), prompts)


def all_positions(prompts: Artifact) -> list[tuple[int, int]]:
    return [(p, t) for p in range(tokens.TokenTable(prompts).n_prompts("train")) for t in range(24)]


def test_prompts_are_the_documents_text_with_the_special_tokens_visible(texts: Texts, prompts: Artifact):
    table = tokens.TokenTable(prompts)
    for prompt in range(table.n_prompts("train")):
        special, _, text = texts.prompt(prompt).partition("<|BOS|>")
        assert special == ""
        for part in text.split("<|EOS|>"):
            whole = part.strip("\ufffd")  # a character that the prompt's end cuts in two
            assert any(whole in document for document in DOCUMENTS)
    assert any("<|EOS|>" in texts.prompt(prompt) for prompt in range(table.n_prompts("train")))


def test_the_three_parts_are_the_prompt_wherever_it_is_cut(texts: Texts, prompts: Artifact):
    for prompt, position in all_positions(prompts):
        found = texts.around(prompt, position, before=24, after=24)
        assert found.before + found.token + found.after == texts.prompt(prompt)
        assert found.token


def test_no_character_is_cut_at_a_token_or_at_an_excerpts_ends(texts: Texts, prompts: Artifact):
    known = set("".join(DOCUMENTS)) - {"\ufffd"}
    several = 0
    for prompt, position in all_positions(prompts):
        whole = texts.prompt(prompt)
        found = texts.around(prompt, position, before=1, after=1)
        if "\ufffd" not in whole:
            several += not set(found.token) <= set(map(chr, range(128)))
            assert "\ufffd" not in str(found)
            assert set(found.token) <= known | set("<|BOSE>")
    assert several >= 10


def test_a_replacement_sign_of_the_text_itself_is_a_character_like_others(texts: Texts, prompts: Artifact):
    tokens_with_sign = {texts.around(*place, 0, 0).token for place in all_positions(prompts)}
    assert any(token.strip() == "\ufffd" for token in tokens_with_sign)


def test_as_many_tokens_as_asked_for_stand_before_and_after(texts: Texts, prompts: Artifact):
    ids = tokens.TokenTable(prompts).prompts("train", [0])[0].tolist()
    tokenizer, _ = tokens.tokenizer_of("demo")
    for position in range(1, 20):
        found = texts.around(0, position, before=3, after=2)
        first = max(0, position - 3)
        assert found.before == tokenizer.decode(ids[first:position], skip_special_tokens=False)
        assert found.token == tokenizer.decode(ids[position : position + 1])
        assert found.after == tokenizer.decode(ids[position + 1 : position + 3])


def test_the_token_is_marked_and_html_is_escaped(texts: Texts, prompts: Artifact):
    found = texts.around(0, 0, after=2)
    assert str(found) == f"«<|BOS|>»{found.after}"
    assert found._repr_html_() == f"<pre><mark>&lt;|BOS|&gt;</mark>{found.after}</pre>"


def test_a_prompt_names_its_source_and_the_document_it_begins_in(texts: Texts, prompts: Artifact):
    table = tokens.TokenTable(prompts)
    for prompt in range(table.n_prompts("train")):
        source, document = texts.source(prompt)
        assert source == "mine"
        line = int(document.partition("#")[2]) - 1
        begin = texts.prompt(prompt).removeprefix("<|BOS|>").partition("<|EOS|>")[0].strip("\ufffd")
        assert begin in DOCUMENTS[line]


@pytest.mark.parametrize(
    ("prompt", "position", "before"), [(-1, 1, 1), (10**6, 1, 1), (0, 24, 1), (0, -1, 1), (0, 1, -1)]
)
def test_what_is_not_there_is_refused(texts: Texts, prompt: int, position: int, before: int):
    with pytest.raises(InputError, match="no such"):
        texts.around(prompt, position, before=before)


def test_another_tokenizer_under_the_models_name_is_refused(prompts: Artifact, workspace: Workspace, tiny_model: Path):
    with pytest.raises(ConfigError, match="another tokenizer"):
        texts_of(harvested_from(str(tiny_model), prompts, workspace), prompts)
