"""The artifact store against a plain dict, with writing that fails at any step and damage to unfinished work."""

import errno
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from storage import atomic
from storage.artifacts import ArtifactStore, Made, Result, Spec, Staging
from storage.errors import ArtifactNotFound, StorageFull

SEEDS = st.integers(0, 3)


def spec_of(seed: int) -> Spec:
    return Spec("harvest" if seed % 2 else "train", 1, {"seed": seed})


def contents_of(seed: int) -> dict[str, bytes]:
    units = {f"w{unit}/{name}": f"{seed} {unit} {name}".encode() * 20 for unit in range(3) for name in ("a", "b")}
    return units | {"summary": b"all"}


def make(store: ArtifactStore, seed: int) -> Made:
    def produce(staging: Staging) -> Result:
        for unit in range(3):
            if f"w{unit}" not in staging.finished:
                names = [f"w{unit}/{name}" for name in ("a", "b")]
                for name in names:
                    staging.write_bytes(name, contents_of(seed)[name])
                staging.finish(f"w{unit}", names, {"unit": unit})
        staging.write_bytes("summary", b"all")
        return Result({"units": sorted(str(data["unit"]) for data in staging.finished.values())})

    return store.make(spec_of(seed), produce, provenance={"device": "cpu"})


class StoreMachine(RuleBasedStateMachine):
    """Rules act on the store and on the model: the seeds made, and the tags set."""

    @initialize()
    def create(self) -> None:
        self.free_fsync = mock.patch.object(os, "fsync", int)
        self.free_fsync.start()
        self.folder = Path(tempfile.mkdtemp())
        self.store = ArtifactStore(self.folder / "store")
        self.made: dict[int, str] = {}
        self.tags: dict[str, int] = {}

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.free_fsync.stop()
            shutil.rmtree(self.folder)

    @rule(seed=SEEDS)
    def make(self, seed: int) -> None:
        made = make(self.store, seed)
        assert (made.status == "cached") == (seed in self.made)
        self.made.setdefault(seed, made.artifact.manifest_sha256)
        assert made.artifact.manifest_sha256 == self.made[seed]

    @rule(seed=SEEDS, steps=st.integers(0, 80))
    def fail_while_making(self, seed: int, steps: int) -> None:
        left = [steps]

        def hook(operation: str, path: Path) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

        atomic.set_fault_hook(hook)
        try:
            made = make(self.store, seed)
        except StorageFull:
            pass
        else:
            self.made.setdefault(seed, made.artifact.manifest_sha256)
        finally:
            atomic.set_fault_hook(None)
        found = self.store.find(spec_of(seed))
        if found is not None:  # it may have failed while cleaning up after the commit
            self.made.setdefault(seed, found.manifest_sha256)

    @rule(data=st.data())
    def damage_unfinished_work(self, data: st.DataObject) -> None:
        files = sorted(path for path in (self.store.root / ".staging").rglob("*") if path.is_file())
        if files:
            path = data.draw(st.sampled_from(files))
            contents = path.read_bytes()
            path.write_bytes(contents[: data.draw(st.integers(0, len(contents)))])

    @rule(seed=SEEDS, name=st.sampled_from(["best", "first"]))
    def tag(self, seed: int, name: str) -> None:
        if seed in self.made:
            self.store.tag(name, self.store.open(spec_of(seed).id))
            self.tags[name] = seed

    @precondition(lambda self: bool(self.made))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        seed = data.draw(st.sampled_from(sorted(self.made)))
        shutil.rmtree(self.store.open(spec_of(seed).id).folder)
        del self.made[seed]

    @rule()
    def reopen(self) -> None:
        self.store = ArtifactStore(self.store.root)

    @invariant()
    def the_store_holds_what_the_model_says_and_all_of_it_is_whole(self) -> None:
        assert set(self.store.ids()) == {spec_of(seed).id for seed in self.made}
        for seed in self.made:
            artifact = self.store.resolve(spec_of(seed).id)
            assert self.store.verify(artifact) == []
            assert {name: artifact.read_bytes(name) for name in artifact.manifest.files} == contents_of(seed)
        assert self.store.tags() == {name: spec_of(seed).id for name, seed in self.tags.items()}
        for name, seed in self.tags.items():
            if seed in self.made:
                assert self.store.resolve(name).id == spec_of(seed).id
            else:
                with pytest.raises(ArtifactNotFound):
                    self.store.resolve(name)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
