"""gs:// and az:// against servers of their interfaces on loopback: pushing, pulling, reading, breaking off."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from pipeline import sharing
from pipeline.cli import app
from pipeline.workspace import facts
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore
from storage.errors import ArtifactNotFound, RemoteConflict, RemoteError
from storage.reader import ShardReader
from storage.remote import RemoteStore, file_key
from storage.shared import read_pointer
from storage.transfers import plan_push, push
from tests.integration.azure_server import AZURE, KEY, account_sas
from tests.integration.faulty_server import Fault, Proxy, faulty, no_fault
from tests.integration.gcs_server import GCS
from tests.integration.object_server import ObjectServer
from tests.integration.test_remote_faults import ORDER, assert_same, pull, push_at_once, store_with
from tests.integration.test_sharing import SHORT, chain, workspace_in

ROOT = Path(__file__).parents[2]


BIG = np.random.default_rng(0).bytes(17_000_000)  # two parts, or three where tests make them smaller


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return store_with(tmp_path_factory.mktemp("ours") / "store", big=BIG)[1]


@pytest.fixture(autouse=True)
def smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.remote._PART_BYTES", 6 << 20)
    monkeypatch.setattr("storage.remote._RANGE_BYTES", 6 << 20)


@pytest.fixture(scope="module")
def trained(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return chain(tiny_preset, workspace_in(tmp_path_factory.mktemp("trained") / "store"), *SHORT).train()


@pytest.fixture(scope="module", params=[GCS, AZURE], ids=["gs", "az"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    server = ObjectServer(request.param, tmp_path_factory.mktemp("cloud"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    for name in [name for name in os.environ if name.startswith(server.cloud.variables)]:
        monkeypatch.delenv(name)
    with faulty(server.endpoint) as proxy:
        use(server.cloud.environment(proxy.endpoint), monkeypatch)
        yield proxy


@pytest.fixture
def url(server: ObjectServer, proxy: Proxy, tmp_path: Path) -> str:
    return f"{server.cloud.url}/{tmp_path.name}"


@pytest.fixture
def remote(url: str) -> RemoteStore:
    return RemoteStore(url)


def sparsemill_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]


def use(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def methods(proxy: Proxy) -> list[str]:
    return [method for method, _, _ in proxy.log]


def files_below(folder: Path) -> Iterator[bytes]:
    return (path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_command_line_pushes_lists_pulls_and_pushes_again_without_telling_secrets(
    ours: Artifact, server: ObjectServer, proxy: Proxy, url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    home, theirs = str(ours.folder.parents[1]), tmp_path / "theirs"
    app(["push", ours.id, url, "--home", home], result_action="return_value")
    app(["artifacts", "ls", url], result_action="return_value")
    app(["pull", url, ours.id[:12], "--home", str(theirs)], result_action="return_value")
    told = capfd.readouterr()
    pushed, *listed, pulled = told.out.splitlines()
    assert ours.id in pushed
    assert any(ours.id in line for line in listed)
    assert pulled == ours.id
    assert_same(ArtifactStore(theirs).open(ours.id), ours)
    secret = os.environ[server.cloud.secret[0]]
    assert secret not in told.out + told.err
    assert not any(secret.encode() in data for data in files_below(theirs))
    proxy.log.clear()
    assert plan_push(ours, RemoteStore(url)).there
    assert methods(proxy) == ["GET"]  # of the pointer: nothing moves


def test_a_secret_that_is_refused_is_named_as_the_reason_and_not_told(
    server: ObjectServer, url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    name, refused = server.cloud.secret
    monkeypatch.setenv(name, refused)
    for ask in (RemoteStore.folders, lambda remote: remote.put("key", b"data")):
        proxy.log.clear()
        with pytest.raises(RemoteError, match="credentials") as caught:
            ask(RemoteStore(url))
        assert not caught.value.transient
        assert refused not in str(caught.value)
        assert len(proxy.log) == 1  # asked once: it will not be believed the second time either


def test_a_large_file_goes_up_in_parts_and_comes_in_ranges(
    ours: Artifact, server: ObjectServer, proxy: Proxy, remote: RemoteStore
):
    push(plan_push(ours, remote), remote)
    asked = [(method, path) for method, path, _ in proxy.log]
    assert sum(server.cloud.sends_part(path) for _, path in asked) == 3
    assert sum(server.cloud.ends_upload(*one) for one in asked) == 1
    assert server.uploads() == []
    assert remote.read(file_key(ours, "big"), at_most=len(BIG)) == BIG
    proxy.log.clear()
    assert b"".join(remote.file_pieces(ours, "big")) == BIG
    assert methods(proxy) == ["GET"] * 3
    assert len(ours.manifest.files) > 10  # more than the server lists at once
    assert remote.sizes(file_key(ours, "").rstrip("/")).keys() == ours.manifest.files.keys() | {"manifest.json"}


def test_a_push_that_another_of_the_same_bytes_overtakes_is_told_of_no_error(
    ours: Artifact, server: ObjectServer, proxy: Proxy, remote: RemoteStore, url: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    use(server.cloud.environment(server.endpoint), monkeypatch)
    rival = RemoteStore(url)

    def let_the_rival_finish(method: str, path: str, before: int) -> Fault:
        if server.cloud.ends_upload(method, path):
            push(plan_push(ours, rival), rival)
        return None

    proxy.choose = let_the_rival_finish
    push(plan_push(ours, remote), remote)
    assert_same(pull(ours.id, remote, ArtifactStore(tmp_path / "theirs")), ours)


def test_other_bytes_of_an_id_are_reported_to_the_second_also_at_once(ours: Artifact, url: str, tmp_path: Path):
    others = store_with(tmp_path / "other", note=b"other numerics", big=BIG)[1]
    remote = RemoteStore(f"{url}/one-by-one")
    push(plan_push(ours, remote), remote)
    with pytest.raises(RemoteConflict, match=ours.id):
        plan_push(others, remote)

    remote = RemoteStore(f"{url}/at-once")
    winner = push_at_once(ours, others, remote)
    assert_same(pull(ours.id, remote, ArtifactStore(tmp_path / "theirs")), winner)


def test_of_many_that_create_a_pointer_at_once_one_does(remote: RemoteStore):
    start = threading.Barrier(8)

    def go(number: int) -> bool:
        start.wait()
        return remote.create("pointer", bytes([number]))

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(go, range(8)))
    assert sum(made) == 1
    assert remote.read("pointer", at_most=1) == bytes([made.index(True)])


@pytest.mark.parametrize("faults", [(500, 503, 429), ("cut",)], ids=["refused", "cut"])
def test_a_server_that_fails_every_request_once_loses_nothing(
    faults: tuple[Fault, ...], ours: Artifact, proxy: Proxy, remote: RemoteStore, tmp_path: Path
):
    turns = itertools.cycle(faults)

    def once(method: str, path: str, before: int) -> Fault:
        return next(turns) if before == 0 and (faults != ("cut",) or (method == "GET" and "big" not in path)) else None

    proxy.choose = once
    push(plan_push(ours, remote), remote)
    assert_same(pull(ours.id, remote, ArtifactStore(tmp_path / "theirs")), ours)
    assert sum(met is not None for _, _, met in proxy.log) > 20


def test_a_server_killed_between_parts_shows_nothing_and_the_push_goes_on(
    ours: Artifact, server: ObjectServer, proxy: Proxy, remote: RemoteStore, url: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr("storage.remote._RETRY", {"max_retries": 0})
    hasty = RemoteStore(url)

    def kill_at_the_second_part(method: str, path: str, before: int) -> Fault:
        sends_part = server.cloud.sends_part
        if sends_part(path) and any(sends_part(earlier) for _, earlier, _ in proxy.log):
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


def test_a_server_killed_in_a_pull_leaves_nothing_visible_and_the_pull_goes_on(
    ours: Artifact, server: ObjectServer, proxy: Proxy, remote: RemoteStore, url: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    push(plan_push(ours, remote), remote)
    monkeypatch.setattr("storage.remote._RETRY", {"max_retries": 0})
    monkeypatch.setattr("storage.remote._ATTEMPTS", 1)
    hasty, theirs, asked = RemoteStore(url), ArtifactStore(tmp_path / "theirs"), itertools.count()

    def kill_at_the_tenth_file(method: str, path: str, before: int) -> Fault:
        if "/store.zarr/" in unquote(path) and next(asked) == 10:
            server.kill()
        return None

    proxy.choose = kill_at_the_tenth_file
    with pytest.raises(RemoteError):
        pull(ours.id, hasty, theirs)
    assert theirs.list() == []
    proxy.choose = no_fault
    server.start()
    proxy.log.clear()
    assert_same(pull(ours.id, remote, theirs), ours)
    fetched = {path for _, path, _ in proxy.log if "/store.zarr/" in unquote(path)}
    assert 0 < len(fetched) < sum(name.startswith("store.zarr/") for name in ours.manifest.files)
    assert list((theirs.root / ".pulled").iterdir()) == []


def test_a_push_killed_before_a_file_was_put_together_shows_nothing_and_goes_on(
    ours: Artifact, server: ObjectServer, proxy: Proxy, remote: RemoteStore, url: str, tmp_path: Path
):
    at_the_end, dead = threading.Event(), threading.Event()

    def hold_the_end(method: str, path: str, before: int) -> Fault:
        if not server.cloud.ends_upload(method, path):
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
    abandoned = server.uploads().count(f"{tmp_path.name}/{file_key(ours, 'big')}")
    assert abandoned == server.cloud.keeps_abandoned  # to remove the dead one's parts is the bucket's lifecycle's


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


def test_a_harvest_is_trained_on_sampled_and_verified_where_it_is(
    trained: Artifact, tiny_preset: Path, url: str, tmp_path: Path
):
    ours, theirs = workspace_in(trained.folder.parents[1]), workspace_in(tmp_path / "theirs")
    harvest, remote = ours.store.parent(trained, "activations"), RemoteStore(url)
    sharing.push(harvest, remote, ours, with_parents=True)
    there = theirs.store.resolve(f"{url}/harvest/{harvest.id}", stage="harvest")
    again = chain(tiny_preset, theirs, *SHORT).train(there)
    assert again.read_bytes("autoencoder.safetensors") == trained.read_bytes("autoencoder.safetensors")
    assert theirs.store.verify(there) == []
    assert not list((tmp_path / "theirs").rglob("activations/c/*"))  # chunks were read, no shard was fetched
    sample, _ = sharing.pull(harvest.id, remote, theirs, windows="2")
    whole, part = ShardReader.of(harvest), ShardReader.of(sample)
    assert facts(sample)["windows"] == 2
    assert (part.read(0, part.n_rows).rows == whole.read(0, part.n_rows).rows).all()


@pytest.mark.parametrize("server", [GCS], indirect=True, ids=["gs"])
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
    assert methods(proxy) == ["GET"]


@pytest.mark.parametrize("server", [AZURE], indirect=True, ids=["az"])
def test_a_shared_access_signature_is_enough_and_told_nowhere(
    ours: Artifact, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    right, wrong = account_sas(), account_sas("AAAA" + KEY[4:])
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", right)
    remote = RemoteStore(url)
    push(plan_push(ours, remote), remote)
    assert_same(pull(ours.id, remote, ArtifactStore(tmp_path)), ours)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", wrong)
    with pytest.raises(RemoteError, match="credentials") as caught:
        app(["artifacts", "ls", url], result_action="return_value")
    told = capfd.readouterr()
    for sas in (right, wrong):
        secret = sas.rpartition("sig=")[2]
        assert secret not in f"{told}{caught.value}"
        assert not any(secret.encode() in data for data in files_below(tmp_path))
