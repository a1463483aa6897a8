"""Random commands of the whole command line, with random faults, against a model of what must exist.

Everything that the commands below can make is made once without faults, in a store of its own: these are the only
artifacts, and the only bytes, that may ever appear. Then, one after the other, commands run in processes of their own,
and are killed, stopped, given a disk that is full, or meet files that were flipped, cut, emptied or removed. After
each, every artifact is hashed again here, with nothing of the product: what is there must be what was there before, or
new and whole; what is damaged must be what was damaged on purpose, and ``verify`` must say just that.

Processes are forked from this one, which has imported all they need and computed nothing: a command then takes tenths
of a second, not the seconds that importing torch takes. Run it by itself for as long as wanted::

    python -m tests.faults.soak PRESET.toml FOLDER --seconds 3600 --seed 1
"""

import argparse
import hashlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pipeline.hub
import pipeline.summary
import pipeline.verifying  # noqa: F401
from pipeline import cli
from storage.artifact import open_folder
from storage.errors import CorruptArtifact
from storage.verification import verify

SLOWEST_SECONDS = 120.0
QUESTIONS = [(windows, seed) for windows in (2, 3) for seed in (0, 1)]
SMALL = ('analyze.analyses=["density", "null_space"]', "train.autoencoder.steps=20")
STAGES = ("tokenize", "harvest", "train", "analyze")
DENSITIES = "densities.safetensors"
FULL = re.compile(r"found [\d,]+ bytes free;")
"""What a StorageFull says: a limit that a command never came to is no fault."""
Files = dict[str, str]


class Broken(AssertionError):  # noqa: N818 - says what is wrong
    """Something that must hold does not."""


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    stderr: str
    faulty: bool


def forked(arguments: Sequence[str], *, kill: tuple[float, int] | None = None, fsize: int | None = None) -> Outcome:
    """Runs a command in a process group of its own; ``kill`` is (seconds, signal), ``fsize`` the largest file."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(read)
        if fsize is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
        os._exit(_command(arguments))
    os.close(write)
    output, began, sent = b"", time.monotonic(), False
    while True:
        at = SLOWEST_SECONDS if kill is None or sent else kill[0]
        ready, _, _ = select.select([read], [], [], max(0.0, began + at - time.monotonic()))
        if ready:
            piece = os.read(read, 1 << 16)
            output += piece
            if not piece:
                break
        elif kill is None or sent:
            os.killpg(pid, signal.SIGKILL)
            raise Broken(f"still running after {SLOWEST_SECONDS} s: {arguments}")
        else:
            os.kill(pid, kill[1])
            sent = True
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Outcome(code, output.decode(errors="replace"), sent or fsize is not None)


def _command(arguments: Sequence[str]) -> int:
    sys.argv = ["sparsemill", *arguments]
    code: object = 0
    try:
        cli.main()
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001 - what a user would see
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def hashed(folder: Path) -> Files:
    """sha256 of every file of an artifact but ``run.json``, by name."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / "run.json"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def artifacts(root: Path) -> dict[str, Path]:
    """Folders of committed artifacts by id."""
    return {path.parent.name: path.parent for path in root.glob("[a-z]*/*/manifest.json")}


@dataclass
class Soak:
    """The store under test, and the model of it.

    Attributes:
        preset: of all commands.
        folder: for stores and the remote.
        rng: chooses.
        golden: files of everything that may ever be, by id.
        parents: ids that each was made from.
        damaged: names of files that are not as committed, by id of what is there.
        tags: ids by tag.
        exported: files of the export of one autoencoder of each harvest, by its id.
        imported: what importing that makes, by its id.
        counts: what was done; of faults, those that a command ended of.
    """

    preset: Path
    folder: Path
    rng: random.Random
    golden: dict[str, Files] = field(default_factory=dict[str, Files])
    parents: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    damaged: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    tags: dict[str, str] = field(default_factory=dict[str, str])
    exported: dict[str, Files] = field(default_factory=dict[str, Files])
    imported: dict[str, str] = field(default_factory=dict[str, str])
    counts: Counter[str] = field(default_factory=Counter[str])
    _must_exist: set[str] = field(default_factory=set[str])

    @property
    def root(self) -> Path:
        """Of the store under test."""
        return self.folder / "store"

    @property
    def remote(self) -> Path:
        """A folder that things are pushed to."""
        return self.folder / "remote"

    def prepare(self) -> None:
        """Makes everything once, undisturbed."""
        self.remote.mkdir(parents=True)
        reference = self.folder / "reference"
        for question in QUESTIONS:
            outcome = forked(self.making("analyze", *question, home=reference))
            if outcome.code:
                raise Broken(f"a command failed without any fault: {outcome.stderr}")
        of_activations: dict[str, Path] = {}
        for folder in sorted(reference.glob("train/*")):
            parents = json.loads((folder / "manifest.json").read_bytes())["spec"]["parents"]
            self.parents[folder.name] = {parent["id"] for parent in parents.values()}
            of_activations.setdefault(parents["activations"]["id"], folder)
        for folder in of_activations.values():
            place, before = self.folder / f"{folder.name}-exported", set(artifacts(reference))
            for arguments in self.passing_on(folder.name, place, home=reference):
                outcome = forked(arguments)
                if outcome.code:
                    raise Broken(f"a command failed without any fault: {outcome.stderr}")
            self.exported[folder.name] = hashed(place)
            (self.imported[folder.name],) = set(artifacts(reference)) - before
        for artifact_id, folder in artifacts(reference).items():
            self.golden[artifact_id] = hashed(folder)
            spec = json.loads((folder / "manifest.json").read_bytes())["spec"]
            self.parents[artifact_id] = {parent["id"] for parent in spec["parents"].values()}

    def making(self, stage: str, windows: int, seed: int, *, home: Path | None = None) -> list[str]:
        """The command that makes one of the questions."""
        settings = [f"harvest.n_windows={windows}", f"train.reader_seed={seed}", *SMALL]
        words = [stage, "--preset", str(self.preset), "--threads", "1", "--home", str(home or self.root)]
        return words + [word for setting in settings for word in ("--set", setting)]

    def passing_on(self, sae: str, folder: Path, *, home: Path | None = None) -> list[list[str]]:
        """The commands that write an autoencoder to a folder and take it in from there, beside its activations."""
        (activations,) = self.parents[sae]
        where = ["--home", str(home or self.root)]
        return [
            ["export", sae, str(folder), "--format", "safetensors", *where],
            ["import", str(folder), "--activations", activations, *where],
        ]

    def actions(self) -> dict[Callable[[], None], int]:
        """All that may be done, and how often, by comparison."""
        return {
            self.make: 10, self.damage: 3, self.damage_unfinished: 2, self.check_one: 2, self.repair: 3,
            self.heal: 3, self.prune: 2, self.tag: 2, self.push: 2, self.pull: 2, self.look: 1, self.export_import: 2,
        }  # fmt: skip

    def step(self, action: Callable[[], None] | None = None) -> None:
        """One command, or one damage, and a look at everything; which one, chance says where it is not given."""
        choices = self.actions()
        done = action or self.rng.choices(list(choices), list(choices.values()))[0]
        self.counts[done.__name__] += 1
        done()

    def run(self, *arguments: str, faults: bool = True, may_fail: bool = False) -> Outcome:
        """A command, perhaps with a fault; it must succeed where there is none and nothing is damaged."""
        kind = self.rng.choice(["none", "none", "kill", "kill", "term", "int", "full"]) if faults else "none"
        number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}.get(kind)
        kill = None if number is None else (self.rng.expovariate(1.5), int(number))
        outcome = forked(
            arguments, kill=kill, fsize=self.rng.choice([0, 500, 5_000, 50_000]) if kind == "full" else None
        )
        self.counts[f"fault {kind}"] += bool(
            FULL.search(outcome.stderr) if kind == "full" else number and outcome.code in {-number, 128 + number}
        )
        self.counts["commands"] += 1
        self.counts[f"exit {outcome.code}"] += 1
        expected = {0} if not (may_fail or any(self.damaged.values())) else {0, 1}
        if outcome.faulty:
            expected |= {1, 130, 143, -int(number or 0)}
        if outcome.code not in expected or "Traceback" in outcome.stderr:
            raise Broken(f"{kind}: exit {outcome.code}, not one of {expected}: {arguments}\n{outcome.stderr}")
        return outcome

    def make(self) -> None:
        """Any stage of any question, and what it needs."""
        self.run(*self.making(self.rng.choice(STAGES), *self.rng.choice(QUESTIONS)))
        self.look_at_all()

    def damage(self) -> None:
        """Flips, cuts, empties or removes a file of something committed, under all its names."""
        here = artifacts(self.root)
        if not here:
            return
        folder = here[self.rng.choice(sorted(here))]
        name = self.rng.choice(sorted(hashed(folder)))
        kind = self.rng.choice(["flip", "flip", "cut", "empty", "remove"])
        self._damage(folder / name, kind)
        if kind == "remove" and name == "manifest.json":  # no artifact any more
            self.damaged.pop(folder.name, None)
            self._must_exist.discard(folder.name)
        self.look_at_all()

    def damage_unfinished(self) -> None:
        """The same to work that a killed process left."""
        left = [path for path in (self.root / ".staging").rglob("*") if path.is_file()]
        if left:
            self._damage(self.rng.choice(sorted(left)), self.rng.choice(["flip", "cut", "empty", "remove"]))
            self.counts["damage unfinished work"] += 1
            self.look_at_all()

    def _damage(self, path: Path, kind: str) -> None:
        """Damages a file, under all its names: a window of a longer harvest is a link to the shorter one's."""
        self.counts[f"damage {kind}"] += 1
        data, inode = bytearray(path.read_bytes()), path.stat().st_ino
        for artifact_id, folder in artifacts(self.root).items():
            for other in folder.rglob("*"):
                if other == path or (other.stat().st_ino == inode and kind != "remove"):
                    self.damaged.setdefault(artifact_id, set()).add(other.relative_to(folder).as_posix())
        if kind == "remove":
            path.unlink()
        elif kind == "flip" and data:
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            with path.open("r+b") as file:  # in place, as a disk would
                file.write(data)
        else:
            os.truncate(path, self.rng.randrange(len(data)) if kind == "cut" and data else 0)
        for artifact_id in artifacts(self.root).keys() & self.damaged.keys():  # a bit may be flipped back
            self.damaged[artifact_id] &= self.wrong(artifact_id)

    def check_one(self) -> None:
        """``verify``: exit 1 just where something is damaged."""
        here = sorted(artifacts(self.root))
        if here:
            artifact_id = self.rng.choice(here)
            outcome = self.run("verify", artifact_id, "--home", str(self.root), may_fail=True, faults=False)
            if outcome.code != bool(self.damaged.get(artifact_id)):
                raise Broken(f"verify {artifact_id}: exit {outcome.code}\n{outcome.stderr}")

    def repair(self) -> None:
        """``verify --repair`` of something damaged: may be refused, never makes it worse, and is whole on exit 0."""
        damaged = sorted(name for name, files in self.damaged.items() if files)
        if damaged:
            self._repair(self.rng.choice(damaged), faults=True)

    def _repair(self, artifact_id: str, *, faults: bool) -> bool:
        rewrite = ["--rewrite"] if self.rng.random() < 0.3 else []  # changes nothing where the same bytes come out
        arguments = ["verify", artifact_id, "--repair", "--home", str(self.root), "--remote", str(self.remote)]
        outcome = self.run(*arguments, *rewrite, faults=faults, may_fail=True)
        now = self.wrong(artifact_id)
        if outcome.code == 0 and now:
            raise Broken(f"{artifact_id} repaired, but damaged: {now}")
        if not now <= self.damaged[artifact_id]:
            raise Broken(f"a repair of {artifact_id} damaged {now - self.damaged[artifact_id]}")
        self.damaged[artifact_id] = now
        self.counts["repaired"] += not now
        self.look_at_all()
        return not now

    def heal(self) -> None:
        """Mends all that can be mended, which a harvest of whole tokens must be; removes the rest by hand."""
        for artifact_id in sorted(self.damaged, key=lambda name: (not name.startswith("tokenize"), name)):
            if not self.damaged[artifact_id]:
                continue
            parents_whole = all(
                parent in artifacts(self.root) and not self.damaged.get(parent) for parent in self.parents[artifact_id]
            )
            sure = (
                artifact_id.startswith("harvest") and parents_whole and "manifest.json" not in self.damaged[artifact_id]
            )
            if not self._repair(artifact_id, faults=False):
                if sure:
                    raise Broken(f"{artifact_id} was not mended")
                shutil.rmtree(artifacts(self.root)[artifact_id])
                self.damaged.pop(artifact_id)
                self._must_exist.discard(artifact_id)
        self.look_at_all()

    def prune(self) -> None:
        """``artifacts prune --yes``: what has a tag, and what that was made from, stays."""
        before = set(artifacts(self.root))
        self.run("artifacts", "prune", "--older-than", "0", "--yes", "--home", str(self.root))
        gone = before - set(artifacts(self.root))
        kept = self._ancestors(self.tags.values(), before)
        if gone & kept:
            raise Broken(f"pruned although needed: {gone & kept}")
        for artifact_id in gone:
            self.damaged.pop(artifact_id, None)
        self.counts["pruned"] += len(gone)
        self._must_exist -= gone
        self.look_at_all()

    def _ancestors(self, ids: Iterable[str], here: set[str]) -> set[str]:
        """What some were made from, as far as what is here says so."""
        found, ahead = set[str](), list(ids)
        while ahead:
            name = ahead.pop()
            if name in here:
                found.add(name)
                ahead += self.parents[name]
        return found

    def tag(self) -> None:
        """Moves one of two tags."""
        here = sorted(name for name in artifacts(self.root) if not self.damaged.get(name))
        if here:
            name, artifact_id = self.rng.choice(["best", "first"]), self.rng.choice(here)
            outcome = self.run("artifacts", "tag", name, artifact_id, "--home", str(self.root))
            path, before = self.root / ".tags" / name, self.tags.get(name)
            now = json.loads(path.read_bytes())["id"] if path.is_file() else None
            if now not in {before, artifact_id} or (outcome.code == 0 and now != artifact_id):
                raise Broken(f"tag {name} is {now}, was {before}, to be {artifact_id}")
            if now is not None:
                self.tags[name] = now

    def push(self) -> None:
        """``push``: the remote has it whole or not at all."""
        here = sorted(artifacts(self.root))
        if here:
            self.run("push", self.rng.choice(here), str(self.remote), "--home", str(self.root))
            self.look_at_remote()

    def pull(self) -> None:
        """``pull`` of what the remote has."""
        there = sorted(path.parent.name for path in self.remote.glob("*/*/pointer.json"))
        if there:
            self.run("pull", str(self.remote), self.rng.choice(there), "--home", str(self.root))
            self.look_at_all()

    def export_import(self) -> None:
        """``export`` to a new folder and ``import`` from there: files, and what they make, are as at first."""
        here = set(artifacts(self.root))

        def is_whole(sae: str) -> bool:  # what is written tells of all that it was made from
            return all(self.parents[name] <= here for name in self._ancestors([sae], here))

        able = [sae for sae in sorted(self.exported) if sae in here and is_whole(sae)]
        if able:
            sae, place = self.rng.choice(able), self.folder / "exported"
            shutil.rmtree(place, ignore_errors=True)
            export, import_ = self.passing_on(sae, place)
            if self.run(*export).code == 0:
                found, expected = hashed(place), self.exported[sae]  # densities only where they were analysed
                if not found.items() <= expected.items() or not expected.keys() - found.keys() <= {DENSITIES}:
                    raise Broken(f"{sae} was exported as {found}, not {expected}")
            whole = place.is_dir() and hashed(place).keys() >= self.exported[sae].keys() - {DENSITIES}
            if self.run(*import_, may_fail=not whole).code == 0 and self.imported[sae] not in artifacts(self.root):
                raise Broken(f"an import of {sae} did not make {self.imported[sae]}")
            self.look_at_all()

    def look(self) -> None:
        """Commands that only read."""
        for words in (["artifacts", "ls"], ["artifacts", "du"], ["explain", "--preset", str(self.preset)]):
            self.run(*words, "--home", str(self.root), faults=False)
        for artifact_id in self.rng.sample(sorted(artifacts(self.root)), min(1, len(artifacts(self.root)))):
            for word in ("show", "lineage"):
                outcome = self.run("artifacts", word, artifact_id, "--home", str(self.root), faults=False)
                if outcome.code == 0 and artifact_id not in outcome.stderr:
                    raise Broken(f"artifacts {word} {artifact_id} says {outcome.stderr}")

    def wrong(self, artifact_id: str) -> set[str]:
        """Names of files that are not the golden ones."""
        here, golden = hashed(artifacts(self.root)[artifact_id]), self.golden[artifact_id]
        return {name for name in here.keys() | golden.keys() if here.get(name) != golden.get(name)}

    def look_at_all(self) -> None:
        """Compares everything committed with the model."""
        here = artifacts(self.root)
        self.counts["artifacts hashed"] += len(here)
        if strangers := here.keys() - self.golden.keys():
            raise Broken(f"artifacts that nothing can have made: {strangers}")
        if lost := self._must_exist - here.keys():
            raise Broken(f"lost: {lost}")
        self._must_exist = set(here)
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

    def look_at_remote(self) -> None:
        """Whatever has a pointer is there as it was first made."""
        for pointer in self.remote.glob("*/*/pointer.json"):
            digest = json.loads(pointer.read_bytes())["manifest_sha256"]
            found = hashed(pointer.parent / digest)
            found = {name: one for name, one in found.items() if not name.endswith(".tmp")}  # a killed push's
            if found != self.golden[pointer.parent.name]:
                raise Broken(f"the remote's {pointer.parent.name} is not what was made")
            self.counts["remote artifacts hashed"] += 1


def main() -> None:
    """Soaks, and prints what was done."""
    parser = argparse.ArgumentParser(description="random commands with random faults, against a model")
    parser.add_argument("preset", type=Path)
    parser.add_argument("folder", type=Path, help="empty; keeps what went wrong")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    soak = Soak(options.preset, options.folder, random.Random(options.seed))
    soak.prepare()
    began = time.monotonic()
    try:
        for action in soak.actions():
            soak.step(action)
        while time.monotonic() - began < options.seconds:
            soak.step()
        soak.heal()
        for question in QUESTIONS:  # all can be made in the end
            soak.run(*soak.making("analyze", *question), faults=False)
        for sae in soak.exported:
            for arguments in soak.passing_on(sae, options.folder / f"{sae}-in-the-end"):
                soak.run(*arguments, faults=False)
        soak.look_at_all()
        if artifacts(soak.root).keys() != soak.golden.keys():
            raise Broken(f"missing in the end: {soak.golden.keys() - artifacts(soak.root).keys()}")
    finally:
        print(json.dumps(dict(sorted(soak.counts.items()))))


if __name__ == "__main__":
    main()
