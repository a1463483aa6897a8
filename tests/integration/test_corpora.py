"""Corpora by their real file formats: data sets of the Hub online and offline, mixtures, kills, bad files."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import tokenizing, tokens
from pipeline.config import Runtime, Source, TokenizeConfig
from pipeline.progress import Quiet
from pipeline.tokens import TokenTable
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.errors import InputError
from tests.integration.hub import Hub

ROOT = Path(__file__).parents[2]
RUN = """
import json, sys
from pathlib import Path
from pipeline import tokenizing, tokens
from pipeline.config import Runtime, TokenizeConfig
from pipeline.progress import Quiet
from pipeline.workspace import Workspace
root, per_round, *configs = sys.argv[1:]
tokenizing.PROMPTS_PER_ROUND = int(per_round)
print("ready", flush=True)
for config in configs:
    try:
        workspace = Workspace.open(Runtime(root=Path(root), threads=1), Quiet())
        made = tokens.tokenize(TokenizeConfig.model_validate_json(config), workspace)
        print(json.dumps([made.artifact.id, made.artifact.manifest_sha256, made.status]), flush=True)
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error), ""]), flush=True)
"""
C4 = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: realnewslike
  data_files:
  - split: train
    path: realnewslike/c4-train.*.json.gz
---
# C4
"""


def start(
    root: Path, *configs: TokenizeConfig, per_round: int = 200, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    arguments = [str(root), str(per_round), *(config.model_dump_json() for config in configs)]
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments], cwd=ROOT, env=os.environ | dict(env or {}),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> list[list[str]]:
    """Of each config the id, the manifest's hash and the status; or the error's name and text."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines() if line != "ready"]


def words(n: int, seed: int, low: int = 0, high: int = 61) -> Iterator[str]:
    """Documents of 20 to 60 words that the tiny tokenizer knows."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield " ".join(f"word_{word}" for word in rng.integers(low, high, rng.integers(20, 60)))


def gz(texts: Iterator[str], field: str = "text") -> bytes:
    lines = "".join(json.dumps({field: text, "timestamp": "2019", "url": "x"}) + "\n" for text in texts)
    return gzip.compress(lines.encode(), mtime=0)


def parquet(column: str, values: Sequence[Any], kind: pa.DataType) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: pa.array(values, kind)}), sink, row_group_size=100)
    return sink.getvalue().to_pybytes()


def config(model: Path, *sources: Source, **changes: Any) -> TokenizeConfig:
    settings: dict[str, Any] = {
        "language_model": str(model), "sources": [source.model_dump() for source in sources], "prompt_tokens": 16,
        "train_tokens": 16_000, "held_out_tokens": 320,
    }  # fmt: skip
    return TokenizeConfig.model_validate(settings | changes)


def tokenized(wanted: TokenizeConfig, root: Path) -> Artifact:
    return tokens.tokenize(wanted, Workspace.open(Runtime(root=root), Quiet())).artifact


def opened(root: Path, artifact_id: str) -> TokenTable:
    return TokenTable(Workspace.open(Runtime(root=root), Quiet()).store.open(artifact_id))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """The data sets of the experiment, as they lie on the Hub, each a thousandth of its size or less."""
    hub = Hub(tmp_path_factory.mktemp("hub"))
    c4 = {f"en/c4-train.{i:05d}-of-00012.json.gz": gz(words(150, i, 0, 30)) for i in range(12)}
    c4 |= {f"en/c4-validation.{i:05d}-of-00002.json.gz": gz(words(50, 100 + i)) for i in range(2)}
    c4 |= {f"realnewslike/c4-train.{i:05d}-of-00002.json.gz": gz(words(50, 200 + i)) for i in range(2)}
    hub.commit("allenai/c4", {"README.md": C4.encode(), "c4.py": b"raise SystemExit", **c4}, "datasets")
    code = {f"file-{i:012d}.json.gz": gz(words(100, 300 + i, 30, 61), "content") for i in range(1, 4)}
    hub.commit("codeparrot/codeparrot-clean", {"README.md": b"# Code\n", **code}, "datasets")
    raw = {"data/train-00000-of-00001-0a1b2c3d4e5f6071.parquet": parquet("text", list(words(2000, 7)), pa.string())}
    hub.commit("NeelNanda/c4-code-20k", {"README.md": b"# 20k\n", **raw}, "datasets")
    rows = [np.random.default_rng(i).integers(2, 64, (150, 1024)).tolist() for i in range(2)]
    two_b = {
        f"data/train-{i:05d}-of-00002-0a1b2c3d4e5f6071.parquet": parquet("tokens", rows[i], pa.list_(pa.int64()))
        for i in range(2)
    }
    hub.commit("NeelNanda/c4-code-tokenized-2b", two_b, "datasets")
    return hub


@pytest.fixture(scope="module")
def wanted(tiny_model: Path) -> list[TokenizeConfig]:
    mixture = (
        Source(name="web", kind="hub", data_set="allenai/c4", config="en", share=0.8),
        Source(name="code", kind="hub", data_set="codeparrot/codeparrot-clean", text_field="content", share=0.2),
    )
    post = Source(name="c4-code", kind="tokenized", data_set="NeelNanda/c4-code-tokenized-2b")
    return [
        config(tiny_model, *mixture),
        config(tiny_model, post, prompt_tokens=128, train_tokens=100_000, held_out_tokens=1024),
        config(tiny_model, Source(name="raw", kind="hub", data_set="NeelNanda/c4-code-20k")),
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder HF_HOME that the online run fills."""
    return tmp_path_factory.mktemp("hf-home")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home") / "store"


@pytest.fixture(scope="module")
def online(hub: Hub, wanted: list[TokenizeConfig], home: Path, root: Path) -> list[list[str]]:
    with hub.served() as env:
        found = finish(start(root, *wanted, env={**env, "HF_HOME": str(home)}))
    assert [status for _, _, status in found] == ["made"] * 3, found
    return found


def test_the_mixture_of_two_data_sets_is_by_tokens_in_any_stretch(online: list[list[str]], root: Path):
    table = opened(root, online[0][0])
    assert facts(table.artifact)["train"]["prompts"] == 1000
    for split, n in (("train", 1000), ("held_out", 20)):
        source = table.column(split, "source")
        assert np.bincount(source).tolist() == [n * 8 // 10, n * 2 // 10]
    stretches = table.column("train", "source").reshape(-1, 50).mean(1)
    assert (np.abs(stretches - 0.2) < 0.05).all()
    prompts, source = table.prompts("train"), table.column("train", "source")
    text = prompts[prompts > 1]
    assert text.max() <= 62
    assert (prompts[source == 0] < 32).all()
    assert ((prompts[source == 1] >= 32) | (prompts[source == 1] <= 1)).all()


def test_commits_are_recorded_and_only_the_files_that_are_needed_are_fetched(
    online: list[list[str]], root: Path, hub: Hub
):
    artifact = opened(root, online[0][0]).artifact
    recorded: Any = artifact.config["sources"]
    for source in recorded:
        assert source["commit"] == hub.resolve("datasets", source["data_set"], "main")
    fetched = {name for name in hub.files("datasets", "allenai/c4", recorded[0]["commit"]) if _was_fetched(hub, name)}
    assert fetched - {"README.md"} == {f"en/c4-train.{i:05d}-of-00012.json.gz" for i in range(len(fetched) - 1)}
    assert 4 <= len(fetched) <= 11


def _was_fetched(hub: Hub, name: str) -> bool:
    return any("/resolve/" in line and line.split()[0] == '"GET' and name in line for line in hub.requests)


def test_rows_of_1024_ids_become_8_prompts_of_128(online: list[list[str]], root: Path):
    table = opened(root, online[1][0])
    expected = np.concatenate([np.random.default_rng(i).integers(2, 64, (150, 1024)) for i in range(2)])
    assert table.n_prompts("train") == 100_000 // 128
    documents = table.documents().to_pylist()
    number = table.column("train", "document")
    prompts = table.prompts("train")
    for prompt in range(0, 781, 60):
        name, _, row = documents[number[prompt]]["name"].rpartition("#")
        cut = expected[int(name[len("data/train-") :][:5]) * 150 + int(row) - 1].reshape(8, 128).copy()
        cut[:, 0] = 0
        assert (prompts[prompt] == cut).all(1).any()


def test_offline_the_cache_gives_the_same_bytes(
    online: list[list[str]], wanted: list[TokenizeConfig], home: Path, tmp_path: Path
):
    env = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert finish(start(tmp_path / "offline", *wanted, env=env)) == online


def test_offline_what_the_cache_lacks_is_named(
    online: list[list[str]], wanted: list[TokenizeConfig], home: Path, tmp_path: Path
):
    env = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    more = wanted[0].model_copy(update={"train_tokens": 90_000})
    other = Source(name="x", kind="hub", data_set="allenai/dolma")
    elsewhere = wanted[0].model_copy(update={"sources": (other,)})
    (first, second) = finish(start(tmp_path / "offline", more, elsewhere, env=env))
    assert first[0] == second[0] == "InputError"
    assert "en/c4-train.000" in first[1]
    assert "-of-00012.json.gz is not to be had; where: allenai/c4@main" in first[1]
    assert "its list of files is not to be had; where: allenai/dolma@main" in second[1]


def test_a_cache_that_holds_no_list_serves_as_far_as_it_reaches(
    hub: Hub, online: list[list[str]], wanted: list[TokenizeConfig], tmp_path: Path
):
    for name in (
        "allenai/c4",
        "codeparrot/codeparrot-clean",
        "NeelNanda/c4-code-tokenized-2b",
        "NeelNanda/c4-code-20k",
    ):
        hub.fill_cache(tmp_path / "hf" / "hub", name, "datasets")
    (missing,) = (tmp_path / "hf").rglob("en/c4-train.00011-of-00012.json.gz")
    missing.unlink()
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    beyond = wanted[0].model_copy(update={"train_tokens": 200_000})
    *found, last = finish(start(tmp_path / "store", *wanted, beyond, env=env))
    assert found == online
    assert "en/c4-train.00011-of-00012.json.gz is not to be had" in last[1]


def test_a_pinned_commit_is_found_again_without_the_hub(
    hub: Hub, online: list[list[str]], wanted: list[TokenizeConfig], root: Path, tmp_path: Path
):
    commits = [hub.resolve("datasets", source.data_set, "main") for source in wanted[0].sources]
    pinned = tuple(s.model_copy(update={"revision": c}) for s, c in zip(wanted[0].sources, commits, strict=True))
    env = {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    (found,) = finish(start(root, wanted[0].model_copy(update={"sources": pinned}), env=env))
    assert found == [*online[0][:2], "cached"]


def test_a_moved_data_set_is_another_artifact_and_wrong_names_are_explained(
    wanted: list[TokenizeConfig], tmp_path: Path
):
    hub = Hub(tmp_path / "hub")
    files = {"data/train-00000-of-00001.parquet": parquet("text", list(words(1500, 1)), pa.string())}
    hub.commit("NeelNanda/c4-code-20k", files, "datasets")
    c4 = {"README.md": C4.encode(), "en/c4-train.00000-of-00001.json.gz": gz(words(9, 1))}
    hub.commit("allenai/c4", {**c4, "en/c4-validation.00000-of-00001.json.gz": gz(words(9, 2))}, "datasets")
    raw, web = wanted[2].sources[0], wanted[0].sources[0].model_copy(update={"share": 1.0})
    wrong = [
        web.model_copy(update={"config": "en.noblocklist"}), web.model_copy(update={"split": "test"}),
        web.model_copy(update={"config": ""}), web.model_copy(update={"data_set": "allenai/c5"}),
        raw.model_copy(update={"text_field": "content"}), web.model_copy(update={"revision": "v9"}),
    ]  # fmt: skip
    configs = [wanted[2].model_copy(update={"sources": (source,)}) for source in (raw, *wrong)]
    with hub.served() as env:
        env |= {"HF_HOME": str(tmp_path / "home")}
        before, *errors = finish(start(tmp_path / "store", *configs, env=env))
        hub.commit("NeelNanda/c4-code-20k", {**files, "README.md": b"moved"}, "datasets")
        (after,) = finish(start(tmp_path / "store", configs[0], env=env))
    assert before[2] == after[2] == "made"
    assert before[0] != after[0]
    expected = ["no such configuration", "no such split", "no such configuration", "its list of files", "no such field"]
    for error, what in zip(errors, [*expected, "its list of files"], strict=True):
        assert error[0] == "InputError", error
        assert what in error[1]
    assert "expected train, validation" in errors[1][1]
    assert "realnewslike" in errors[2][1]


@pytest.fixture
def local(tiny_model: Path, tmp_path: Path) -> TokenizeConfig:
    """Two local sources that share documents, within each and between the two, and of which the second runs dry."""
    (tmp_path / "web.jsonl.gz").write_bytes(gz(words(700, 1)) + gz(words(300, 1)) + gz(words(900, 3)))
    both = [*words(300, 3), *words(60, 4)]
    pq.write_table(pa.table({"content": both}), tmp_path / "code.parquet", row_group_size=50)
    return config(
        tiny_model,
        Source(name="web", kind="files", files=(str(tmp_path / "web.jsonl.gz"),), share=0.75),
        Source(name="code", kind="files", files=(str(tmp_path / "code.parquet"),), text_field="content", share=0.25),
        train_tokens=60_000,
    )


def test_killed_again_and_again_it_goes_on_and_ends_with_the_same_bytes(local: TokenizeConfig, tmp_path: Path):
    whole = finish(start(tmp_path / "whole", local))
    assert whole[0][2] == "made"
    root = tmp_path / "store"
    kills = 0
    for rounds in (1, 4, 9):
        process = start(root, local)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if len(list(root.glob(".staging/tokenize-*/files/train-*.arrow"))) > rounds:
                process.kill()
                break
            time.sleep(0.001)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 1
    there = (root / "tokenize" / whole[0][0] / "manifest.json").is_file()  # one was quicker than its kill
    last = finish(start(root, local))
    assert last[0][:2] == whole[0][:2]
    assert last[0][2] == ("cached" if there else "resumed")


def test_a_damaged_round_and_those_behind_it_are_made_again(
    local: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokenizing, "PROMPTS_PER_ROUND", 200)
    whole = tokenized(local, tmp_path / "whole")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, "_summary", stop)
        with pytest.raises(KeyboardInterrupt):
            tokenized(local, tmp_path / "store")
    (damaged,) = (tmp_path / "store").rglob("train-00002.arrow")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    again = tokenized(local, tmp_path / "store")
    assert again.manifest_sha256 == whole.manifest_sha256


def test_the_number_of_threads_changes_no_byte(local: TokenizeConfig, tmp_path: Path):
    found = [
        tokens.tokenize(local, Workspace.open(Runtime(root=tmp_path / str(threads), threads=threads), Quiet())).artifact
        for threads in (1, 3)
    ]
    assert found[0].manifest_sha256 == found[1].manifest_sha256


def test_equal_documents_are_taken_once_whatever_source_they_stand_in(local: TokenizeConfig, tmp_path: Path):
    artifact = tokenized(local, tmp_path / "store")
    table = TokenTable(artifact)
    documents = table.documents()
    names = {(row["source"], row["name"]) for row in documents.to_pylist()}
    assert len(set(documents["digest"].to_pylist())) == len(documents) == len(names)
    assert documents["number"].to_pylist() == list(range(len(documents)))
    sources = facts(artifact)["train"]["sources"]
    assert sources["web"]["duplicates_left_out"] > 250
    assert sources["code"]["tokens"] < 0.25 * 60_000
    assert sources["web"]["tokens"] == 0.75 * 60_000 // 16 * 16


def test_bad_documents_stop_with_file_and_line_or_are_counted_by_kind_in_the_manifest(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lines = [json.dumps({"text": text}) for text in words(1500, 1)]
    lines[700:700] = ['{"text": null}', '{"text": "lone \\ud800"}', '{"body": 1}', '{"text": null}', "{"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gz(words(400, 2))[:-20])
    files = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz"))
    stop = config(tiny_model, Source(name="mine", kind="files", files=files), train_tokens=80_000)
    with pytest.raises(InputError, match=r"null text; where: .*a\.jsonl, line 701"):
        tokenized(stop, tmp_path / "store")
    skip = stop.model_copy(update={"on_bad_document": "skip"})
    expected = {"null text": 2, "lone surrogate": 1, "missing field": 1, "malformed line": 1, "broken file": 1}
    assert facts(tokenized(skip, tmp_path / "store"))["bad_documents"] == expected
    monkeypatch.setattr(tokenizing, "PROMPTS_PER_ROUND", 300)
    assert facts(tokenized(skip, tmp_path / "rounds"))["bad_documents"] == expected


def test_a_budget_that_ends_before_a_bad_document_does_not_meet_it(tiny_model: Path, tmp_path: Path):
    lines = [json.dumps({"text": text}) for text in words(1500, 1)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{"]))
    source = Source(name="mine", kind="files", files=(str(tmp_path / "a.jsonl"),))
    assert facts(tokenized(config(tiny_model, source), tmp_path / "store"))["bad_documents"] == {}
    with pytest.raises(InputError, match="line 1501"):
        tokenized(config(tiny_model, source, train_tokens=10**6), tmp_path / "store")


def test_a_tokenizer_that_is_not_the_models_is_refused(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"d_vocab": 40}))
    (tmp_path / "a.jsonl").write_bytes(gzip.decompress(gz(words(10, 1))))
    source = Source(name="mine", kind="files", files=(str(tmp_path / "a.jsonl"),))
    with pytest.raises(InputError, match=r"more ids than the model.*found id 63; expected at most 39"):
        tokenized(config(folder, source), tmp_path / "store")


def test_ids_beyond_the_vocabulary_of_rows_are_named_by_row(tiny_model: Path, tmp_path: Path):
    rows = np.random.default_rng(0).integers(2, 64, (300, 32))
    rows[210, 5] = 64
    pq.write_table(pa.table({"tokens": rows.tolist()}), tmp_path / "rows.parquet")
    source = Source(name="ids", kind="tokenized", files=(str(tmp_path / "rows.parquet"),))
    stop = config(tiny_model, source, held_out_tokens=32)
    with pytest.raises(InputError, match=r"rows\.parquet, row 211; found 64 at position 5; expected 0 to 63"):
        tokenized(stop, tmp_path / "store")
    artifact = tokenized(stop.model_copy(update={"on_bad_document": "skip"}), tmp_path / "store")
    assert facts(artifact)["bad_documents"] == {"token id outside the vocabulary": 1}
