"""Readers while others commit, extend, prune and repair: what was there or what will be, whole, never a part.

A state machine has a reader look at everything before *every* change of the disk, and compares it with a dict; and
once writers and readers are real processes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from pipeline.config import Runtime
from pipeline.progress import Quiet
from pipeline.repair import repair
from pipeline.workspace import Workspace
from storage import atomic
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.errors import ArtifactNotFound, CorruptArtifact
from storage.housekeeping import prune
from storage.remote import RemoteStore
from storage.transfers import plan_push, push
from tests.faults.lengths import times

ROOT = Path(__file__).parents[2]
SEEDS, LENGTHS = st.integers(0, 1), st.integers(1, 3)


def spec_of(seed: int, windows: int) -> Spec:
    return Spec("train", 1, {"seed": seed, "windows": windows})


def contents_of(seed: int, windows: int) -> dict[str, bytes]:
    return {f"window-{w}/{part}": f"{seed} {w} {part}".encode() * 500 for w in range(windows) for part in "ab"}


KNOWN = {spec_of(seed, windows).id: (seed, windows) for seed in range(2) for windows in range(1, 4)}


def make(store: ArtifactStore, seed: int, windows: int) -> Artifact:
    """A longer one takes the windows of those that are there, as a harvest does."""

    def produce(staging: Staging) -> Result:
        for window in range(windows):
            names = [f"window-{window}/{part}" for part in "ab"]
            others = [store.open(name) for name in store.ids() if KNOWN[name][0] == seed and KNOWN[name][1] > window]
            if any(staging.adopt(f"window-{window}", names, other) for other in others):
                continue
            for name in names:
                staging.write_bytes(name, contents_of(seed, windows)[name])
            staging.finish(f"window-{window}", names)
        return Result({})

    return store.make(spec_of(seed, windows), produce, provenance={}).artifact


def seen(root: Path, may_be_damaged: bool = False) -> set[str]:
    """Ids of all that a reader finds, each of which must be whole, or say that it is not."""
    found = set[str]()
    store = ArtifactStore(root)
    for artifact_id in store.ids():
        try:
            artifact = store.open(artifact_id)
            files = {name: artifact.read_bytes(name) for name in artifact.manifest.files}
        except (ArtifactNotFound, FileNotFoundError):
            continue  # removed while it was read
        except CorruptArtifact as error:
            removed = not (root / "train" / artifact_id).exists()
            assert removed or may_be_damaged, error  # noqa: PT017 - or it is read
            continue
        assert files == contents_of(*KNOWN[artifact_id]), artifact_id
        found.add(artifact_id)
    return found


class Readers(RuleBasedStateMachine):
    """A reader looks before every step of every change."""

    @initialize()
    def create(self) -> None:
        self.free_fsync = mock.patch.object(os, "fsync", int)
        self.free_fsync.start()
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "remote").mkdir()
        self.root = self.folder / "store"
        self.workspace = Workspace(Runtime(root=self.root), Quiet())
        self.there, self.looks = set[str](), 0

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.free_fsync.stop()
            shutil.rmtree(self.folder)

    def watched(self, after: set[str], action: object, *, damaged: frozenset[str] = frozenset()) -> None:
        """Does something; a reader that looks finds all of what stays, and nothing that neither was nor will be."""
        before = set(self.there)

        def look(_operation: str, path: Path) -> None:
            if self.root.exists() and self.root in path.parents:
                atomic.set_fault_hook(None)  # a reader, too, may sync what it found
                found = seen(self.root, may_be_damaged=bool(damaged))
                atomic.set_fault_hook(look)
                assert (before & after) - damaged <= found <= before | after
                self.looks += 1

        atomic.set_fault_hook(look)
        try:
            action()  # type: ignore[operator]
        finally:
            atomic.set_fault_hook(None)
        assert seen(self.root) == after
        self.there = after

    @rule(seed=SEEDS, windows=LENGTHS)
    def commit_or_extend(self, seed: int, windows: int) -> None:
        self.watched({*self.there, spec_of(seed, windows).id}, lambda: make(self.workspace.store, seed, windows))

    @rule(seed=SEEDS, windows=LENGTHS)
    def prune_all_but_one(self, seed: int, windows: int) -> None:
        kept = spec_of(seed, windows).id
        if kept in self.there:
            self.workspace.store.tag("kept", self.workspace.store.open(kept))
            self.watched({kept}, lambda: prune(self.workspace.store, older_than_days=-1))

    @rule(seed=SEEDS, windows=LENGTHS, data=st.data())
    def damage_and_repair(self, seed: int, windows: int, data: st.DataObject) -> None:
        artifact_id = spec_of(seed, windows).id
        if artifact_id not in self.there:
            return
        artifact, remote = self.workspace.store.open(artifact_id), RemoteStore(str(self.folder / "remote"))
        plan = plan_push(artifact, remote)
        if not plan.there:
            push(plan, remote)
        for name in data.draw(st.sets(st.sampled_from(sorted(artifact.manifest.files)), min_size=1)):
            contents = (artifact.folder / name).read_bytes()
            (artifact.folder / name).unlink()
            (artifact.folder / name).write_bytes(contents[:-1] + b"!")
        problems = self.workspace.store.verify(artifact)
        mend = lambda: repair(artifact, problems, self.workspace, remote=remote)  # noqa: E731
        self.watched(set(self.there), mend, damaged=frozenset({artifact_id}))


TestReaders = Readers.TestCase
TestReaders.settings = settings(max_examples=times(15, 400), stateful_step_count=8, deadline=None)


WRITER = """
import sys, random, time
from pathlib import Path
from storage.artifacts import ArtifactStore
from storage.housekeeping import prune
from tests.faults.test_readers import make
root, seconds, seed = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
rng, end = random.Random(seed), time.monotonic() + seconds
store, made = ArtifactStore(root), 0
while time.monotonic() < end:
    if rng.random() < 0.7:
        make(store, seed, rng.randint(1, 3))
        made += 1
    else:
        prune(store, older_than_days=-1)
print(made)
"""
READER = """
import json, sys, time
from pathlib import Path
from tests.faults.test_readers import seen
root, end, looks, found = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2]), 0, 0
while time.monotonic() < end:
    found += len(seen(root))
    looks += 1
print(looks, found)
"""


def test_real_processes_read_whole_artifacts_while_others_make_and_remove_them(tmp_path: Path):
    """One writer a seed, as one alone extends and prunes: another's pruning may take what it is about to link."""
    seconds, root = str(times(4, 120)), str(tmp_path / "store")
    commands = [[sys.executable, "-W", "ignore", "-c", WRITER, root, seconds, "0"]]
    commands += [[sys.executable, "-W", "ignore", "-c", READER, root, seconds]] * 2
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, outputs
    made, *read = [[int(word) for word in out.split()] for out, _ in outputs]
    assert made[0] > 0
    assert all(looks > 0 for looks, _ in read)
