"""The store under test and its remote, what must be in them, and the looks that compare the two."""

import json
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from storage.artifact import open_folder
from storage.errors import CorruptArtifact
from storage.verification import verify
from tests.faults.soak.hashes import artifacts, different, hashed
from tests.faults.soak.processes import NONE, Broken, Command, Fault, Outcome
from tests.faults.soak.questions import Golden

_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
_FULL = re.compile(r"found [\d,]+ bytes free;")
"""What a StorageFull says: a limit that a command never came to is no fault."""


@dataclass
class Soak:
    """The store under test, and the model of it.

    Attributes:
        golden: all that may ever be.
        folder: for the store and the remote.
        rng: chooses.
        damaged: names of files that are not as committed, by id of what is there.
        remote_damaged: the same of the remote.
        tags: ids by tag.
        counts: what was done; of faults, those that a command ended of.
    """

    golden: Golden
    folder: Path
    rng: random.Random
    damaged: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    remote_damaged: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    tags: dict[str, str] = field(default_factory=dict[str, str])
    counts: Counter[str] = field(default_factory=Counter[str])
    must_exist: set[str] = field(default_factory=set[str])
    fetched_damaged: set[Path] = field(default_factory=set[Path])

    def __post_init__(self) -> None:
        self.remote.mkdir(parents=True)

    @property
    def root(self) -> Path:
        """Of the store under test."""
        return self.folder / "store"

    @property
    def remote(self) -> Path:
        """A folder that things are pushed to."""
        return self.folder / "remote"

    @property
    def here(self) -> dict[str, Path]:
        """What is committed, by id."""
        return artifacts(self.root)

    @property
    def there(self) -> dict[str, Path]:
        """Folders of what the remote shows, by id."""
        pointers = self.remote.glob("*/*/pointer.json")
        return {one.parent.name: one.parent / json.loads(one.read_bytes())["manifest_sha256"] for one in pointers}

    @property
    def all_whole(self) -> bool:
        """Whether nothing is damaged, here, in the remote, or of what was fetched from there."""
        fetched = any(path.exists() for path in self.fetched_damaged)
        return not (any(self.damaged.values()) or any(self.remote_damaged.values()) or fetched)

    def has_all_of(self, ids: Sequence[str], *, remote: bool = False) -> bool:
        """Whether artifacts, and all that they were made from, are here, or in the remote too."""
        known = self.here.keys() | (self.there.keys() if remote else set())
        return self.golden.ancestors(ids) <= known

    def fault(self) -> Fault:
        """One of those that may happen to a command, or none."""
        kind = self.rng.choice(["none", "none", "kill", "kill", "term", "int", "full"])
        if kind == "full":
            return Fault(kind, fsize=self.rng.choice([0, 500, 5_000, 50_000]))
        return Fault(kind, self.rng.expovariate(1.5), int(_SIGNALS[kind])) if kind in _SIGNALS else NONE

    def run(self, *words: str, faults: bool = True, may_fail: bool = False, remote: bool = False) -> Outcome:
        """A command on the store, perhaps with a fault; it must succeed where there is none and nothing is damaged.

        Args:
            words: of it.
            faults: whether there may be one.
            may_fail: whether it may fail without one.
            remote: whether it has the remote as ``SPARSEMILL_REMOTE``.
        """
        return self.finish(self.start(*words, faults=faults, remote=remote), may_fail=may_fail)

    def start(self, *words: str, faults: bool = True, remote: bool = False) -> Command:
        """The beginning of such a command."""
        return Command(
            [*words, "--home", str(self.root)], self.fault() if faults else NONE, str(self.remote) if remote else None
        )

    def finish(self, command: Command, *, may_fail: bool = False) -> Outcome:
        """The end of it."""
        outcome, fault = command.finish(), command.fault
        number = fault.number or 0
        ended = _FULL.search(outcome.stderr) if fault.kind == "full" else outcome.code in {-number, 128 + number}
        self.counts[f"fault {fault.kind}"] += bool(fault is not NONE and ended)
        self.counts["commands"] += 1
        self.counts[f"ran {command.name}"] += 1
        self.counts[f"exit {outcome.code}"] += 1
        sure = self.all_whole and not may_fail
        self.counts["commands that must not fail"] += sure and not outcome.faulty
        expected = {0} if sure else {0, 1}
        if outcome.faulty:
            expected |= {1, 130, 143, -number}
        if outcome.code not in expected or "Traceback" in outcome.stderr:
            raise Broken(
                f"{fault}: exit {outcome.code}, not one of {expected}: {command.arguments}, with {command.remote}\n"
                f"{outcome.stderr}"
            )
        return outcome

    def damage(self, path: Path) -> str:
        """Flips, cuts, empties or removes a file, in place, as a disk would; says which."""
        kind = self.rng.choice(["flip", "flip", "cut", "empty", "remove"])
        self.counts[f"damage {kind}"] += 1
        data = bytearray(path.read_bytes())
        if kind == "remove":
            path.unlink()
        elif kind == "flip" and data:
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            with path.open("r+b") as file:
                file.write(data)
        else:
            os.truncate(path, self.rng.randrange(len(data)) if kind == "cut" and data else 0)
        return kind

    def forget(self, artifact_id: str) -> None:
        """Something is no longer here, and need not be."""
        self.damaged.pop(artifact_id, None)
        self.must_exist.discard(artifact_id)

    def wrong(self, artifact_id: str) -> set[str]:
        """Names of files that are not the golden ones."""
        return different(hashed(self.here[artifact_id]), self.golden.files[artifact_id])

    def wrong_there(self, artifact_id: str) -> set[str]:
        """The same in the remote, where a killed push leaves half a file under another name."""
        found = hashed(self.there[artifact_id])
        whole = {name: one for name, one in found.items() if not name.endswith(".tmp")}
        return different(whole, self.golden.files[artifact_id])

    def look(self) -> None:
        """Compares everything committed, here and in the remote, with the model."""
        here = self.here
        self.counts["artifacts hashed"] += len(here)
        if strangers := here.keys() - self.golden.files.keys():
            raise Broken(f"artifacts that nothing can have made: {strangers}")
        if lost := self.must_exist - here.keys():
            raise Broken(f"lost: {lost}")
        self.must_exist = set(here)
        for artifact_id, folder in here.items():
            wrong = self.wrong(artifact_id)
            if wrong != self.damaged.get(artifact_id, set()):
                raise Broken(f"{artifact_id}: {wrong} differ, the model says {self.damaged.get(artifact_id)}")
            try:
                found = {problem.name for problem in verify(open_folder(folder), threads=1)}
            except CorruptArtifact:
                found = {"manifest.json"}
            if found != wrong and not ("manifest.json" in found and "manifest.json" in wrong):
                raise Broken(f"{artifact_id}: {wrong} differ, verify says {found}")
        self.look_at_remote()

    def look_at_remote(self) -> None:
        """Whatever has a pointer is there as it was first made, or as it was damaged."""
        there = self.there
        self.counts["remote artifacts hashed"] += len(there)
        for artifact_id in there:
            wrong, known = self.wrong_there(artifact_id), self.remote_damaged.get(artifact_id, set())
            if wrong != known:
                raise Broken(f"the remote's {artifact_id}: {wrong} differ, the model says {known}")
        if lost := self.remote_damaged.keys() - there.keys():
            raise Broken(f"the remote lost {lost}")

    def name(self, artifact_id: str) -> str:
        """One of the names that an artifact answers to: its id, a unique beginning, a tag."""
        tags = [tag for tag, named in self.tags.items() if named == artifact_id]
        beginning = artifact_id[:-4]
        unique = sum(one.startswith(beginning) for one in self.here) == 1
        return self.rng.choice([artifact_id, *tags, *[beginning] * unique])
