import errno
import hashlib
import ipaddress
import ssl
import sys
import threading
from collections.abc import Callable, Generator
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from storage import remote as remote_module
from storage.artifacts import Artifact, ArtifactStore, Result, Spec, Staging
from storage.errors import ArtifactNotFound, ConfigError, RemoteError, SparsemillError, StorageFull
from storage.remote import RemoteStore
from storage.transfers import verify_remote

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


def certify(folder: Path) -> Path:
    """Writes a certificate for 127.0.0.1 that nobody has signed, with its key, into one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    address, day = x509.IPAddress(ipaddress.ip_address("127.0.0.1")), timedelta(days=1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, datetime.now(UTC) - day, datetime.now(UTC) + day)
    signed = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False).sign(key, hashes.SHA256())
    path = folder / "certificate.pem"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path.write_bytes(signed.public_bytes(pem) + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's own store alone says who is trusted")
def test_a_file_comes_over_https_from_whom_the_system_trusts_alone(
    artifact: Artifact, server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    certificate = certify(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)

    def fetch(host: str, name: str) -> bytes:
        RemoteStore(f"https://{host}:{server.server_port}").fetch_file(artifact, name, tmp_path / "target")
        return (tmp_path / "target").read_bytes()

    with pytest.raises(RemoteError):
        fetch("127.0.0.1", "empty")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert {name: fetch("127.0.0.1", name) for name in FILES} == FILES
    with pytest.raises(RemoteError):
        fetch("localhost", "empty")  # it is not for this name


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


class StatusHandler(BaseHTTPRequestHandler):
    """Answers everything with one status, and a page that nobody is to see."""

    status: int
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        page = b"" if self.status == 304 else b"<Error><Message>status code: 200, topsecret</Message></Error>"
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    do_GET = do_PUT = do_POST = answer

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def answering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generator[RemoteStore]:
    """A bucket whose server answers everything with the status asked for."""
    handler = type("Handler", (StatusHandler,), {"status": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        settings = {"REGION": "us-east-1", "ACCESS_KEY_ID": "user", "SECRET_ACCESS_KEY": "topsecret"}
        for name, value in (settings | {"ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}).items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setattr(remote_module, "_ATTEMPTS", 1)
        yield RemoteStore("s3://bucket/team")
        server.shutdown()
        thread.join()


BUSY, DENIED, REFUSED = "busy", "look at the credentials", "refused"
STATUSES = {
    301: REFUSED, 304: REFUSED, 307: REFUSED, 400: REFUSED, 401: DENIED, 403: DENIED, 405: REFUSED, 408: BUSY,
    409: REFUSED, 411: REFUSED, 412: REFUSED, 416: REFUSED, 429: BUSY, 500: BUSY, 502: BUSY, 503: BUSY, 504: BUSY,
}  # fmt: skip
CALLS: dict[str, tuple[str, Callable[[RemoteStore], object]]] = {
    "read": ("read", lambda remote: remote.read("key", at_most=9)),
    "read_range": ("read", lambda remote: remote.read_range("key", 4, 9)),
    "put": ("written", lambda remote: remote.put("key", b"x")),
    "sizes": ("listed", lambda remote: remote.sizes("prefix")),
    "folders": ("listed", lambda remote: remote.folders()),
}


@pytest.mark.parametrize(("answering", "means"), STATUSES.items(), indirect=["answering"], ids=str)
def test_a_status_says_whether_it_may_pass_or_is_a_matter_of_rights(answering: RemoteStore, means: str):
    for done, call in CALLS.values():
        with pytest.raises(RemoteError, match=f"could not be {done}|a shorter file") as caught:
            call(answering)
        assert caught.value.transient == (means == BUSY)
        assert (DENIED in str(caught.value)) == (means == DENIED)
        assert_no_secret(caught.value)


@pytest.mark.parametrize("answering", [404], indirect=True)
def test_of_a_read_404_means_no_such_file_and_of_all_else_no_such_bucket(answering: RemoteStore):
    assert answering.read("key", at_most=9) is None
    with pytest.raises(ArtifactNotFound, match="does not have this file"):
        answering.read_range("key", 4, 9)
    calls = [call for done, call in CALLS.values() if done != "read"]
    for call in (*calls, lambda remote: remote.create("key", b"x")):
        with pytest.raises(RemoteError, match="no such bucket") as caught:
            call(answering)
        assert not caught.value.transient
        assert_no_secret(caught.value)


@pytest.mark.parametrize("answering", [403], indirect=True)
def test_a_file_that_may_not_be_read_is_no_damaged_file(artifact: Artifact, answering: RemoteStore):
    with pytest.raises(RemoteError, match="look at the credentials"):
        verify_remote(artifact, answering)


@pytest.mark.parametrize("answering", [400], indirect=True)
def test_a_large_file_that_is_refused_and_not_there_has_not_been_pushed(
    artifact: Artifact, answering: RemoteStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote_module, "_PART_BYTES", len(BIG) - 1)
    with pytest.raises(RemoteError, match=r"could not be written.*400"):
        answering.put_file(artifact, "a/b.bin")


@pytest.mark.parametrize("answering", [416], indirect=True)
def test_a_file_without_the_range_asked_for_is_a_shorter_one(answering: RemoteStore):
    with pytest.raises(RemoteError, match=r"a shorter file.*expected the range"):
        answering.read_range("key", 4, 9)


def test_a_shared_folder_that_is_gone_or_closed_is_named(
    artifact: Artifact, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(path: Path, pieces: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    remote = RemoteStore(str(folder))
    monkeypatch.setattr("storage.atomic.put_file", refuse)
    with pytest.raises(RemoteError, match="look at the rights on the folder") as caught:
        remote.put_file(artifact, "empty")
    assert not caught.value.transient
    with pytest.raises(RemoteError, match="no such folder"):
        remote.settle(["nowhere/at/all"])


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


@pytest.mark.parametrize("name", ["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"])
def test_another_server_than_azure_s_own_may_be_named_by_http(
    name: str, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "dG9wc2VjcmV0")
    monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(RemoteError, match="look at the credentials"):
        RemoteStore("az://container").read("forbidden", at_most=1)


@pytest.mark.parametrize("url", ["s3://bucket/prefix", "gs://bucket/prefix", "az://container/prefix"])
def test_object_stores_are_known_by_their_scheme(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert RemoteStore(url).shown == url
