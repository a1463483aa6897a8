"""gs:// against a server of Google Cloud Storage's XML API on loopback: pushing, pulling, reading, breaking off."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.artifact import Artifact
from storage.artifacts import ArtifactStore
from storage.errors import ArtifactNotFound, RemoteConflict, RemoteError
from storage.reader import ShardReader
from storage.remote import RemoteStore, file_key
from storage.shared import read_pointer
from storage.transfers import plan_push, push
from tests.integration.faulty_server import Fault, Proxy, faulty, no_fault
from tests.integration.gcs_server import BUCKET, TOKEN, GcsServer
from tests.integration.test_remote_faults import BIG, ORDER, assert_same, pull, store_with

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return store_with(tmp_path_factory.mktemp("ours") / "store")[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    server = GcsServer(tmp_path_factory.mktemp("gcs"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    for name in [name for name in os.environ if name.startswith(("GOOGLE_", "SERVICE_ACCOUNT"))]:
        monkeypatch.delenv(name)
    with faulty(server.endpoint) as proxy:
        for name, value in (server.environment | {"GOOGLE_BASE_URL": proxy.endpoint}).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def url(proxy: Proxy, tmp_path: Path) -> str:
    return f"gs://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def remote(url: str) -> RemoteStore:
    return RemoteStore(url)


def sparsemill_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(sparsemill_command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=120)


def kinds(proxy: Proxy) -> list[str]:
    """The method of each request, and what it asks of an upload or a listing."""
    return [f"{method} {path.partition('?')[2].partition('=')[0]}".strip() for method, path, _ in proxy.log]


def test_the_command_line_pushes_lists_pulls_and_pushes_again_without_telling_secrets(
    ours: Artifact, proxy: Proxy, url: str, tmp_path: Path
):
    home, theirs = ours.folder.parents[1], tmp_path / "theirs"
    outputs = [
        run("push", ours.id, url, "--home", home),
        run("artifacts", "ls", url),
        run("pull", url, ours.id[:12], "--home", theirs),
    ]
    assert [done.returncode for done in outputs] == [0, 0, 0], [done.stderr for done in outputs]
    assert ours.id in outputs[1].stdout
    assert outputs[2].stdout.splitlines()[-1] == ours.id
    assert_same(ArtifactStore(theirs).open(ours.id), ours)
    assert not any(TOKEN in done.stdout + done.stderr for done in outputs)
    assert not any(TOKEN.encode() in path.read_bytes() for path in theirs.rglob("*") if path.is_file())
    proxy.log.clear()
    assert plan_push(ours, RemoteStore(url)).there
    assert kinds(proxy) == ["GET"]  # of the pointer: nothing moves


def test_a_token_that_is_refused_is_named_as_the_reason_and_not_told(
    url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "another-token")
    with pytest.raises(RemoteError, match="credentials") as caught:
        RemoteStore(url).folders()
    assert not caught.value.transient
    assert "another-token" not in str(caught.value)
    assert kinds(proxy) == ["GET list-type"]  # asked once: it will not be believed the second time either


def test_a_large_file_goes_up_in_parts_and_comes_in_ranges(
    ours: Artifact, server: GcsServer, proxy: Proxy, remote: RemoteStore
):
    push(plan_push(ours, remote), remote)
    asked = kinds(proxy)
    assert (asked.count("POST uploads"), asked.count("PUT partNumber"), asked.count("POST uploadId")) == (1, 3, 1)
    assert server.uploads() == []
    assert remote.read(file_key(ours, "big"), at_most=len(BIG)) == BIG
    proxy.log.clear()
    assert b"".join(remote.file_pieces(ours, "big")) == BIG
    assert kinds(proxy) == ["GET"] * 3
    assert len(ours.manifest.files) > 10  # more than the server lists at once
    assert remote.sizes(file_key(ours, "").rstrip("/")).keys() == ours.manifest.files.keys() | {"manifest.json"}


def test_other_bytes_of_an_id_are_reported_to_the_second_also_at_once(ours: Artifact, url: str, tmp_path: Path):
    others = store_with(tmp_path / "other", note=b"other numerics")[1]
    remote = RemoteStore(f"{url}/one-by-one")
    push(plan_push(ours, remote), remote)
    with pytest.raises(RemoteConflict, match=ours.id):
        plan_push(others, remote)

    remote = RemoteStore(f"{url}/at-once")
    both_looked = threading.Barrier(2)

    def go(artifact: Artifact) -> RemoteConflict | None:
        plan = plan_push(artifact, remote)
        both_looked.wait()
        try:
            push(plan, remote)
        except RemoteConflict as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(go, [ours, others])
    assert (first is None) != (second is None)
    assert_same(pull(ours.id, remote, ArtifactStore(tmp_path / "theirs")), ours if first is None else others)


def test_of_many_that_create_a_pointer_at_once_one_does(remote: RemoteStore):
    start = threading.Barrier(8)

    def go(number: int) -> bool:
        start.wait()
        return remote.create("pointer", bytes([number]))

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(go, range(8)))
    assert sum(made) == 1
    assert remote.read("pointer", at_most=1) == bytes([made.index(True)])


@pytest.mark.parametrize("fault", [503, 429, "cut"])
def test_a_server_that_fails_every_request_once_loses_nothing(
    fault: Fault, ours: Artifact, proxy: Proxy, remote: RemoteStore, tmp_path: Path
):
    def once(method: str, path: str, before: int) -> Fault:
        return fault if before == 0 and (fault != "cut" or (method == "GET" and "big" not in path)) else None

    proxy.choose = once
    push(plan_push(ours, remote), remote)
    assert_same(pull(ours.id, remote, ArtifactStore(tmp_path / "theirs")), ours)
    assert sum(met is not None for _, _, met in proxy.log) > 20


def test_a_server_killed_between_parts_shows_nothing_and_the_push_goes_on(
    ours: Artifact, server: GcsServer, proxy: Proxy, remote: RemoteStore, url: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr("storage.remote._RETRY", {"max_retries": 0})
    hasty = RemoteStore(url)

    def kill_at_the_second_part(method: str, path: str, before: int) -> Fault:
        if "partNumber=2" in path:
            server.kill()
        return None

    proxy.choose = kill_at_the_second_part
    with pytest.raises(RemoteError):
        push(plan_push(ours, hasty), hasty)
    proxy.choose = no_fault
    server.start()
    assert read_pointer(remote, ours.id) is None
    with pytest.raises(ArtifactNotFound):
        ArtifactStore(tmp_path / "theirs", remote=remote).open(ours.id)
    plan = plan_push(ours, remote)
    assert "big" in plan.missing
    push(plan, remote)
    assert_same(pull(ours.id, remote, ArtifactStore(tmp_path / "theirs")), ours)


def test_a_push_killed_before_a_file_was_put_together_shows_nothing_and_goes_on(
    ours: Artifact, server: GcsServer, proxy: Proxy, remote: RemoteStore, url: str, tmp_path: Path
):
    at_the_end, dead = threading.Event(), threading.Event()

    def hold_the_end(method: str, path: str, before: int) -> Fault:
        if method != "POST" or "uploadId=" not in path:
            return None
        at_the_end.set()
        dead.wait(60)
        return 503

    proxy.choose = hold_the_end
    command = sparsemill_command("push", ours.id, url, "--home", ours.folder.parents[1])
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as client:
        reached = at_the_end.wait(60)
        client.send_signal(signal.SIGKILL)
    dead.set()
    proxy.choose = no_fault
    assert reached
    assert read_pointer(remote, ours.id) is None
    plan = plan_push(ours, remote)
    assert "big" in plan.missing
    assert len(plan.missing) < len(ours.manifest.files)
    push(plan, remote)
    assert_same(pull(ours.id, remote, ArtifactStore(tmp_path / "theirs")), ours)
    abandoned = f"{tmp_path.name}/{file_key(ours, 'big')}"
    assert server.uploads().count(abandoned) == 1  # the dead one's: to remove it is the bucket's lifecycle's


def test_batches_read_straight_from_the_remote_are_those_of_the_files(
    ours: Artifact, remote: RemoteStore, url: str, tmp_path: Path
):
    push(plan_push(ours, remote), remote)
    address = f"{url}/harvest/{ours.id}"
    here, there = ShardReader.of(ours), ShardReader.of(ArtifactStore(tmp_path / "theirs").resolve(address))
    with here.epoch(ORDER) as expected, there.epoch(ORDER) as found:
        for one, other in zip(expected, found, strict=True):
            assert (one.rows == other.rows).all()
    assert not list((tmp_path / "theirs").rglob("activations/c/*"))  # no shard was fetched


def test_the_address_in_a_service_account_file_is_used(
    proxy: Proxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    nobody = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    account = nobody | {"gcs_base_url": proxy.endpoint, "disable_oauth": True}
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.delenv("GOOGLE_BASE_URL")
    monkeypatch.delenv("GOOGLE_BEARER_TOKEN")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    with pytest.raises(RemoteError, match="credentials") as caught:  # without a token, this server knows nobody
        RemoteStore(url).read("pointer", at_most=1)
    assert not caught.value.transient
    assert [method for method, _, _ in proxy.log] == ["GET"]
