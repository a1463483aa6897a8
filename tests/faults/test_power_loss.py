"""Power cuts between any two changes of the disk: what was committed stays, nothing half made shows, making it ends."""

import random
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from storage.artifacts import ArtifactStore, Made, Result, Spec, Staging
from storage.borrowing import Borrowing
from storage.remote import RemoteStore
from storage.transfers import fetch, missing_files, plan_push, push
from tests.faults.crash_disk import CrashDisk, Stopped
from tests.faults.lengths import LONG, times

SEEDS = st.integers(0, 2)
STEPS = st.integers(0, 110)
KEPT = st.sampled_from([0.0, 0.3, 0.7, 1.0])
CUTS = {"power": 0, "kills": 0}


def spec_of(seed: int) -> Spec:
    return Spec("harvest" if seed % 2 else "train", 1, {"seed": seed})


def make(store: ArtifactStore, seed: int) -> Made:
    def produce(staging: Staging) -> Result:
        for unit in ("w0", "w1"):
            if unit not in staging.finished:
                staging.write_bytes(f"{unit}/a", f"{seed} {unit}".encode() * 20)
                staging.finish(unit, [f"{unit}/a"], {"unit": unit})
        staging.write_bytes("deep/er/summary", b"all")
        return Result({"units": 2})

    return store.make(spec_of(seed), produce, provenance={"device": "cpu"})


def pull(store: ArtifactStore, seed: int, remote: RemoteStore) -> None:
    found = Borrowing(remote, store.root).find(spec_of(seed).id)
    assert found is not None
    with store.lock(found.id):
        if not store.has(found):
            fetch(found, missing_files(found), remote)
            store.adopt(found)


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All artifacts, made where the power never fails, and pushed from there: what each must be."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "remote").mkdir()
    remote = RemoteStore((folder / "remote").as_uri())
    for seed in range(3):
        made = make(ArtifactStore(folder / "store"), seed).artifact
        Machine.expected[seed] = made.manifest_sha256
        push(plan_push(made, remote), remote)
    Machine.remote = remote
    return folder


class Machine(RuleBasedStateMachine):
    """A store on a crash disk; ``promised`` holds what a call said that it made before the power failed."""

    remote: RemoteStore
    expected: dict[int, str] = {}  # noqa: RUF012 - filled once, by the module's fixture

    @initialize()
    def switch_on(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="power-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.n_disks = 0
        (self.folder / "0").mkdir()
        self.disk = CrashDisk(self.folder / "0")
        self.promised: set[int] = set()
        self.tags: dict[str, set[int]] = {}
        self.one_at_a_time = mock.patch("storage.transfers.FILES_AT_ONCE", 1)
        self.one_at_a_time.start()
        with self.disk.behind_os():
            make(self.store, 0)
        self.promised.add(0)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            with self.disk.behind_os():
                for seed in range(3):
                    assert make(self.store, seed).artifact.manifest_sha256 == self.expected[seed]
                    self.promised.add(seed)
            self.check()
            self.one_at_a_time.stop()
            shutil.rmtree(self.folder)

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.disk.root)

    @rule(seed=SEEDS, steps=STEPS, power=st.booleans(), kept=KEPT, chance=st.integers(0, 2**32))
    def make(self, seed: int, steps: int, power: bool, kept: float, chance: int) -> None:
        if self.runs_to_its_end(lambda: make(self.store, seed), steps, power, kept, chance):
            self.promised.add(seed)

    @rule(seed=SEEDS, steps=STEPS, power=st.booleans(), kept=KEPT, chance=st.integers(0, 2**32))
    def pull(self, seed: int, steps: int, power: bool, kept: float, chance: int) -> None:
        if self.runs_to_its_end(lambda: pull(self.store, seed, self.remote), steps, power, kept, chance):
            self.promised.add(seed)

    @rule(seed=SEEDS, steps=st.integers(0, 8), power=st.booleans(), kept=KEPT, chance=st.integers(0, 2**32))
    def tag(self, seed: int, steps: int, power: bool, kept: float, chance: int) -> None:
        if seed in self.promised:
            before = self.tags.get("mine", set())
            self.tags["mine"] = before | {seed} if before else {-1, seed}
            artifact = self.store.open(spec_of(seed).id)
            if self.runs_to_its_end(lambda: self.store.tag("mine", artifact), steps, power, kept, chance):
                self.tags["mine"] = {seed}

    @rule(kept=KEPT, chance=st.integers(0, 2**32))
    def cut_power(self, kept: float, chance: int) -> None:
        self.n_disks += 1
        self.disk = self.disk.cut_power(self.folder / str(self.n_disks), random.Random(chance), kept)
        CUTS["power"] += 1
        self.check()

    def runs_to_its_end(self, act: Callable[[], object], steps: int, power: bool, kept: float, chance: int) -> bool:
        """Whether it ended before its process did; after which, perhaps, the power fails too."""
        self.disk.stop_after(steps)
        with self.disk.behind_os(), suppress(Stopped):
            act()
            self.disk.stop_after(None)
            return True
        self.disk.stop_after(None)
        CUTS["kills"] += 1
        if power:
            self.cut_power(kept, chance)
        else:
            self.check()
        return False

    def check(self) -> None:
        """A reader finds all that was promised, and nothing that is not whole."""
        found = {artifact_id: self.store.open(artifact_id) for artifact_id in self.store.ids()}
        for seed in range(3):
            artifact = found.pop(spec_of(seed).id, None)
            assert artifact is not None or seed not in self.promised
            if artifact is not None:
                assert artifact.manifest_sha256 == self.expected[seed]
                assert self.store.verify(artifact) == []
        assert not found
        if "mine" in self.tags:
            tags = self.store.tags()
            at = {-1} if "mine" not in tags else {seed for seed in range(3) if spec_of(seed).id == tags["mine"]}
            assert at <= self.tags["mine"]


Machine.TestCase.settings = settings(
    max_examples=times(60, 1500), stateful_step_count=8, deadline=None, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)  # fmt: skip
TestPowerLoss = Machine.TestCase


def changes_of(act: Callable[[Path], object], root: Path) -> int:
    """How many changes of the disk it takes."""
    root.mkdir()
    disk = CrashDisk(root)
    with disk.behind_os():
        act(root)
    return disk.changes


def make_and_tag(root: Path) -> None:
    store = ArtifactStore(root / "store")
    store.tag("good", make(store, 1).artifact)


def pull_and_tag(root: Path) -> None:
    store = ArtifactStore(root / "store")
    with mock.patch("storage.transfers.FILES_AT_ONCE", 1):
        pull(store, 1, Machine.remote)
    store.tag("good", store.open(spec_of(1).id))


@pytest.mark.parametrize("act", [make_and_tag, pull_and_tag])
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0] if LONG else [0.0])
def test_the_power_fails_between_any_two_changes(kept: float, act: Callable[[Path], None], tmp_path: Path):
    n_changes = changes_of(act, tmp_path / "whole")
    assert n_changes > 50
    for number in range(n_changes + 1):
        (tmp_path / str(number)).mkdir()
        disk = CrashDisk(tmp_path / str(number))
        disk.stop_after(number)
        with disk.behind_os(), suppress(Stopped):
            act(disk.root)
        CUTS["power"] += 1
        disk = disk.cut_power(tmp_path / f"{number}-after", random.Random(number), kept)
        store = ArtifactStore(disk.root / "store")
        for artifact_id in store.ids():
            assert store.verify(store.open(artifact_id)) == []
        assert set(store.tags().values()) <= set(store.ids())
        if number == n_changes:
            assert store.tags() == {"good": spec_of(1).id}
        act(disk.root)
        assert store.open(spec_of(1).id).manifest_sha256 == Machine.expected[1]


@pytest.mark.parametrize("act", [make_and_tag, pull_and_tag])
def test_killed_at_any_change_then_done_then_out_of_power_all_of_it_stays(act: Callable[[Path], None], tmp_path: Path):
    for number in range(changes_of(act, tmp_path / "whole")):
        (tmp_path / str(number)).mkdir()
        disk = CrashDisk(tmp_path / str(number))
        disk.stop_after(number)
        with disk.behind_os(), suppress(Stopped):
            act(disk.root)
        disk.stop_after(None)
        with disk.behind_os():
            act(disk.root)
        CUTS["kills"] += 1
        CUTS["power"] += 1
        store = ArtifactStore(disk.cut_power(tmp_path / f"{number}-after", random.Random(0), 0.0).root / "store")
        assert store.tags() == {"good": spec_of(1).id}
        assert store.open(spec_of(1).id).manifest_sha256 == Machine.expected[1]
        assert store.verify(store.open(spec_of(1).id)) == []


@pytest.mark.parametrize("chance", range(3))
def test_a_unit_that_was_finished_is_not_computed_again_after_a_power_cut(chance: int, tmp_path: Path):
    (tmp_path / "before").mkdir()
    disk = CrashDisk(tmp_path / "before")

    def first_unit_then_dark(staging: Staging) -> Result:
        staging.write_bytes("w0/a", b"the work of hours")
        staging.finish("w0", ["w0/a"])
        raise Stopped

    def found(staging: Staging) -> Result:
        assert list(staging.finished) == ["w0"]
        return Result({})

    with disk.behind_os(), pytest.raises(Stopped):
        ArtifactStore(disk.root).make(spec_of(1), first_unit_then_dark, provenance={})
    CUTS["power"] += 1
    after = disk.cut_power(tmp_path / "after", random.Random(chance), 0.0)
    made = ArtifactStore(after.root).make(spec_of(1), found, provenance={}).artifact
    assert (made.folder / "w0/a").read_bytes() == b"the work of hours"


def test_power_has_failed_often_enough_for_this_to_mean_something():
    assert CUTS["power"] > (2000 if LONG else 200)
    assert CUTS["kills"] > (1000 if LONG else 50)
    print(f"power cuts {CUTS['power']:,}, kills {CUTS['kills']:,}")
