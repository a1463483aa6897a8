"""A real harvest, damaged in every way, then verified, read and mended."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import cli
from pipeline.config import Runtime, load_preset
from pipeline.progress import Quiet
from pipeline.repair import Repair, repair
from pipeline.sampling import sample
from pipeline.stages import Chain, run_directly
from pipeline.windows import WindowHarvester
from pipeline.workspace import Workspace
from storage import atomic
from storage.artifact import Artifact
from storage.errors import CorruptArtifact, InputError, RepairRefused
from storage.reader import BatchOrder, ShardReader
from storage.remote import RemoteStore
from storage.shards import WindowBuffer

ROOT = Path(__file__).parents[2]
POSITIONS, WINDOWS = 15, 4
SETTINGS = (
    "harvest.encoding=uint8", f"harvest.n_windows={WINDOWS}", "harvest.window_prompts=64", "harvest.chunk_rows=16",
    "train.pool_rows=512", "train.autoencoder.steps=5", "train.autoencoder.density_window_rows=1024",
)  # fmt: skip
# A file of every kind, with the windows that it takes to mend it: 15 shards of activations a window.
KINDS: dict[str, set[int]] = {
    "store.zarr/activations/c/20/0": {1},
    "store.zarr/prompt/c/1": {1},
    "store.zarr/position/c/3": {3},
    "store.zarr/scale/c/3/0": {3},
    "store.zarr/checksum/c/0/0": {0},
    "statistics/window-00003.safetensors": {3},
    "statistics.safetensors": set(),
    "store.zarr/zarr.json": set(),
    "store.zarr/scale/zarr.json": set(),
}
SWAPPED = {
    "store.zarr/activations/c/20/0": "store.zarr/activations/c/59/0",
    "store.zarr/prompt/c/1": "store.zarr/prompt/c/3",
    "store.zarr/position/c/1": "store.zarr/position/c/3",
    "store.zarr/scale/c/1/0": "store.zarr/scale/c/3/0",
    "store.zarr/checksum/c/1/0": "store.zarr/checksum/c/3/0",
    "statistics/window-00001.safetensors": "statistics/window-00003.safetensors",
}
SHARD = "store.zarr/activations/c/20/0"
OTHER = "store.zarr/activations/c/59/0"
UNAFFECTED = "store.zarr/prompt/c/2"
EXTRA = f"store.zarr/activations/c/{POSITIONS * WINDOWS}/0"

Damage = Callable[[Path], object]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def swap(path: Path, other: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


@pytest.fixture(scope="module")
def original(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Tokens, a harvest and an autoencoder; not to be changed."""
    root = tmp_path_factory.mktemp("original") / "store"
    workspace = Workspace.open(Runtime(root=root, threads=1), Quiet())
    Chain(load_preset(str(tiny_preset), SETTINGS), workspace, run_directly).train()
    return workspace


@pytest.fixture
def workspace(original: Workspace, tmp_path: Path) -> Workspace:
    root = shutil.copytree(original.store.root, tmp_path / "store")
    return Workspace.open(Runtime(root=root, threads=1), Quiet())


@pytest.fixture
def harvest(workspace: Workspace) -> Artifact:
    return workspace.store.resolve("latest", stage="harvest")


@pytest.fixture
def committed(original: Workspace) -> dict[str, bytes]:
    return contents(original.store.resolve("latest", stage="harvest").folder)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The windows that the model ran on."""
    seen: list[int] = []
    compute = WindowHarvester.compute

    def counted(self: WindowHarvester, window: int, *arguments: object) -> object:
        seen.append(window)
        return compute(self, window, *arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(WindowHarvester, "compute", counted)
    return seen


@pytest.fixture
def other_numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another machine computed: each value's last bit differs, and the torch version says why."""
    place, provenance = WindowBuffer.place, Workspace.provenance

    def moved(self: WindowBuffer, first: int, codes: npt.NDArray[np.uint8], scale: object = None) -> None:
        place(self, first, codes ^ 1, scale)  # pyright: ignore[reportArgumentType]

    def told(self: Workspace, *, threads: int | None = None) -> dict[str, object]:
        return {**provenance(self, threads=threads), "torch": "99.0"}

    monkeypatch.setattr(WindowBuffer, "place", moved)
    monkeypatch.setattr(Workspace, "provenance", told)


@pytest.fixture
def remote(harvest: Artifact, committed: dict[str, bytes], tmp_path: Path) -> Path:
    """A folder that holds the committed files as a remote does."""
    for name in harvest.manifest.files:
        path = tmp_path / "remote" / "harvest" / harvest.id / harvest.manifest_sha256 / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(committed[name])
    return tmp_path / "remote"


@pytest.fixture
def hook() -> Generator[Callable[[atomic.FaultHook], None]]:
    yield atomic.set_fault_hook
    atomic.set_fault_hook(None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mend(harvest: Artifact, workspace: Workspace, **options: object) -> Repair:
    return repair(harvest, workspace.store.verify(harvest), workspace, **options)  # pyright: ignore[reportArgumentType]


def read_all(harvest: Artifact) -> None:
    order = BatchOrder(seed=0, batch_rows=64, pool_rows=512, lanes=8)
    for _ in ShardReader.of(harvest).epoch(order, prefetch=0):
        pass


@pytest.mark.parametrize("damage", [flip, zero, truncate, Path.unlink])
def test_damage_of_every_kind_of_file_is_listed_and_mended_from_the_windows_concerned(
    damage: Damage, harvest: Artifact, workspace: Workspace, committed: dict[str, bytes], computed: list[int]
):
    for name in KINDS:
        damage(harvest.folder / name)
    assert {problem.name for problem in workspace.store.verify(harvest)} == set(KINDS)
    done = mend(harvest, workspace)
    assert computed == done.windows == sorted(set[int]().union(*KINDS.values()))
    assert sorted(done.recomputed) == sorted(KINDS)
    assert contents(harvest.folder) == committed
    assert workspace.store.verify(harvest) == []
    assert not list(workspace.store.root.glob(".repair/*"))


def test_swapped_files_of_every_kind_are_listed_and_mended(
    harvest: Artifact, workspace: Workspace, committed: dict[str, bytes], computed: list[int]
):
    for name, other in SWAPPED.items():
        swap(harvest.folder / name, harvest.folder / other)
    assert {problem.name for problem in workspace.store.verify(harvest)} == SWAPPED.keys() | set(SWAPPED.values())
    mend(harvest, workspace)
    assert computed == [1, 3]
    assert contents(harvest.folder) == committed


@pytest.mark.parametrize(("name", "windows"), KINDS.items())
def test_one_damaged_file_takes_its_own_window_alone(
    name: str, windows: set[int], harvest: Artifact, workspace: Workspace, committed: dict[str, bytes],
    computed: list[int],
):  # fmt: skip
    flip(harvest.folder / name)
    mend(harvest, workspace)
    assert computed == sorted(windows)
    assert contents(harvest.folder) == committed


@pytest.mark.parametrize("name", [name for name in KINDS if "/c/" in name])
@pytest.mark.parametrize("damage", [flip, zero, truncate, Path.unlink, "swap"])
def test_a_damaged_shard_is_never_read(name: str, damage: Damage | str, harvest: Artifact):
    read_all(harvest)
    if isinstance(damage, str):
        swap(harvest.folder / name, harvest.folder / other_shard(name))
    else:
        damage(harvest.folder / name)
    with pytest.raises(CorruptArtifact, match=f"(shard|metadata).*of {harvest.id}") as caught:
        read_all(harvest)
    shard = name.removeprefix("store.zarr/")
    accepted = {shard} | ({other_shard(name).removeprefix("store.zarr/")} if isinstance(damage, str) else set())
    assert any(one in str(caught.value) for one in accepted)
    assert f"sparsemill verify {harvest.id} --repair" in str(caught.value)


def other_shard(name: str) -> str:
    """Another shard of the same array."""
    head, _, tail = name.partition("/c/")
    number, slash, rest = tail.partition("/")
    return f"{head}/c/{int(number) - 1 if int(number) else 1}{slash}{rest}"


def test_an_extra_shard_is_an_error_naming_it_and_is_moved_away(
    harvest: Artifact, workspace: Workspace, committed: dict[str, bytes], computed: list[int]
):
    for name in (EXTRA, "notes.txt"):
        (harvest.folder / name).parent.mkdir(exist_ok=True)
        (harvest.folder / name).write_bytes(name.encode())
    with pytest.raises(CorruptArtifact, match=f"of {harvest.id} has a shard too many.*activations/c/60"):
        read_all(harvest)
    assert [(problem.name, problem.kind) for problem in workspace.store.verify(harvest)] == [
        ("notes.txt", "extra"), (EXTRA, "extra"),
    ]  # fmt: skip
    for _ in range(2):
        done = mend(harvest, workspace)
        assert (done.quarantined, computed) == (["notes.txt", EXTRA], [])
        read_all(harvest)
        for name in (EXTRA, "notes.txt"):
            (harvest.folder / name).parent.mkdir(exist_ok=True)
            (harvest.folder / name).write_bytes(b"again")
    mend(harvest, workspace)
    assert contents(harvest.folder) == committed
    kept = contents(workspace.store.root / ".quarantine" / harvest.id)
    assert kept == {
        name + suffix: data
        for name in (EXTRA, "notes.txt")
        for suffix, data in {"": name.encode(), ".1": b"again", ".2": b"again"}.items()
    }


def test_what_stands_in_a_files_way_is_moved_away(harvest: Artifact, workspace: Workspace, committed: dict[str, bytes]):
    (harvest.folder / "statistics.safetensors").unlink()
    (harvest.folder / "statistics.safetensors").mkdir()
    (harvest.folder / "statistics.safetensors/x").write_bytes(b"")
    shutil.rmtree(harvest.folder / "store.zarr/activations/c/20")
    (harvest.folder / "store.zarr/activations/c/20").write_bytes(b"a file")
    (harvest.folder / UNAFFECTED).unlink()
    (harvest.folder / UNAFFECTED).symlink_to("1")
    mend(harvest, workspace)
    assert contents(harvest.folder) == committed
    assert not (harvest.folder / UNAFFECTED).is_symlink()


def test_a_file_shared_with_another_artifact_is_replaced_not_written_into(
    harvest: Artifact, workspace: Workspace, committed: dict[str, bytes], tmp_path: Path
):
    flip(harvest.folder / SHARD)
    wrong = (harvest.folder / SHARD).read_bytes()
    (tmp_path / "other").hardlink_to(harvest.folder / SHARD)
    mend(harvest, workspace)
    assert (harvest.folder / SHARD).read_bytes() == committed[SHARD]
    assert (tmp_path / "other").read_bytes() == wrong


def test_a_reader_sees_old_or_new_files_at_every_step(
    harvest: Artifact, workspace: Workspace, committed: dict[str, bytes], hook: Callable[[atomic.FaultHook], None]
):
    for name in KINDS:
        flip(harvest.folder / name)
    damaged, steps = contents(harvest.folder), 0

    def check(operation: str, path: Path) -> None:
        nonlocal steps
        if operation != "rename" and not path.is_relative_to(harvest.folder):
            return
        found = contents(harvest.folder)
        assert found.keys() == committed.keys()
        assert all(data in {damaged[name], committed[name]} for name, data in found.items())
        steps += 1

    hook(check)
    mend(harvest, workspace)
    assert steps >= 2 * len(KINDS)


def test_a_file_is_durable_before_it_takes_its_place(
    harvest: Artifact, workspace: Workspace, hook: Callable[[atomic.FaultHook], None]
):
    (harvest.folder / SHARD).unlink()
    steps: list[tuple[str, Path]] = []
    hook(lambda operation, path: steps.append((operation, path)))
    mend(harvest, workspace)
    (renamed,) = [i for i, (operation, _) in enumerate(steps) if operation == "rename"]
    assert ("fsync", steps[renamed][1]) in steps[:renamed]
    assert ("fsync-folder", (harvest.folder / SHARD).parent) in steps[renamed:]


def test_a_repair_waits_for_whoever_holds_the_artifact(
    harvest: Artifact, workspace: Workspace, committed: dict[str, bytes]
):
    class Listening(Quiet):
        waiting = threading.Event()

        def say(self, message: str) -> None:
            if "another process" in message:
                self.waiting.set()

    flip(harvest.folder / SHARD)
    second = Workspace(workspace.runtime, Listening())
    problems = workspace.store.verify(harvest)
    thread = threading.Thread(target=repair, args=(harvest, problems, second))
    with workspace.store.lock(harvest.id):
        thread.start()
        assert Listening.waiting.wait(30)
        assert contents(harvest.folder) != committed
    thread.join(60)
    assert contents(harvest.folder) == committed


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.config import Runtime
from pipeline.repair import repair
from pipeline.workspace import Workspace
from storage import atomic
workspace = Workspace.open(Runtime(root=Path(sys.argv[1]), threads=1))
harvest = workspace.store.resolve("latest", stage="harvest")
left = [int(sys.argv[2])]
def hook(operation, path):
    if operation == "rename":
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
problems = workspace.store.verify(harvest)
atomic.set_fault_hook(hook)
repair(harvest, problems, workspace)
"""


def test_a_killed_repair_keeps_whole_files_and_completes_when_run_again(
    harvest: Artifact, workspace: Workspace, committed: dict[str, bytes]
):
    renames = 3
    for name in KINDS:
        flip(harvest.folder / name)
    damaged = contents(harvest.folder)
    command = [sys.executable, "-c", KILLED, str(workspace.store.root), str(renames)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    found = contents(harvest.folder)
    assert found.keys() == committed.keys()
    assert sum(found[name] == committed[name] for name in KINDS) == renames
    assert all(found[name] in {damaged[name], committed[name]} for name in committed)
    mend(harvest, workspace)
    assert contents(harvest.folder) == committed
    assert not list(workspace.store.root.glob(".repair/*"))


def test_other_numerics_are_refused_with_nothing_changed(harvest: Artifact, workspace: Workspace, other_numerics: None):
    for name in (SHARD, OTHER, "statistics.safetensors", "store.zarr/zarr.json"):
        flip(harvest.folder / name)
    (harvest.folder / "notes.txt").write_bytes(b"")
    before = contents(workspace.store.root)
    with pytest.raises(RepairRefused) as caught:
        mend(harvest, workspace)
    assert contents(workspace.store.root) == before
    recorded = harvest.manifest.provenance["torch"]
    for expected in (SHARD, f"torch 99.0 (recorded: {recorded})", "--remote", "--rewrite", "train-"):
        assert expected in str(caught.value)
    assert "threads" not in str(caught.value)


def test_files_that_come_out_alike_are_mended_whatever_the_numerics(
    harvest: Artifact, workspace: Workspace, committed: dict[str, bytes], other_numerics: None
):
    flip(harvest.folder / UNAFFECTED)
    assert mend(harvest, workspace).recomputed == [UNAFFECTED]
    assert contents(harvest.folder) == committed


def test_what_comes_out_otherwise_is_fetched_by_its_hash(
    harvest: Artifact, workspace: Workspace, committed: dict[str, bytes], remote: Path, other_numerics: None
):
    for name in (SHARD, UNAFFECTED, "statistics.safetensors"):
        flip(harvest.folder / name)
    done = mend(harvest, workspace, remote=RemoteStore(str(remote)))
    assert (done.windows, done.fetched) == ([1, 2], [SHARD])
    assert sorted(done.recomputed) == ["statistics.safetensors", UNAFFECTED]
    assert contents(harvest.folder) == committed


def test_a_remote_is_not_asked_where_the_numerics_agree(harvest: Artifact, workspace: Workspace, tmp_path: Path):
    flip(harvest.folder / SHARD)
    (tmp_path / "empty").mkdir()
    assert mend(harvest, workspace, remote=RemoteStore(str(tmp_path / "empty"))).recomputed == [SHARD]


@pytest.mark.parametrize("wrong", [flip, truncate, Path.unlink])
def test_a_remote_with_other_bytes_changes_nothing(
    wrong: Damage, harvest: Artifact, workspace: Workspace, remote: Path, other_numerics: None
):
    flip(harvest.folder / SHARD)
    (held,) = remote.rglob(SHARD)
    wrong(held)
    before = contents(workspace.store.root)
    with pytest.raises(RepairRefused, match=r"torch 99.0.*the remote.*--rewrite"):
        mend(harvest, workspace, remote=RemoteStore(str(remote)))
    assert contents(workspace.store.root) == before


def test_rewriting_makes_another_artifact_of_the_same_id_and_names_what_was_made_from_the_old(
    harvest: Artifact, workspace: Workspace, other_numerics: None
):
    flip(harvest.folder / SHARD)
    (harvest.folder / "notes.txt").write_bytes(b"kept")
    sae = workspace.store.resolve("latest", stage="train")
    done = mend(harvest, workspace, rewrite=True)
    assert (done.rewritten, done.children, done.quarantined) == (True, [sae.id], ["notes.txt"])
    now = workspace.store.open(harvest.id)
    assert now.spec == harvest.spec
    assert now.manifest.provenance == {**harvest.manifest.provenance, "torch": "99.0"}
    assert now.manifest_sha256 != harvest.manifest_sha256
    assert workspace.store.verify(now) == []
    read_all(now)
    with pytest.raises(CorruptArtifact, match=f"{sae.id} was made from another {harvest.id}"):
        workspace.store.parent(sae, "activations")


def test_a_sample_is_not_rewritten_as_the_shorter_harvest_would_be_another_artifact(
    harvest: Artifact, workspace: Workspace, other_numerics: None
):
    taken = sample(harvest, 2, workspace).artifact
    before = workspace.store.ids()
    flip(taken.folder / SHARD)
    with pytest.raises(RepairRefused, match="take the sample again") as caught:
        mend(taken, workspace, rewrite=True)
    assert "--rewrite" not in str(caught.value)
    assert "torch 99.0" in str(caught.value)
    assert workspace.store.ids() == before


def test_rewriting_is_not_done_where_the_damage_can_be_mended(
    harvest: Artifact, workspace: Workspace, committed: dict[str, bytes]
):
    flip(harvest.folder / SHARD)
    assert not mend(harvest, workspace, rewrite=True).rewritten
    assert contents(harvest.folder) == committed


def test_without_its_parent_a_harvest_comes_from_the_remote_or_not_at_all(
    harvest: Artifact, workspace: Workspace, committed: dict[str, bytes], remote: Path
):
    flip(harvest.folder / SHARD)
    tokens = workspace.store.parent(harvest, "tokens")
    shutil.rmtree(tokens.folder)
    with pytest.raises(RepairRefused, match=f"is not here.*{tokens.id}"):
        mend(harvest, workspace)
    assert mend(harvest, workspace, remote=RemoteStore(str(remote))).fetched == [SHARD]
    assert contents(harvest.folder) == committed


def test_a_harvest_of_another_version_comes_from_the_remote_or_not_at_all(
    harvest: Artifact, workspace: Workspace, committed: dict[str, bytes], remote: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.harvest.OUTPUT_VERSION", 99)
    flip(harvest.folder / SHARD)
    with pytest.raises(RepairRefused, match="another output version"):
        mend(harvest, workspace)
    assert mend(harvest, workspace, remote=RemoteStore(str(remote))).fetched == [SHARD]
    assert contents(harvest.folder) == committed


def test_a_damaged_parent_is_suspected_where_nothing_else_differs(harvest: Artifact, workspace: Workspace):
    tokens = workspace.store.parent(harvest, "tokens")
    for path in tokens.folder.glob("train-*.arrow"):
        data = np.fromfile(path, np.uint32)
        data[len(data) // 8 : len(data) // 2] ^= 1  # among them prompts of every window
        data.tofile(path)
    flip(harvest.folder / SHARD)
    before = contents(harvest.folder)
    with pytest.raises(RepairRefused, match=tokens.id):
        mend(harvest, workspace)
    assert contents(harvest.folder) == before


def test_an_artifact_of_another_store_is_not_touched(harvest: Artifact, original: Workspace, workspace: Workspace):
    flip(harvest.folder / SHARD)
    before = contents(harvest.folder)
    with pytest.raises(InputError, match="--home"):
        repair(harvest, workspace.store.verify(harvest), original)
    assert contents(harvest.folder) == before


def test_an_artifact_replaced_since_it_was_verified_is_left_alone(harvest: Artifact, workspace: Workspace):
    flip(harvest.folder / SHARD)
    problems = workspace.store.verify(harvest)
    flip(harvest.folder / "manifest.json")
    before = contents(harvest.folder)
    with pytest.raises(CorruptArtifact, match="manifest"):
        repair(harvest, problems, workspace)
    assert contents(harvest.folder) == before


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    places=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 2**20)), min_size=1, max_size=3),
    kind=st.sampled_from(["flip", "truncate", "extend", "remove"]),
)
def test_any_damage_anywhere_ends_with_the_committed_bytes(
    harvest: Artifact, workspace: Workspace, committed: dict[str, bytes], places: list[tuple[int, int]], kind: str
):
    names = sorted(harvest.manifest.files)
    for name, place in {names[number % len(names)]: place for number, place in places}.items():
        data = bytearray(committed[name])
        offset = place % len(data)
        if kind == "flip":
            data[offset] ^= 1 << offset % 8
        (harvest.folder / name).write_bytes(data[:offset] if kind == "truncate" else data + b"x" * (kind == "extend"))
        if kind == "remove":
            (harvest.folder / name).unlink()
    mend(harvest, workspace)
    assert contents(harvest.folder) == committed


@pytest.fixture
def sparsemill(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process; returns exit code, stdout, stderr."""
    monkeypatch.setenv("SPARSEMILL_HOME", str(workspace.store.root))
    monkeypatch.delenv("SPARSEMILL_REMOTE", raising=False)

    app = cli.app

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(cli, "app", partial(app, arguments))
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return code, *capsys.readouterr()

    return run


def test_the_command_line_lists_mends_and_tells_by_its_exit_code(
    harvest: Artifact, committed: dict[str, bytes], sparsemill: Callable[..., tuple[int, str, str]]
):
    flip(harvest.folder / SHARD)
    (harvest.folder / UNAFFECTED).unlink()
    (harvest.folder / "notes.txt").write_bytes(b"")
    code, out, err = sparsemill("verify", harvest.id)
    assert code == 1
    assert f"verify {harvest.id}" in err  # the progress
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == [SHARD, UNAFFECTED, "notes.txt", harvest.id]
    assert "chunk 2 of 4 damaged" in lines[0]
    assert "2 of 87 files damaged, 1 extra" in lines[-1]
    assert f"'sparsemill verify {harvest.id} --repair'" in lines[-1]
    code, out, _ = sparsemill("verify", harvest.id, "--repair")
    assert code == 0
    assert f"{harvest.id}: windows 1, 2 computed again; 2 files made again, as committed; 1 file moved to" in out
    assert out.splitlines()[-1] == f"{harvest.id}: 87 files as committed"
    assert contents(harvest.folder) == committed
    assert sparsemill("verify", harvest.id)[0] == 0


def test_the_command_line_speaks_json(harvest: Artifact, sparsemill: Callable[..., tuple[int, str, str]]):
    flip(harvest.folder / SHARD)
    code, out, _ = sparsemill("verify", harvest.id, "--json")
    found = json.loads(out)
    assert (code, found["id"], found["files"], found["repair"]) == (1, harvest.id, 87, None)
    assert [(one["name"], one["kind"], one["detail"]) for one in found["problems"]] == [
        (SHARD, "sha256", "chunk 2 of 4 damaged")
    ]
    code, out, _ = sparsemill("verify", harvest.id, "--json", "--repair")
    assert code == 0
    assert json.loads(out)["problems"] == []
    assert json.loads(out)["repair"]["recomputed"] == [SHARD]


def test_the_command_line_fetches_or_says_what_else_helps(
    workspace: Workspace, tmp_path: Path, sparsemill: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    sae = workspace.store.resolve("latest", stage="train")
    name = next(name for name in sae.manifest.files if name.endswith(".safetensors"))
    held = tmp_path / "remote" / "train" / sae.id / sae.manifest_sha256 / name
    held.parent.mkdir(parents=True)
    held.write_bytes((sae.folder / name).read_bytes())
    flip(sae.folder / name)
    for flag in ("--repair", "--rewrite"):
        code, out, err = sparsemill("verify", sae.id, flag)
        assert code == 1
        assert out.startswith(f"{name}: sha256")
        assert "--remote URL" in err
        assert "run the stage again" in err
        assert "Traceback" not in err
    code, out, _ = sparsemill("verify", sae.id, "--repair", "--json")
    assert (code, [one["name"] for one in json.loads(out)["problems"]]) == (1, [name])
    code, _, err = sparsemill("verify", sae.id, "--repair", "--remote", "nowhere://user:secret@x")
    assert (code, "cannot be used" in err, "secret" in err) == (1, True, False)
    monkeypatch.setenv("SPARSEMILL_REMOTE", str(tmp_path / "remote"))
    code, out, _ = sparsemill("verify", sae.id, "--repair")
    assert (code, "1 file fetched" in out) == (0, True)
    assert workspace.store.verify(sae) == []


def test_the_command_line_believes_no_repair_but_checks_again(
    harvest: Artifact, sparsemill: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.repair.repair", lambda *_, **__: Repair())
    flip(harvest.folder / SHARD)
    code, out, _ = sparsemill("verify", harvest.id, "--repair")
    assert (code, out.count(f"{SHARD}: sha256")) == (1, 2)
    assert "1 of 87 files damaged" in out


def test_the_command_line_rewrites_when_told_to(
    harvest: Artifact, workspace: Workspace, sparsemill: Callable[..., tuple[int, str, str]], other_numerics: None
):
    flip(harvest.folder / SHARD)
    assert sparsemill("verify", harvest.id, "--repair")[0] == 1
    code, out, _ = sparsemill("verify", harvest.id, "--rewrite")
    assert code == 0
    assert workspace.store.open(harvest.id).manifest_sha256 in out
    assert workspace.store.resolve("latest", stage="train").id in out


def test_a_damaged_manifest_is_one_clear_line(harvest: Artifact, sparsemill: Callable[..., tuple[int, str, str]]):
    flip(harvest.folder / "manifest.json")
    for arguments in ((), ("--repair",)):
        code, out, err = sparsemill("verify", harvest.id, *arguments)
        assert (code, out) == (1, "")
        assert str(harvest.folder / "manifest.json") in err
        assert "remove the folder" in err
        assert "Traceback" not in err
