"""Readers while others commit, extend, prune and repair: what was there or what will be, whole, never a part.

A state machine has a reader look at everything before *every* change of the disk, and compares it with a dict; and
once writers and readers are real processes.
"""

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Set
from pathlib import Path
from subprocess import PIPE, Popen
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


LOOKS = Counter[str]()
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


def seen(root: Path, damaged: Set[str] = frozenset()) -> set[str]:
    """Ids of all that a reader finds, each of which must be whole; of the damaged ones, be so or say that it is not."""
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
            assert removed or artifact_id in damaged, error  # noqa: PT017 - or it is read
            continue
        assert files == contents_of(*KNOWN[artifact_id]), artifact_id
        found.add(artifact_id)
    return found


def damage(path: Path) -> None:
    """Makes the file another: links to it keep their bytes."""
    contents = path.read_bytes()
    path.unlink()
    path.write_bytes(contents[:-1] + b"!")


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
        self.there = set[str]()

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
                found = seen(self.root, damaged)
                atomic.set_fault_hook(look)
                assert (before & after) - damaged <= found <= before | after
                LOOKS["looks"] += 1
                LOOKS["found"] += len(found)

        def remove_bit_by_bit(folder: Path) -> None:
            for path in sorted(folder.rglob("*"), reverse=True):
                look("rmtree", path)
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink()
            folder.rmdir()

        atomic.set_fault_hook(look)
        try:
            with mock.patch.object(shutil, "rmtree", remove_bit_by_bit):
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
            damage(artifact.folder / name)
        problems = self.workspace.store.verify(artifact)
        mend = lambda: repair(artifact, problems, self.workspace, remote=remote)  # noqa: E731
        self.watched(set(self.there), mend, damaged=frozenset({artifact_id}))


TestReaders = Readers.TestCase
TestReaders.settings = settings(max_examples=times(15, 400), stateful_step_count=8, deadline=None)


def test_readers_have_found_enough_for_this_to_mean_something():
    assert LOOKS["looks"] > times(200, 10_000)
    assert LOOKS["found"] > LOOKS["looks"] / 4
    print(f"looks at a changing store {LOOKS['looks']:,}, artifacts read in them {LOOKS['found']:,}")


KEPT = spec_of(1, 2).id
WRITER = """
import sys, random
from pathlib import Path
from pipeline.config import Runtime
from pipeline.progress import Quiet
from pipeline.repair import repair
from pipeline.workspace import Workspace
from storage.housekeeping import prune
from storage.remote import RemoteStore
from storage.transfers import plan_push, push
from tests.faults.test_readers import damage, make
root, rng = Path(sys.argv[1]), random.Random(0)
workspace, remote = Workspace(Runtime(root=root), Quiet()), RemoteStore(sys.argv[2])
store, made, mended = workspace.store, 0, 0
kept = make(store, 1, 2)
store.tag("kept", kept)
push(plan_push(kept, remote), remote)
while not Path(sys.argv[3]).exists():
    what = rng.random()
    if what < 0.5:
        make(store, 0, rng.randint(1, 3))
        made += 1
    elif what < 0.75:
        prune(store, older_than_days=-1)
    else:
        damage(kept.folder / rng.choice(sorted(kept.manifest.files)))
        repair(kept, store.verify(kept), workspace, remote=remote)
        mended += 1
print(made, mended)
"""
READER = """
import sys, time
from pathlib import Path
from tests.faults.test_readers import KEPT, seen
root, looks, found, kept = Path(sys.argv[1]), 0, 0, 0
while KEPT not in seen(root, {KEPT}):
    pass
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    ids = seen(root, {KEPT})
    found += len(ids - {KEPT})
    kept += KEPT in ids
    looks += 1
print(looks, found, kept)
"""


def test_real_processes_read_whole_artifacts_while_others_make_remove_and_mend_them(tmp_path: Path):
    """One writer, as one alone extends and prunes: another's pruning may take what it is about to link."""
    root, remote, stop = (str(tmp_path / name) for name in ("store", "remote", "stop"))
    Path(remote).mkdir()
    commands = [[WRITER, root, remote, stop]] + [[READER, root, str(times(4, 120))]] * 2
    writer, *readers = processes = [
        Popen([sys.executable, "-W", "ignore", "-c", *command], cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True)
        for command in commands
    ]
    try:
        outputs = [reader.communicate(timeout=300) for reader in readers]
        Path(stop).touch()
        outputs.append(writer.communicate(timeout=60))
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in (*readers, writer)] == [0] * 3, outputs
    *read, written = [[int(word) for word in out.split()] for out, _ in outputs]
    assert min(written) > 0, "nothing was made, or nothing mended"
    for looks, found, kept in read:
        assert found > 0
        assert 0 < kept <= looks
    print(f"made and mended {written}; looks of each reader, artifacts found and the mended one: {read}")
