"""A Hub that is too busy, breaks off, refuses or cannot be reached: models, corpora and checkpoints read from it."""

import json
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from pipeline.checkpoints import read_checkpoint
from pipeline.corpus.hub import HubFiles
from pipeline.model_files import find_files
from storage.errors import ConfigError, InputError, RemoteError, SparsemillError
from tests.integration.hub import SIGNATURE, Fault, Hub
from tests.model_folders import tokenizer_json

CONFIG = json.dumps({"model_type": "gpt2", "vocab_size": 258}).encode()
OLDER = json.dumps({"d_vocab": 258}).encode()
TOKENIZER = tokenizer_json(("<|endoftext|>",))
ROWS = b'{"text": "x"}\n' * 1000
TROUBLE: list[Fault] = [500, 503, 429, 408]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Hub]:
    """A Hub that this process asks."""
    hub = Hub(tmp_path / "remote")
    with hub.served() as environment:
        go_online(environment["HF_ENDPOINT"], tmp_path, monkeypatch)
        yield hub
    close_session()


def go_online(endpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close_session()  # its client may have begun offline
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(time, "sleep", lambda _: None)


def on(part: str, fault: Fault) -> Callable[[str], Fault]:
    """A fault of all requests whose path has a part."""
    return lambda path: fault if part in path else None


def assert_told(error: SparsemillError, found: str) -> None:
    assert found in str(error.found)
    assert "http" not in str(error)
    assert "topsecret" not in str(error)
    assert error.__cause__ is None
    assert error.__suppress_context__


def both_weights(hub: Hub) -> None:
    files = {"config.json": CONFIG, "tokenizer.json": TOKENIZER}
    hub.commit("o/m", files | {"model.safetensors": b"safe", "pytorch_model.bin": b"pickled"})


@pytest.mark.parametrize("status", TROUBLE)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_trouble_is_never_taken_for_the_answer_that_there_is_no_such_file(hub: Hub, name: str, status: Fault):
    both_weights(hub)
    hub.fault = on(name, status)
    with pytest.raises(RemoteError, match=f"{name} of Hub repository o/m") as caught:
        _ = find_files("o/m").weights
    assert caught.value.transient
    assert_told(caught.value, f"HfHubHTTPError {status}")
    hub.fault = on("", None)
    assert [path.name for path in find_files("o/m").weights] == ["model.safetensors"]
    hub.fault = on("", status)  # what has come once needs no answer
    assert [path.name for path in find_files("o/m").weights] == ["model.safetensors"]


def test_that_there_is_no_such_file_the_hub_itself_says(hub: Hub):
    hub.commit("o/m", {"config.json": CONFIG, "tokenizer.json": TOKENIZER, "pytorch_model.bin": b"pickled"})
    assert [path.name for path in find_files("o/m").weights] == ["pytorch_model.bin"]
    hub.commit("o/m", {"config.json": CONFIG})
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        find_files("o/m")


@pytest.mark.parametrize("status", TROUBLE)
def test_weights_of_another_name_are_looked_for_only_where_the_list_came(hub: Hub, status: Fault):
    names = ("a_final.pth", "b_final.pth", "within/c.safetensors")
    hub.commit("o/m", {"config.json": OLDER, "tokenizer.json": TOKENIZER} | {name: name.encode() for name in names})
    files = find_files("o/m")
    hub.fault = on("/tree/", status)
    with pytest.raises(RemoteError, match="the list of files of Hub repository o/m at") as caught:
        _ = files.weights
    assert caught.value.transient
    hub.fault = on("a_final.pth", status)
    with pytest.raises(RemoteError, match=r"a_final\.pth"):
        _ = find_files("o/m").weights
    hub.fault = on("", None)
    assert [path.name for path in find_files("o/m").weights] == ["a_final.pth"]
    assert not any("b_final.pth" in request for request in hub.requests)


@pytest.mark.parametrize("status", TROUBLE)
def test_a_data_set_that_cannot_be_asked_for_is_trouble_that_may_pass(hub: Hub, status: Fault):
    commit = hub.commit("o/d", {"a.jsonl": ROWS, "b.jsonl": ROWS}, "datasets")
    files = HubFiles("o/d", "", "train", "main")
    for part in ("/api/datasets/", "/tree/"):
        hub.fault = on(part, status)
        with pytest.raises(RemoteError, match="its list of files of o/d@main") as caught:
            files.identity()
        assert caught.value.transient
        assert_told(caught.value, f"HfHubHTTPError {status}")
    hub.fault = on("a.jsonl", status)
    assert files.identity()["commit"] == commit
    first, second = files.list()
    with pytest.raises(RemoteError, match=r"a\.jsonl of o/d@main"):
        first.fetch()
    assert second.fetch().read_bytes() == ROWS


def test_a_file_in_the_cache_without_the_list_is_no_smaller_corpus(hub: Hub):
    commit = hub.commit("o/d", {"a.jsonl": ROWS, "b.jsonl": ROWS}, "datasets")
    hub.fault = on("/tree/", 503)
    snapshot = Path(constants.HF_HUB_CACHE) / "datasets--o--d" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "a.jsonl").write_bytes(ROWS)
    with pytest.raises(RemoteError):
        HubFiles("o/d", "", "train", commit).list()
    hub.fault = on("", None)
    assert [file.name for file in HubFiles("o/d", "", "train", commit).list()] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("status", [*TROUBLE, "cut"])
def test_a_checkpoint_that_does_not_come_whole_is_not_read(hub: Hub, tmp_path: Path, status: Fault):
    torch.save({name: torch.zeros(shape) for name, shape in SHAPES.items()}, tmp_path / "25.pt")
    named = json.dumps({"site": "post", "layer": 0}).encode()
    hub.commit("o/sae", {"25.pt": tmp_path / "25.pt", "25_cfg.json": named})
    hub.fault = on("25_cfg.json", status)
    with pytest.raises(RemoteError, match=r"hf://o/sae/25\.pt") as caught:
        read_checkpoint("hf://o/sae/25.pt")
    assert caught.value.transient
    hub.fault = on("", None)
    assert read_checkpoint("hf://o/sae/25.pt").hook_name == "blocks.0.mlp.hook_post"


SHAPES = {"W_enc": (2, 3), "b_enc": (3,), "W_dec": (3, 2), "b_dec": (2,)}


def test_a_download_that_breaks_off_each_time_is_trouble_that_may_pass(hub: Hub):
    both_weights(hub)
    hub.commit("o/d", {"a.jsonl": ROWS}, "datasets")
    hub.fault = on("", "cut")
    (file,) = HubFiles("o/d", "", "train", "main").list()
    for read in (lambda: find_files("o/m"), file.fetch):
        with pytest.raises(RemoteError) as caught:
            read()
        assert caught.value.transient
        assert_told(caught.value, "RemoteProtocolError")
    hub.fault = on("", None)
    assert file.fetch().read_bytes() == ROWS


@pytest.mark.parametrize("status", [400, 401, 403])
def test_what_the_hub_refuses_is_not_tried_again(hub: Hub, status: int):
    both_weights(hub)
    hub.commit("o/d", {"a.jsonl": ROWS}, "datasets")
    (file,) = HubFiles("o/d", "", "train", "main").list()
    hub.fault = on("", status)
    with pytest.raises(ConfigError, match=r"no right to read it.*token") as caught:
        find_files("o/m")
    assert_told(caught.value, str(status))
    with pytest.raises(InputError, match="token") as told:
        file.fetch()
    assert_told(told.value, str(status))


def test_a_signed_address_is_in_no_message(hub: Hub):
    both_weights(hub)
    hub.commit("o/d", {"a.jsonl": ROWS}, "datasets")
    (file,) = HubFiles("o/d", "", "train", "main").list()
    hub.fault = lambda path: 403 if path.startswith("/elsewhere/") else "elsewhere"
    with pytest.raises(InputError, match=r"a\.jsonl is not to be had") as caught:
        file.fetch()
    assert_told(caught.value, "HfHubHTTPError 403")
    with pytest.raises(ConfigError) as told:
        find_files("o/m")
    assert_told(told.value, "HfHubHTTPError 403")
    assert sum(SIGNATURE in request for request in hub.requests) == 2


def test_a_hub_that_cannot_be_reached_is_trouble_and_offline_the_cache_is_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    go_online("http://127.0.0.1:1", tmp_path, monkeypatch)
    for read in (
        lambda: find_files("o/m"),
        lambda: HubFiles("o/d", "", "train", "main").identity(),
        lambda: read_checkpoint("hf://o/sae"),
    ):
        with pytest.raises(RemoteError) as caught:
            read()
        assert caught.value.transient
        assert_told(caught.value, "ConnectError")
    close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"config\.json is not to be had.*HF_HUB_OFFLINE"):
        find_files("o/m")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        HubFiles("o/d", "", "train", "main").identity()
    close_session()


def test_a_disk_without_room_for_the_cache_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    both_weights(hub)
    Path(constants.HF_HUB_CACHE).write_bytes(b"")  # no folder
    with pytest.raises(ConfigError, match=r"config\.json did not come from the Hub.*Hub cache") as caught:
        find_files("o/m")
    assert_told(caught.value, "Error")
