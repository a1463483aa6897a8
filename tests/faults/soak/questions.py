"""All that may be made, each made once, undisturbed, in a store of its own.

Two presets: the one given, in four variations, and the shipped demo, made tiny.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import load_preset
from tests.faults.soak.hashes import Files, artifacts, hashed
from tests.faults.soak.processes import Broken, Command

STAGES = ("tokenize", "harvest", "train", "analyze", "replicate")
FORMATS = (
    ("--format", "safetensors"), ("--format", "saelens"), ("--format", "dictionary_learning"), ("--bundle",),
)  # fmt: skip
_SMALL = ('analyze.analyses=["density", "null_space"]', "train.autoencoder.steps=20")
_VARIATIONS = [(windows, seed) for windows in (2, 3) for seed in (0, 1)]
_TINY_DEMO = (
    "tokenize.train_tokens=4096", "tokenize.held_out_tokens=1024", "tokenize.prompt_tokens=32",
    "harvest.window_prompts=64", "harvest.chunk_rows=16", "harvest.encoding=uint8", "train.pool_rows=512",
    "train.evaluate_prompts=4", "train.autoencoder.d_sae=64", "train.autoencoder.steps=20",
    "train.autoencoder.batch_rows=256", "train.autoencoder.target_l0=8", 'analyze.analyses=["density", "rare_cluster"]',
)  # fmt: skip
_OTHER_SITE = "blocks.0.hook_mlp_out"
_ID = re.compile(r"[a-z]+-[0-9a-f]{12}")


@dataclass(frozen=True)
class Question:
    """A command that makes something.

    Attributes:
        words: of it, but for where.
        needs: ids that it names: with all they were made from here, it must succeed.
    """

    words: tuple[str, ...]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Passing:
    """An autoencoder on its way out and in again.

    Attributes:
        reference: what is exported: an autoencoder, or a report on it.
        way: options of the export.
        beside: options of the import.
        needs: ids that the import names.
        files: that are exported, where densities are there.
        makes: what importing them makes.
    """

    reference: str
    way: tuple[str, ...]
    beside: tuple[str, ...]
    needs: tuple[str, ...]
    files: Files
    makes: str

    def export(self, folder: Path) -> list[str]:
        """The command but for where."""
        return ["export", self.reference, str(folder), *self.way]

    def take_in(self, folder: Path) -> list[str]:
        """The other command but for where."""
        return ["import", str(folder), *self.beside]


@dataclass
class Golden:
    """What there may be.

    Attributes:
        preset: the one given.
        files: of every artifact, by id.
        parents: ids that each was made from.
        answers: the id that answers each question.
        chains: preset and settings of each run.
        passing: autoencoders on their way out and in.
        samples: of harvests, by the harvest's id.
        counts: commands that made all this.
    """

    preset: Path
    files: dict[str, Files] = field(default_factory=dict[str, Files])
    parents: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    answers: dict[Question, str] = field(default_factory=dict["Question", str])
    chains: list[tuple[str, tuple[str, ...]]] = field(default_factory=list[tuple[str, tuple[str, ...]]])
    passing: list[Passing] = field(default_factory=list["Passing"])
    samples: dict[str, str] = field(default_factory=dict[str, str])
    counts: Counter[str] = field(default_factory=Counter[str])

    def ancestors(self, ids: Iterable[str], here: Iterable[str] | None = None) -> set[str]:
        """Some, and all that they were made from; as far as what is here says so."""
        known = self.files.keys() if here is None else set(here)
        found, ahead = set[str](), list(ids)
        while ahead:
            name = ahead.pop()
            if name in known and name not in found:
                found.add(name)
                ahead += self.parents[name]
        return found


def prepare(preset: Path, folder: Path) -> Golden:
    """Makes everything.

    Args:
        preset: of the small runs.
        folder: for the store, its remote and exports; removed again.
    """
    maker = _Maker(Golden(preset), folder / "store", folder)
    folder.mkdir(parents=True)
    maker.make()
    shutil.rmtree(folder)
    return maker.golden


@dataclass
class _Maker:
    golden: Golden
    home: Path
    folder: Path

    def make(self) -> None:
        golden = self.golden
        given = str(golden.preset)
        golden.chains += [
            (given, _sets(f"harvest.n_windows={windows}", f"train.reader_seed={seed}", *_SMALL))
            for windows, seed in _VARIATIONS
        ]
        golden.chains += [("demo", (*_sets(*_TINY_DEMO), "--on-bad-document", "skip"))]
        for preset, settings in golden.chains:
            for stage in STAGES:
                self.answer(stage, *_run(preset, settings))
        ids = [[golden.answers[Question((stage, *_run(*chain)))] for stage in STAGES] for chain in golden.chains]
        self.variations(ids)
        self.samples([run[1] for run in ids])
        self.pass_on([ids[0], ids[2]])

    def variations(self, ids: Sequence[Sequence[str]]) -> None:
        """What takes more than the stages of one run: several hooks, several autoencoders."""
        first = _run(*self.golden.chains[0])
        (_, activations, sae, _, _), other = ids[0], ids[1][2]
        self.answer("harvest", *first, *_sets(f'harvest.also_hook_names=["{_OTHER_SITE}"]'))
        self.answer("train", "--activations", activations, *first, needs=(activations,))
        self.answer("analyze", sae, "--only", "cross_seed", "--with", other, *first, needs=(sae, other))
        self.answer("report", "compare", sae, other, *first, needs=(sae, other))
        self.answer("study", "cross-seed", *first)
        self.answer("study", "encoder-sparsity", "--l1", "1e-4", *first)
        self.answer("study", "orthogonal-rerun", "--sae", sae, "--features", "0", "1", *first, needs=(sae,))
        self.answer("study", "site-comparison", "--sites", _OTHER_SITE, "--l1-factors", "1.0", *first)

    def samples(self, harvests: Iterable[str]) -> None:
        """Half of the windows of each harvest, and an autoencoder of one sample."""
        remote = self.folder / "remote"
        remote.mkdir()
        for harvest in dict.fromkeys(harvests):
            self.run("push", harvest, str(remote), "--with-parents")
            self.golden.samples[harvest] = told(self.run("pull", str(remote), harvest, "--windows", "50%"))
        sample = next(iter(self.golden.samples.values()))
        self.answer("train", "--activations", sample, *_run(*self.golden.chains[0]), needs=(sample,))

    def pass_on(self, runs: Iterable[Sequence[str]]) -> None:
        """Exports of two autoencoders in every format, imports of these, and an analysis of one of them."""
        model = load_preset(str(self.golden.preset)).harvest.language_model
        for _, activations, sae, report, _ in runs:
            for way in FORMATS:
                bundle = "--bundle" in way
                needs = () if bundle else (activations,)
                beside = ("--model", model) if bundle else ("--activations", activations)
                place = self.folder / f"{sae}{way[-1]}"
                passing = Passing(report if bundle else sae, way, beside, needs, {}, "")
                self.run(*passing.export(place))
                made = told(self.run(*passing.take_in(place)))
                self.golden.passing.append(Passing(passing.reference, way, beside, needs, hashed(place), made))
        imported = self.golden.passing[0].makes
        self.answer("analyze", imported, *_run(*self.golden.chains[0]), needs=(imported,))

    def answer(self, *words: str, needs: tuple[str, ...] = ()) -> None:
        """Runs a command that makes something, and notes what."""
        self.golden.answers[Question(words, needs)] = told(self.run(*words))

    def run(self, *words: str) -> str:
        """Runs a command, and notes what is there after it."""
        command = Command([*words, "--home", str(self.home)])
        outcome = command.finish()
        self.golden.counts[f"prepared {command.name}"] += 1
        if outcome.code:
            raise Broken(f"a command failed without any fault: {words}: {outcome.stderr}")
        for artifact_id, folder in artifacts(self.home).items():
            if artifact_id not in self.golden.files:
                self.golden.files[artifact_id] = hashed(folder)
                spec = json.loads((folder / "manifest.json").read_bytes())["spec"]
                self.golden.parents[artifact_id] = {parent["id"] for parent in spec["parents"].values()}
        return outcome.stdout


def told(stdout: str) -> str:
    """The last id that a command prints: that of what it made, or found."""
    found = _ID.findall(stdout)
    return found[-1] if found else ""


def _sets(*settings: str) -> tuple[str, ...]:
    return tuple(word for setting in settings for word in ("--set", setting))


def _run(preset: str, settings: Sequence[str]) -> tuple[str, ...]:
    return ("--preset", preset, "--threads", "1", *settings)
