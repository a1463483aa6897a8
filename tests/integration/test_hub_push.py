"""Autoencoders and reports pushed to a Hugging Face Hub: a loopback server that takes what huggingface_hub sends."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.hub import Address, push_bundle, push_to_hub
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.errors import ConfigError, CorruptArtifact, InputError, RemoteError

ROOT = Path(__file__).parents[2]
TOKEN = "hf_topsecrettoken"
WEIGHTS = bytes(range(256)) * 100
LOG = b"a small table"


class Hub:
    """One repository: what its newest commit holds, and every request with its token."""

    def __init__(self) -> None:
        self.exists = False
        self.private: bool | None = None
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refuse = 0
        self.url = ""


@pytest.fixture
def hub() -> Generator[Hub]:
    state = Hub()
    handler = type("BoundHandler", (_Handler,), {"hub": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield state
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    """The protocol of the Hub: create, preupload, Git LFS's batch and upload, commit; and whether a file is there."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "who are you?"}, 401)
        elif self.hub.refuse and path.endswith("/commit/main"):
            self._answer({"error": "busy"}, self.hub.refuse)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":  # of the card's head
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False, "oid": _git_oid(self.hub.files.get(one["path"]))}
                for one in json.loads(body)["files"]
            ]  # fmt: skip
            self._answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._answer({"error": path}, 404)

    def do_PUT(self) -> None:
        body = self._body()
        assert "Authorization" not in self.headers  # the store behind is someone else's
        oid = hashlib.sha256(body).hexdigest()
        assert self.path == f"/upload/{oid}"
        self.hub.blobs[oid] = body
        self._answer({})

    def do_HEAD(self) -> None:
        self._body()
        match = re.fullmatch(r"/owner/name/resolve/main/(.+)", self.path)
        data = self.hub.files.get(match[1]) if match else None
        self.send_response(404 if data is None else 200)
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound" if self.hub.exists else "RepoNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"x"')
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()

    def _create(self, asked: dict[str, object]) -> None:
        if self.hub.exists:
            self._answer({"error": "You already created this model repo", "url": f"{self.hub.url}/owner/name"}, 409)
            return
        self.hub.exists, self.hub.private = True, bool(asked.get("private") or asked.get("visibility") == "private")
        self._answer({"url": f"{self.hub.url}/owner/name"})

    def _batch(self, asked: dict[str, list[dict[str, object]]]) -> None:
        objects: list[dict[str, object]] = []
        for one in asked["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}", "header": {}}}
            there = one["oid"] in self.hub.blobs
            objects.append({"oid": one["oid"], "size": one["size"]} | ({} if there else {"actions": actions}))
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, lines: list[dict[str, dict[str, str]]]) -> None:
        files = dict(self.hub.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":  # type: ignore[comparison-overlap]
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.blobs[value["oid"]]
        self.hub.files = files
        self.hub.commits.append(lines[0]["value"]["summary"])
        oid = hashlib.sha1(repr(sorted(files)).encode(), usedforsecurity=False).hexdigest()
        self._answer({"commitUrl": f"{self.hub.url}/owner/name/commit/{oid}", "commitOid": oid, "success": True})

    def _body(self) -> bytes:
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002 - its name there


def _git_oid(data: bytes | None) -> str | None:
    if data is None:
        return None
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


@pytest.fixture
def sae(tmp_path: Path) -> Artifact:
    def produce(staging: Staging) -> Result:
        staging.write_bytes("autoencoder.safetensors", WEIGHTS)
        staging.write_bytes("training-log.parquet", LOG)
        return Result({"l0": 12.5, "steps": 10})

    parent = ArtifactStore(tmp_path / "store").make(Spec("harvest", 1, {}), lambda _: Result({}), provenance={})
    spec = Spec("train", 1, {"autoencoder": {"d_sae": 64}}, {"activations": parent.artifact.as_parent()})
    return ArtifactStore(tmp_path / "store").make(spec, produce, provenance={}).artifact


@pytest.fixture(autouse=True)
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points this process's client at the loopback server."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def push(sae: Artifact, url: str = "hf://owner/name", **options: bool) -> tuple[int, int]:
    return push_to_hub(sae, Address.parse(url), **options)


def test_an_autoencoder_goes_to_the_hub_in_one_commit_with_a_card(hub: Hub, sae: Artifact):
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "pipeline.cli", "push", sae.id, "hf://owner/name"]
    done = subprocess.run(
        [*command, "--home", sae.folder.parents[1]],
        cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hub.commits == [f"Push {sae.id}"]
    assert hub.private is True
    assert set(hub.files) == {*sae.manifest.files, "manifest.json", "README.md"}
    assert hub.files["autoencoder.safetensors"] == WEIGHTS
    assert hub.files["manifest.json"] == (sae.folder / "manifest.json").read_bytes()
    assert list(hub.blobs.values()) == [WEIGHTS]  # as LFS, the rest in the commit
    card = hub.files["README.md"].decode()
    for expected in (sae.id, "| l0 | 12.5 |", "activations: `harvest-", '"d_sae": 64'):
        assert expected in card
    told = done.stdout + done.stderr + card + hub.files["manifest.json"].decode()
    assert TOKEN not in told
    assert "Warning" not in told


def test_a_second_push_sends_no_weights_and_keeps_the_card(hub: Hub, sae: Artifact):
    push(sae, "hf://owner/name/best")
    assert "best/autoencoder.safetensors" in hub.files
    hub.files["best/README.md"] = b"written by hand"
    hub.requests.clear()
    push(sae, "hf://owner/name/best")
    assert hub.files["best/README.md"] == b"written by hand"
    assert not any(request.startswith("PUT") for request in hub.requests)


def test_a_dry_run_asks_the_hub_nothing(hub: Hub, sae: Artifact):
    assert push(sae, dry_run=True) == (2, len(WEIGHTS) + len(LOG))
    assert hub.requests == []


def test_what_is_not_for_the_hub_is_refused(hub: Hub, sae: Artifact):
    harvest = ArtifactStore(sae.folder.parents[1]).parent(sae, "activations")
    with pytest.raises(InputError, match="only autoencoders and reports"):
        push(harvest)
    for url in ("hf://owner", "hf://owner/name/../x", "hf://owner/name@main"):
        with pytest.raises(ConfigError, match="not a place in the Hub"):
            push(sae, url)
    assert hub.requests == []


def test_a_damaged_file_is_not_sent(hub: Hub, sae: Artifact):
    (sae.folder / "autoencoder.safetensors").write_bytes(b"?" + WEIGHTS[1:])
    with pytest.raises(CorruptArtifact, match=r"autoencoder\.safetensors"):
        push(sae)
    assert hub.requests == []


def test_a_bundle_goes_as_it_is_with_its_own_card_and_a_damaged_one_not_at_all(hub: Hub, tmp_path: Path):
    bundle = tmp_path / "bundle"
    files = {
        "README.md": b"card",
        "autoencoder.safetensors": WEIGHTS,
        "config.json": b"{}",
        "report/index.html": b"<p>",
    }
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()]
    for name, data in (files | {"checksums.sha256": "".join(lines).encode()}).items():
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(data)
    hub.files["README.md"] = b"an older card"
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "pipeline.cli", "push", bundle, "hf://owner/name", "--home", tmp_path / "store"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hub.files == files | {"checksums.sha256": "".join(lines).encode()}
    hub.requests.clear()
    (bundle / "config.json").write_bytes(b"[]")
    with pytest.raises(InputError, match="not the one that was published"):
        push_bundle(bundle, Address.parse("hf://owner/name"))
    (bundle / "checksums.sha256").write_text(f"{'0' * 64}  ../elsewhere\n")
    with pytest.raises(InputError, match=r"elsewhere"):
        push_bundle(bundle, Address.parse("hf://owner/name"))
    assert hub.requests == []


@pytest.mark.parametrize(("status", "transient"), [(403, False), (503, True)])
def test_a_hub_that_refuses_says_why_and_no_secret(
    status: int, transient: bool, hub: Hub, sae: Artifact, monkeypatch: pytest.MonkeyPatch
):
    hub.refuse = status
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with pytest.raises(RemoteError, match=str(status)) as caught:
        push(sae)
    assert caught.value.transient == transient
    assert hub.commits == []
    assert hub.url not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_wrong_token_is_told_and_not_shown(hub: Hub, sae: Artifact, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongsecret")
    with pytest.raises(RemoteError, match=r"401.*hf auth login") as caught:
        push(sae)
    assert "secret" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_a_transient_error(sae: Artifact, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with pytest.raises(RemoteError, match="ConnectError") as caught:
        push(sae)
    assert caught.value.transient
