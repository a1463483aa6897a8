from collections.abc import Mapping
from pathlib import Path

import pytest

from storage import transfers
from storage.artifacts import Artifact, ArtifactStore, Result, Spec, Staging
from storage.borrowing import Borrowing
from storage.errors import ArtifactNotFound, ConfigError, CorruptArtifact, InputError, RemoteConflict, RemoteError
from storage.remote import RemoteStore, split_reference
from storage.shared import known_ids, read_pointer
from storage.transfers import fetch, missing_files, plan_push, push

FILES = {"a/b.bin": bytes(range(256)) * 1000, "empty": b"", "with space#%": b"x"}
TOKENS = Spec("tokenize", 1, {})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "_SETTLING_SECONDS", 0)


@pytest.fixture
def remote(tmp_path: Path) -> RemoteStore:
    (tmp_path / "remote").mkdir()
    return RemoteStore(str(tmp_path / "remote"))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "ours")


def make(store: ArtifactStore, spec: Spec = TOKENS, files: Mapping[str, bytes] = FILES) -> Artifact:
    def produce(staging: Staging) -> Result:
        for name, data in files.items():
            staging.write_bytes(name, data)
        return Result({})

    return store.make(spec, produce, provenance={}).artifact


def borrow(artifact: Artifact, remote: RemoteStore, root: Path) -> Artifact:
    found = Borrowing(remote, root).find(artifact.id)
    assert found is not None
    return found


def test_a_push_counts_its_bytes_and_a_second_one_moves_nothing(store: ArtifactStore, remote: RemoteStore):
    artifact, counted = make(store), [0]

    def count(n_bytes: int) -> None:
        counted[0] += n_bytes

    plan = plan_push(artifact, remote)
    assert (plan.there, plan.bytes, set(plan.missing)) == (False, artifact.manifest.total_bytes, set(FILES))
    assert read_pointer(remote, artifact.id) is None
    push(plan, remote, count)
    assert counted[0] == artifact.manifest.total_bytes
    again = plan_push(artifact, remote)
    assert (again.there, again.bytes, len(again.missing)) == (True, 0, 0)
    assert known_ids(remote) == [artifact.id]
    pointer = read_pointer(remote, artifact.id)
    assert pointer is not None
    assert (pointer.files, pointer.total_bytes) == (3, artifact.manifest.total_bytes)


def test_a_damaged_file_is_not_pushed_and_nothing_becomes_visible(store: ArtifactStore, remote: RemoteStore):
    artifact = make(store)
    (artifact.folder / "a/b.bin").write_bytes(b"?" + FILES["a/b.bin"][1:])
    with pytest.raises(CorruptArtifact, match=r"a/b\.bin.*was not pushed.*--repair"):
        push(plan_push(artifact, remote), remote)
    assert read_pointer(remote, artifact.id) is None
    assert "a/b.bin" not in remote.sizes(f"tokenize/{artifact.id}/{artifact.manifest_sha256}")


def test_other_bytes_under_an_id_are_a_conflict(store: ArtifactStore, remote: RemoteStore, tmp_path: Path):
    push(plan_push(make(store), remote), remote)
    other = make(ArtifactStore(tmp_path / "other"), files={"a/b.bin": b"other"})
    with pytest.raises(RemoteConflict) as caught:
        plan_push(other, remote)
    assert not caught.value.transient
    assert caught.value.expected == other.manifest_sha256


def test_a_web_server_takes_no_files(store: ArtifactStore):
    with pytest.raises(ConfigError, match="takes no files"):
        plan_push(make(store), RemoteStore("https://user:secret@host.invalid/team"))


def test_a_pull_goes_on_with_what_is_whole_and_fetches_the_rest_again(
    store: ArtifactStore, remote: RemoteStore, tmp_path: Path
):
    push(plan_push(make(store), remote), remote)
    theirs = ArtifactStore(tmp_path / "theirs")
    artifact = borrow(make(store), remote, theirs.root)
    assert set(missing_files(artifact)) == set(FILES)
    fetch(artifact, ["a/b.bin", "empty"], remote)
    (artifact.folder / "a/b.bin").write_bytes(b"?" + FILES["a/b.bin"][1:])  # as a disk might after a power cut
    (artifact.folder / ".with space#%.1-2.tmp").write_bytes(b"torn")
    assert set(missing_files(artifact)) == {"a/b.bin", "with space#%"}
    fetch(artifact, missing_files(artifact), remote)
    theirs.adopt(artifact)
    pulled = theirs.open(artifact.id)
    assert pulled.origin is None
    assert theirs.verify(pulled) == []
    assert {name: pulled.read_bytes(name) for name in FILES} == FILES
    assert pulled.manifest_sha256 == artifact.manifest_sha256


def test_files_come_when_they_are_read_and_no_others(store: ArtifactStore, remote: RemoteStore, tmp_path: Path):
    push(plan_push(make(store), remote), remote)
    theirs = ArtifactStore(tmp_path / "theirs", remote=remote)
    found = theirs.find(TOKENS)
    assert found is not None
    assert not theirs.root.exists()
    assert found.read_bytes("with space#%") == b"x"
    assert [path.name for path in found.folder.rglob("*")] == ["with space#%"]
    assert ArtifactStore(theirs.root).find(TOKENS) is None  # without the remote it is not there
    assert theirs.find(Spec("tokenize", 2, {})) is None
    assert theirs.list() == []
    with pytest.raises(ArtifactNotFound, match="pull it first"):
        theirs.tag("mine", found)


def test_making_what_the_team_has_finds_it(store: ArtifactStore, remote: RemoteStore, tmp_path: Path):
    push(plan_push(make(store), remote), remote)

    def fail(staging: Staging) -> Result:
        pytest.fail("computed what is there")

    made = ArtifactStore(tmp_path / "theirs", remote=remote).make(TOKENS, fail, provenance={})
    assert (made.status, made.artifact.id) == ("cached", TOKENS.id)


def test_a_parent_is_the_very_one_wherever_it_is(store: ArtifactStore, remote: RemoteStore, tmp_path: Path):
    tokens = make(store)
    child = make(store, Spec("harvest", 1, {}, {"tokens": tokens.as_parent()}))
    push(plan_push(child, remote), remote)
    theirs = ArtifactStore(tmp_path / "theirs")
    lent = theirs.resolve(f"{remote.shown}/harvest/{child.id}")
    with pytest.raises(ArtifactNotFound, match=r"made from is not here.*sparsemill pull"):
        theirs.parent(lent, "tokens")
    push(plan_push(tokens, remote), remote)
    assert theirs.parent(lent, "tokens").manifest_sha256 == tokens.manifest_sha256
    make(theirs, files={"a/b.bin": b"other numerics"})
    assert theirs.parent(lent, "tokens").manifest_sha256 == tokens.manifest_sha256  # not the other one, which is here
    with pytest.raises(CorruptArtifact, match="another"):
        theirs.has(borrow(tokens, remote, theirs.root))


def test_a_remote_artifact_is_verified_where_it_is(store: ArtifactStore, remote: RemoteStore, tmp_path: Path):
    artifact = make(store)
    push(plan_push(artifact, remote), remote)
    theirs, seen = ArtifactStore(tmp_path / "theirs"), [(0, 0)]
    lent = theirs.resolve(f"{remote.shown}/tokenize/{artifact.id}")
    assert theirs.verify(lent, lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (artifact.manifest.total_bytes, artifact.manifest.total_bytes)
    folder = tmp_path / "remote" / "tokenize" / artifact.id / artifact.manifest_sha256
    (folder / "empty").write_bytes(b"no more")
    (folder / "with space#%").unlink()
    assert [(one.name, one.kind) for one in theirs.verify(lent)] == [("empty", "sha256"), ("with space#%", "missing")]
    assert not theirs.root.exists()


@pytest.mark.parametrize("name", ["train", "train-0123456789ab"])
def test_a_url_names_its_stage_and_its_id(name: str):
    with pytest.raises(InputError, match="not an artifact in a remote"):
        split_reference(f"s3://user:secret@bucket/team/{name}")
    assert split_reference("s3://bucket/team/train/train-0123456789ab/") == ("s3://bucket/team", "train-0123456789ab")
    assert split_reference("az://c/harvest/harvest-0123456789ab?sig=x") == ("az://c?sig=x", "harvest-0123456789ab")


def test_what_a_url_does_not_have_is_not_found(remote: RemoteStore, store: ArtifactStore):
    with pytest.raises(ArtifactNotFound, match="the remote has no such artifact"):
        store.resolve(f"{remote.shown}/train/train-0123456789ab")


def test_of_several_transfers_the_first_error_ends_the_rest():
    done: list[str] = []

    def work(name: str) -> None:
        done.append(name)
        if name == "3":
            raise RemoteError("no line")

    with pytest.raises(RemoteError, match="no line"):
        transfers.together(work, map(str, range(10_000)))
    assert len(done) < 10_000
