import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from pipeline.model_files import DEMO_FOLDER, HUB_NAMES, find_files
from storage.errors import ConfigError, InputError
from storage.fingerprint import sha256_file
from tests.integration.hub import Hub
from tests.model_folders import tokenizer_json


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return Hub(tmp_path / "remote")


def fill(hub: Hub, repository: str, **files: bytes) -> str:
    """Commits files, whose names have no dots here, and fills the cache with them."""
    commit = hub.commit(repository, {name.replace("__", "."): content for name, content in files.items()})
    hub.fill_cache(Path(constants.HF_HUB_CACHE), repository)
    return commit


def folder_with(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


TOKENIZER = tokenizer_json(("<|BOS|>", "<|EOS|>"))
TRANSFORMERS = json.dumps({"model_type": "gpt2", "vocab_size": 258}).encode()


def test_short_names_lead_to_the_repositories_of_the_family():
    assert HUB_NAMES["gelu-1l"] == "NeelNanda/GELU_1L512W_C4_Code"
    assert {name: repository.split("_")[1] for name, repository in HUB_NAMES.items() if name.startswith("solu")} == {
        "solu-1l": "1L512W", "solu-2l": "2L512W", "solu-3l": "3L512W", "solu-4l": "4L512W", "solu-6l": "6L768W",
        "solu-8l": "8L1024W", "solu-10l": "10L1280W", "solu-12l": "12L1536W",
    }  # fmt: skip


def test_names_are_those_that_transformer_lens_knows():
    from transformer_lens.supported_models import MODEL_ALIASES

    assert all(name in MODEL_ALIASES[repository] for name, repository in HUB_NAMES.items())


def test_the_identity_is_that_of_the_files(tmp_path: Path):
    files = find_files("demo")
    assert (files.place.commit, files.layout, files.weights) == (
        None,
        "properties",
        (DEMO_FOLDER / "model.safetensors",),
    )
    assert files.identity == {
        "config_sha256": sha256_file(DEMO_FOLDER / "config.json"),
        "weights_sha256": sha256_file(DEMO_FOLDER / "model.safetensors"),
        "tokenizer_sha256": sha256_file(DEMO_FOLDER / "tokenizer.json"),
    }
    copy = tmp_path / "copy"
    shutil.copytree(DEMO_FOLDER, copy)
    assert find_files(str(copy)).identity == files.identity
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert find_files(str(copy)).identity != files.identity


@pytest.mark.parametrize("name", ["gelu-1l", "NeelNanda/GELU_1L512W_C4_Code"])
def test_a_revision_is_resolved_to_its_commit_and_all_files_are_of_it(hub: Hub, name: str):
    repository = HUB_NAMES["gelu-1l"]
    old = fill(hub, repository, config__json=b'{"d_vocab": 258}', tokenizer__json=TOKENIZER, model_final__pth=b"old")
    new = fill(hub, repository, config__json=b'{"d_vocab": 259}', tokenizer__json=TOKENIZER, model_final__pth=b"new")
    for files in (find_files(name), find_files(name, "main"), find_files(f"{name}@main")):
        assert (files.name, files.commit, files.settings["d_vocab"]) == (name, new, 259)
        assert files.weights[0].read_bytes() == b"new"
    for files in (find_files(name, old), find_files(f"{name}@{old}"), find_files(f"{name}@{old}", old)):
        assert (files.name, files.commit, files.settings["d_vocab"]) == (name, old, 258)
        assert files.weights[0].read_bytes() == b"old"
    with pytest.raises(ConfigError, match="two revisions"):
        find_files(f"{name}@{old}", new)


def test_names_of_transformer_lens_are_understood(hub: Hub):
    fill(hub, "EleutherAI/pythia-70m", config__json=TRANSFORMERS, tokenizer__json=TOKENIZER, model__safetensors=b"w")
    assert find_files("pythia-70m").identity == find_files("EleutherAI/pythia-70m").identity
    with pytest.raises(ConfigError, match="Hub repository gpt2"):
        find_files("gpt2-small")


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path):
    index = json.dumps(
        {"weight_map": {"b": "model-2.safetensors", "a": "model-1.safetensors", "c": "model-2.safetensors"}}
    )
    names = {"config.json": TRANSFORMERS, "tokenizer.json": TOKENIZER, "model.safetensors.index.json": index.encode()}
    folder = folder_with(tmp_path / "model", **names)
    with pytest.raises(ConfigError, match=r"model-1\.safetensors is not to be had"):
        _ = find_files(str(folder)).weights
    for shard in (1, 2):
        save_file({"a": torch.ones(shard)}, folder / f"model-{shard}.safetensors")
    files = find_files(str(folder))
    before = files.identity
    assert [path.name for path in files.weights] == [
        "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors",
    ]  # fmt: skip
    save_file({"a": torch.zeros(2)}, folder / "model-2.safetensors")
    assert find_files(str(folder)).identity["weights_sha256"] != before["weights_sha256"]


def test_safetensors_come_before_pickled_tensors(tmp_path: Path):
    names = {"config.json": TRANSFORMERS, "tokenizer.json": TOKENIZER, "pytorch_model.bin": b"pickled"}
    folder = folder_with(tmp_path / "model", **names)
    assert find_files(str(folder)).weights[0].name == "pytorch_model.bin"
    (folder / "model.safetensors").write_bytes(b"safe")
    assert find_files(str(folder)).weights[0].name == "model.safetensors"


def test_weights_with_longer_names_are_found_too(tmp_path: Path):
    names = {"config.json": b'{"d_vocab": 258}', "tokenizer.json": TOKENIZER, "GELU_1L_final.pth": b"pickled"}
    folder = folder_with(tmp_path / "model", **names)
    assert find_files(str(folder)).weights[0].name == "GELU_1L_final.pth"
    (folder / "z.safetensors").write_bytes(b"safe")
    assert find_files(str(folder)).weights[0].name == "z.safetensors"


@pytest.mark.parametrize(
    ("name", "nearest"), [("gelu-1", "gelu-1l"), ("solu-5l", "solu-6l"), ("pythia-70", "pythia-70m")]
)
def test_an_unknown_name_is_told_the_nearest_ones(name: str, nearest: str):
    with pytest.raises(ConfigError, match=rf"no language model of this name; found {name}; expected .*{nearest}"):
        find_files(name)


def test_folders_that_are_no_models_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no such folder; where: .*nowhere"):
        find_files(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="a folder has no revisions"):
        find_files(str(tmp_path), "main")
    with pytest.raises(ConfigError, match=r"config\.json is not to be had; where: .*; put it there"):
        find_files(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"not a JSON file; where: .*config\.json"):
        find_files(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        find_files(str(tmp_path))
    (tmp_path / "config.json").write_text('{"d_vocab": 258}')
    with pytest.raises(ConfigError, match=r"no tokenizer\.json.*save_pretrained"):
        find_files(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZER)
    with pytest.raises(ConfigError, match=r"lacks the size of its vocabulary; .*expected d_vocab"):
        find_files(str(tmp_path)).read_tokenizer()
    with pytest.raises(ConfigError, match=r"no weights are to be had.*model_final\.pth or model\.safetensors"):
        _ = find_files(str(tmp_path)).weights


@pytest.mark.parametrize("key", ["d_vocab", "vocab_size"])
def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path, key: str):
    settings = {key: 258} | ({"model_type": "gpt2"} if key == "vocab_size" else {})
    names = {"config.json": json.dumps(settings).encode(), "tokenizer.json": TOKENIZER}
    folder = folder_with(tmp_path / "model", **names)
    assert find_files(str(folder)).read_tokenizer().get_vocab_size() == 258
    (folder / "config.json").write_text(json.dumps(settings | {key: 257}))
    with pytest.raises(
        InputError, match=r"more ids than the model has embeddings; .*found id 257; expected at most 256"
    ):
        find_files(str(folder)).read_tokenizer()
