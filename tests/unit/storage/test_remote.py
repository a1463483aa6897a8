import errno
import hashlib
import threading
from collections.abc import Generator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from storage import remote as remote_module
from storage.artifacts import Artifact, ArtifactStore, Result, Spec, Staging
from storage.errors import ArtifactNotFound, ConfigError, RemoteError, SparsemillError, StorageFull
from storage.remote import RemoteStore

BIG = bytes(range(256)) * 40_000  # 10 MB: several pieces
FILES = {"a/b.bin": BIG, "empty": b"", "with space": b"x"}


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    def produce(staging: Staging) -> Result:
        for name, data in FILES.items():
            staging.write_bytes(name, data)
        return Result({})

    return ArtifactStore(tmp_path / "store").make(Spec("train", 1, {}), produce, provenance={}).artifact


@pytest.fixture
def folder(artifact: Artifact, tmp_path: Path) -> Path:
    """The root of a remote that holds the artifact's files."""
    root = tmp_path / "remote"
    for name, data in FILES.items():
        path = root / "train" / artifact.id / artifact.manifest_sha256 / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


class Handler(SimpleHTTPRequestHandler):
    """A plain web server, which fails as the path asks it to."""

    def do_GET(self) -> None:
        if "forbidden" in self.path:
            self.send_error(403)
        elif "broken" in self.path:
            self.send_error(500)
        elif "cut" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", str(len(BIG)))
            self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            self.end_headers()
            self.wfile.write(BIG[:1000])
        else:
            super().do_GET()

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def server(folder: Path) -> Generator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_RETRY", {"max_retries": 0})


def where(artifact: Artifact, folder: Path, name: str) -> Path:
    return folder / "train" / artifact.id / artifact.manifest_sha256 / name


@pytest.mark.parametrize("name", FILES)
def test_a_file_comes_from_a_folder_and_over_http(
    name: str, artifact: Artifact, folder: Path, server: ThreadingHTTPServer, tmp_path: Path
):
    for i, url in enumerate([str(folder), folder.as_uri(), f"http://127.0.0.1:{server.server_port}"]):
        target = tmp_path / f"{i}" / "target"
        target.parent.mkdir()
        target.write_bytes(b"old")
        RemoteStore(url).fetch_file(artifact, name, target)
        assert target.read_bytes() == FILES[name]
        assert list(target.parent.iterdir()) == [target]


def test_a_remote_may_lie_below_a_path(artifact: Artifact, folder: Path, server: ThreadingHTTPServer, tmp_path: Path):
    folder.rename(folder.with_name("moved"))
    folder.mkdir()
    folder.with_name("moved").rename(folder / "team")
    RemoteStore(f"http://127.0.0.1:{server.server_port}/team/").fetch_file(artifact, "with space", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"x"


@pytest.mark.parametrize(
    "wrong", [BIG[:-1], BIG + b"x", BIG + BIG, BIG[:-1] + b"?", b"", b"x"],
    ids=["short", "long", "twice", "flipped", "empty", "other"],
)  # fmt: skip
def test_other_bytes_are_refused_and_the_old_ones_kept(
    wrong: bytes, artifact: Artifact, folder: Path, server: ThreadingHTTPServer, tmp_path: Path
):
    where(artifact, folder, "a/b.bin").write_bytes(wrong)
    target = tmp_path / "here" / "target"
    target.parent.mkdir()
    target.write_bytes(b"old")
    for url in (folder.as_uri(), f"http://127.0.0.1:{server.server_port}"):
        with pytest.raises(RemoteError) as caught:
            RemoteStore(url).fetch_file(artifact, "a/b.bin", target)
        assert hashlib.sha256(BIG).hexdigest() in str(caught.value)
        assert f"{artifact.id}/{artifact.manifest_sha256}/a/b.bin" in str(caught.value)
        assert target.read_bytes() == b"old"
        assert list(target.parent.iterdir()) == [target]


def test_of_a_file_too_long_nothing_beyond_its_size_is_written(
    artifact: Artifact, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    where(artifact, folder, "with space").write_bytes(BIG)

    def fail(descriptor: int, data: object) -> int:
        pytest.fail("wrote some of it")

    monkeypatch.setattr("os.write", fail)
    with pytest.raises(RemoteError, match="more than"):
        RemoteStore(str(folder)).fetch_file(artifact, "with space", tmp_path / "target")


def test_what_the_remote_does_not_have_is_not_found(
    artifact: Artifact, folder: Path, server: ThreadingHTTPServer, tmp_path: Path
):
    where(artifact, folder, "empty").unlink()
    for url in (folder.as_uri(), f"http://127.0.0.1:{server.server_port}"):
        with pytest.raises(ArtifactNotFound, match=f"the remote does not have this file.*{artifact.id}.*empty"):
            RemoteStore(url).fetch_file(artifact, "empty", tmp_path / "target")
        with pytest.raises(ArtifactNotFound, match="no such file"):
            RemoteStore(url).fetch_file(artifact, "manifest.json", tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("part", "reason"), [("forbidden", "403"), ("broken", "500"), ("cut", "body error"), ("", "sending request")]
)
def test_a_remote_that_fails_says_why_and_no_secret(
    part: str, reason: str, artifact: Artifact, server: ThreadingHTTPServer, tmp_path: Path
):
    port = server.server_port if part else 1
    remote = RemoteStore(f"http://user:secret@127.0.0.1:{port}/{part}?sig=topsecret")
    with pytest.raises(RemoteError, match=reason) as caught:
        remote.fetch_file(artifact, "a/b.bin", tmp_path / "target")
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert_no_secret(caught.value)
    assert list(tmp_path.glob("*target*")) == []


@pytest.mark.parametrize("url", ["ftp://user:secret@host/x?sig=topsecret", "file:///no/such/folder", "no/such/folder"])
def test_what_is_no_remote_is_refused(url: str):
    with pytest.raises(ConfigError, match="the remote cannot be used") as caught:
        RemoteStore(url)
    assert ("no such folder" in str(caught.value)) == ("no/such" in url)
    assert_no_secret(caught.value)


def assert_no_secret(error: SparsemillError) -> None:
    assert "secret" not in str(error)
    assert "user" not in str(error)
    assert error.__suppress_context__
    assert error.__cause__ is None


def test_an_error_of_this_disk_is_not_blamed_on_the_remote(
    artifact: Artifact, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", fail)
    with pytest.raises(StorageFull):
        RemoteStore(str(folder)).fetch_file(artifact, "a/b.bin", tmp_path / "target")


def test_the_remote_is_named_by_url_or_by_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SPARSEMILL_REMOTE", raising=False)
    assert RemoteStore.configured() is None
    monkeypatch.setenv("SPARSEMILL_REMOTE", str(folder))
    first = RemoteStore.configured()
    other = RemoteStore.configured("http://user:secret@127.0.0.1:1/elsewhere/")
    assert first is not None
    assert other is not None
    assert (first.shown, other.shown) == (folder.as_uri(), "http://127.0.0.1:1/elsewhere")


@pytest.mark.parametrize("url", ["s3://bucket/prefix", "gs://bucket/prefix", "az://container/prefix"])
def test_object_stores_are_known_by_their_scheme(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert RemoteStore(url).shown == url
