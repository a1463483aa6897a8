"""What an id depends on: every identity field, the code's output version, contents and parents; and nothing else."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from pipeline import analyzing, harvest, reporting, surveying, tokens, training
from pipeline.analysis import ANALYSES
from pipeline.config import Runtime, load_preset
from pipeline.corpus import sources
from storage.artifact import Artifact
from storage.manifest import Parent, Spec
from tests.faults.questions import Questions

ROOT = Path(__file__).parents[2]
IDS = Path(__file__).parents[1] / "data" / "formats" / "ids.json"
STAGES = ("tokenize", "harvest", "train", "survey", *(f"analyze {name}" for name in ANALYSES))
BY_CONTENT = {"language_model", "sources.0.files"}
"""Names and paths, of which the contents count: tested one by one below."""
NOT_IDENTITY = {
    ("harvest", "also_hook_names"): "each site is an artifact of its own, the same whichever others came along",
    ("tokenize", "sources.0.suffixes"): "for kind 'folder': tested below",
    ("tokenize", "sources.0.data_set"): "for kind 'hub': tested below",
    ("tokenize", "sources.0.config"): "for kind 'hub': tested below",
    ("tokenize", "sources.0.split"): "for kind 'hub': tested below",
    ("tokenize", "sources.0.revision"): "for kind 'hub': the commit counts, not its name; tested below",
    ("tokenize", "sources.0.tokens_field"): "for kind 'tokenized': tested below",
}


@pytest.fixture(scope="module")
def questions(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Questions:
    return Questions(load_preset(str(tiny_preset)), Runtime(root=tmp_path_factory.mktemp("identity") / "store"))


def leaves(model: BaseModel, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every field at every depth that holds no model: its place, annotation and value."""
    for name, field in type(model).model_fields.items():
        value, here = getattr(model, name), f"{place}{name}"
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{here}.")
        elif isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value):
            for number, item in enumerate(value):
                yield from leaves(item, f"{here}.{number}.")
        else:
            yield here, field.annotation, value


def others(annotation: Any, value: Any) -> list[Any]:
    """Values that a field might have instead; not all need be valid."""
    found: list[Any] = [one for one in literals(annotation) if one != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        found += [value * 2, value + 1, value - 1, value / 2, value / 4, 0.5, 32]
    elif isinstance(value, str):
        found += [f"{value}x"]
    elif isinstance(value, dict):
        found += [{**value, "more": 1}]
    elif isinstance(value, list | tuple):
        found += [
            [*value, *value],
            [*value, "more"],
            [*value, 1],
            [item / 2 for item in value if isinstance(item, float)],
        ]
        found += [value[:-1]]
    else:
        found += [1, 2, 0.5, "more", [1], ["more"]]
    return found


def literals(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [value for part in typing.get_args(annotation) for value in literals(part)]


def with_value(model: BaseModel, place: str, value: Any) -> BaseModel:
    """The model with another value at a place.

    Raises:
        ValidationError: it cannot be there.
    """
    values = model.model_dump(mode="json")
    node, (*parents, leaf) = values, place.split(".")
    for part in parents:
        node = node[int(part) if part.isdecimal() else part]
    node[leaf] = value
    return type(model).model_validate(values)


def mutations(model: BaseModel) -> Iterator[tuple[str, BaseModel | None]]:
    """For each field the model with another valid value there; None where none was found."""
    for place, annotation, value in leaves(model):
        for other in others(annotation, value):
            try:
                changed = with_value(model, place, other)
            except ValidationError:
                continue
            if changed != model:
                yield place, changed
                break
        else:
            yield place, None


BESIDE = {
    "train": [
        {},
        {"autoencoder.b_enc_init": "calibrated", "autoencoder.target_l0": 8.0},
        {"autoencoder.engine": "dense"},
        {"autoencoder.resampling": {"scheme": "reinit", "interval_steps": 20, "window_rows": 512}},
        {
            "autoencoder.resampling": {
                "scheme": "anthropic",
                "steps": [20, 40],
                "window_rows": 512,
                "sample_rows": 512,
                "last_step": 50,
            }
        },
    ]
}
"""Settings beside which a stage's fields are looked at, where some can only be beside others."""


def bases(config: BaseModel, stage: str) -> Iterator[BaseModel]:
    for settings in BESIDE.get(stage, [{}]):
        values = config.model_dump(mode="json")
        for place, value in settings.items():
            node, (*parents, leaf) = values, place.split(".")
            for part in parents:
                node = node[int(part) if part.isdecimal() else part]
            node[leaf] = value
        yield type(config).model_validate(values)


NEVER_ALONE = {
    ("tokenize", "sources.0.share"): "shares add up to 1: tested below with two sources",
    ("harvest", "weight_processing"): "has one value",
    ("train", "autoencoder.b_enc_init"): "only with target_l0",
    ("train", "autoencoder.tie_weights"): "false with another init than 'tied', which is a field of its own",
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_identity_field_changes_the_id_and_no_other_does(stage: str, questions: Questions):
    config, ask = questions.asking()[stage]
    changed_once = set[str]()
    unchangeable = set[str]()
    for base in bases(config, stage):
        own = ask(base)
        for place, changed in mutations(base):
            if place in BY_CONTENT:
                continue
            if changed is None:
                unchangeable.add(place)
                continue
            changed_once.add(place)
            excused = (stage, place) in NOT_IDENTITY
            assert (ask(changed) == own) == excused, f"{stage}.{place}: {NOT_IDENTITY.get((stage, place), 'identity')}"
    left = {(stage, place) for place in unchangeable - changed_once}
    assert left <= NEVER_ALONE.keys() | NOT_IDENTITY.keys() | {(stage, "autoencoder.resampling.scheme")}, left


@pytest.mark.parametrize("stage", STAGES)
def test_numbers_are_one_question_however_they_are_written(stage: str, questions: Questions):
    config, ask = questions.asking()[stage]
    own, written = ask(config), 0
    for place, _, value in leaves(config):
        if isinstance(value, int | float) and not isinstance(value, bool):
            spelt = [float(value), int(value)] if value == int(value) else [value]
            spelt += [-0.0] if value == 0 else []
            for other in spelt:
                assert ask(with_value(config, place, other)) == own, f"{stage}.{place}={other!r}"
                written += 1
    assert written or not any(isinstance(value, float) for _, _, value in leaves(config))


def test_zero_with_a_sign_is_zero(questions: Questions):
    config, ask = questions.asking()["train"]
    ids = {ask(with_value(config, "autoencoder.encoder_l1", zero)) for zero in (0, 0.0, -0.0, "-0.0", "0")}
    assert len(ids) == 1
    assert Spec("x", 1, {"a": [{"b": -0.0}]}).id == Spec("x", 1, {"a": [{"b": 0.0}]}).id


def test_nothing_of_the_runtime_changes_an_id(questions: Questions, tiny_preset: Path, tmp_path: Path):
    own = questions.ids()
    (tmp_path / "remote").mkdir()
    values: dict[str, Any] = {
        "root": tmp_path / "elsewhere", "remote": str(tmp_path / "remote"), "push": True, "device": "cuda:7",
        "threads": 3,
        "dask": "tcp://host:8786", "workers": 2, "tensorboard": tmp_path, "checkpoint_seconds": 1.5,
    }  # fmt: skip
    assert values.keys() == Runtime.model_fields.keys(), "a new field of Runtime: is it identity?"
    for name, value in values.items():
        runtime = Runtime(root=tmp_path / "store").model_copy(update={name: value})
        assert Questions(load_preset(str(tiny_preset)), runtime).ids() == own, name


@pytest.mark.parametrize(
    ("module", "stage"),
    [(tokens, "tokenize"), (harvest, "harvest"), (training, "train"), (surveying, "survey"), (reporting, "report")],
)
def test_the_codes_output_version_changes_the_id(
    module: Any, stage: str, questions: Questions, monkeypatch: pytest.MonkeyPatch
):
    own = questions.ids()
    monkeypatch.setattr(module, "OUTPUT_VERSION", module.OUTPUT_VERSION + 1)
    changed = questions.ids()
    assert {name for name in own if own[name] != changed[name]} == {stage}


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_version_changes_its_id(name: str, questions: Questions, monkeypatch: pytest.MonkeyPatch):
    own = questions.ids()
    other = dataclasses.replace(ANALYSES[name], version=ANALYSES[name].version + 1)
    monkeypatch.setitem(analyzing.ANALYSES, name, other)
    changed = questions.ids()
    assert {name for name in own if own[name] != changed[name]} == {f"analyze {name}"}


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "tokenize"])
def test_each_parent_changes_the_id(stage: str, questions: Questions, monkeypatch: pytest.MonkeyPatch):
    """A parent of the same id that was made again with other bytes is another parent."""
    config, ask = questions.asking()[stage]
    own, as_parent, asked = ask(config), Artifact.as_parent, set[str]()
    known = [questions.tokens, questions.activations, questions.sae, questions.survey]
    findings = {sae.id: questions.findings(sae) for sae in (questions.sae, questions.other)}
    known += findings[questions.sae.id].values()
    monkeypatch.setattr(questions, "findings", lambda sae: findings[sae.id])

    def noted(self: Artifact) -> Parent:
        asked.add(self.id)
        return as_parent(self)

    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "as_parent", noted)
        ask(config)
    parents = [artifact for artifact in known if artifact.id in asked]
    assert parents
    for parent in parents:

        def other(self: Artifact, changed: str = parent.id) -> Parent:
            return Parent(self.id, "f" * 64) if self.id == changed else as_parent(self)

        with monkeypatch.context() as patch:
            patch.setattr(Artifact, "as_parent", other)
            assert ask(config) != own, parent.id


def test_ids_are_those_of_another_process_folder_and_hash_seed(questions: Questions, tiny_preset: Path, tmp_path: Path):
    command = [sys.executable, "-m", "tests.faults.questions", str(tiny_preset), str(tmp_path / "other")]
    for seed in ("0", "4242"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "LC_ALL": "C", "TZ": "Asia/Tokyo"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == questions.ids()


def interpreters() -> list[str]:
    """Pythons of this machine that could run the package; the running one at least."""
    named = [path for minor in range(11, 20) if (path := shutil.which(f"python3.{minor}"))]
    more = os.environ.get("SPARSEMILL_PYTHONS", "").split(os.pathsep)
    works = [
        p for p in [*named, *filter(None, more)] if subprocess.run([p, "-c", ""], capture_output=True).returncode == 0
    ]
    return [sys.executable, *works]


@pytest.mark.parametrize("python", interpreters())
def test_ids_checked_in_are_those_of_every_python(python: str):
    code = (
        "import json, sys; from storage.manifest import Spec; "
        "print(json.dumps(["
        "Spec.from_json(spec).id for spec in json.load(open(sys.argv[1], encoding='utf8')).values()]))"
    )
    done = subprocess.run([python, "-c", code, str(IDS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(json.loads(IDS.read_text(encoding="utf-8")))


def test_order_of_keys_and_kind_of_sequence_are_no_part_of_the_question():
    for own, value in json.loads(IDS.read_text(encoding="utf-8")).items():
        spec = Spec.from_json(_turned(value))
        assert spec.id == own


def _turned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _turned(item) for key, item in reversed(value.items())}
    return tuple(_turned(item) for item in value) if isinstance(value, list) else value


def tokenize_id(questions: Questions, **changes: Any) -> str:
    values = questions.preset.tokenize.model_dump(mode="json")
    for place, value in changes.items():
        if place == "language_model":
            values[place] = value
        else:
            values["sources"] = value if place == "sources" else [{**values["sources"][0], place: value}]
    config, ask = questions.asking()["tokenize"]
    return ask(type(config).model_validate(values))


def test_one_place_has_one_id_however_it_is_written(
    questions: Questions, tiny_corpus: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own = tokenize_id(questions)
    monkeypatch.chdir(tiny_corpus.parent)
    (tmp_path / "link").symlink_to(tiny_corpus.parent)
    moved = shutil.copy(tiny_corpus, tmp_path / "renamed.jsonl")
    spelt: Sequence[object] = (
        tiny_corpus.name, f"./{tiny_corpus.name}", f"{tiny_corpus.parent}//{tiny_corpus.name}", "*.jsonl",
        tiny_corpus.parent / ".." / tiny_corpus.parent.name / tiny_corpus.name, tmp_path / "link" / tiny_corpus.name,
        moved,
    )  # fmt: skip
    assert {tokenize_id(questions, files=[str(path)]) for path in spelt} == {own}
    monkeypatch.chdir(tiny_model.parent)
    copied = shutil.copytree(tiny_model, tmp_path / "model")
    assert {tokenize_id(questions, language_model=str(p)) for p in (f"./{tiny_model.name}", copied)} == {own}
    config, ask = questions.asking()["harvest"]
    assert ask(with_value(config, "language_model", str(copied))) == ask(config)


def test_a_byte_of_the_corpus_changes_the_id(questions: Questions, tiny_corpus: Path, tmp_path: Path):
    data = bytearray(tiny_corpus.read_bytes())
    data[-4] ^= 1
    (tmp_path / "documents.jsonl").write_bytes(data)
    assert tokenize_id(questions, files=[str(tmp_path / "documents.jsonl")]) != tokenize_id(questions)


def test_sources_their_order_and_shares_change_the_id(questions: Questions, tiny_corpus: Path):
    def sources(*shares: tuple[str, float]) -> str:
        listed = [
            {"name": name, "kind": "files", "files": [str(tiny_corpus)], "share": share} for name, share in shares
        ]
        return tokenize_id(questions, sources=listed)

    ids = [sources(("a", 0.5), ("b", 0.5)), sources(("b", 0.5), ("a", 0.5)), sources(("a", 0.25), ("b", 0.75))]
    assert len({*ids, tokenize_id(questions)}) == 4


def test_a_folders_files_their_names_and_its_suffixes_change_the_id(questions: Questions, tmp_path: Path):
    def folder(**suffixes: Any) -> str:
        return tokenize_id(
            questions, sources=[{"name": "a", "kind": "folder", "files": [str(tmp_path / "a")], **suffixes}]
        )

    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "sub" / "one.py").write_text("1")
    (tmp_path / "a" / "two.txt").write_text("2")
    ids = [folder(), folder(suffixes=[".py", ".txt"])]
    (tmp_path / "a" / "sub" / "one.py").rename(tmp_path / "a" / "one.py")
    ids.append(folder())
    (tmp_path / "a" / "one.py").write_text("2")
    ids.append(folder())
    assert len(set(ids)) == 4


def test_a_folders_identity_is_of_posix_names_whatever_the_platforms_separator(monkeypatch: pytest.MonkeyPatch):
    contents = {"sub/one.py": "1", "sub/deep/er.py": "2", "two.py": "3", "sub.py": "4", ".hidden/no.py": "5"}
    monkeypatch.setattr(sources, "sha256_file", lambda path: contents[path.relative_to(path.root_of).as_posix()])
    read: list[tuple[str, ...]] = []
    for flavour, root in ((PurePosixPath, "/corpus"), (PureWindowsPath, "C:\\corpus")):
        listed = type(
            "Listed",
            (flavour,),
            {
                "root_of": root,
                "is_file": lambda _: True,
                "is_symlink": lambda _: False,
                "rglob": lambda self, _: [self.joinpath(*name.split("/")) for name in contents],
            },
        )
        source = sources.FolderSource("name", (), (".py",), seed=0)
        monkeypatch.setattr(source, "_roots", [listed(root)])
        read.append((*source.identity().values(), *(name for name, _ in source._files)))  # pyright: ignore[reportPrivateUsage]
    assert read[0] == read[1]
    assert len(read[0]) == 5  # the hidden one is none


def test_a_hub_data_sets_name_configuration_split_and_commit_change_the_id(questions: Questions):
    """A commit is not asked for; that a branch counts as its commit is tests/integration/test_corpora.py's."""

    def of(**changes: str) -> str:
        said = {"data_set": "owner/texts", "config": "en", "split": "train", "revision": "a" * 40} | changes
        return tokenize_id(questions, sources=[{"name": "words", "kind": "hub", **said}])

    changes = {"data_set": "owner/other", "config": "de", "split": "test", "revision": "b" * 40, "text_field": "body"}
    assert len({of(), *(of(**{field: value}) for field, value in changes.items())}) == 1 + len(changes)
    rows = {"name": "words", "kind": "tokenized", "data_set": "owner/rows", "revision": "a" * 40}
    fields = [tokenize_id(questions, sources=[rows | more]) for more in ({}, {"tokens_field": "ids"})]
    assert len({*fields, of()}) == 3


@pytest.mark.parametrize(("name", "stages"), [("tokenizer.json", 2), ("model.safetensors", 1), ("config.json", 1)])
def test_a_byte_of_the_language_model_changes_the_ids(
    name: str, stages: int, questions: Questions, tiny_model: Path, tmp_path: Path
):
    copied = shutil.copytree(tiny_model, tmp_path / "model")
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data + b" " if name.endswith(".json") else data[:-1] + bytes([data[-1] ^ 1]))
    changed = 0
    for stage in ("tokenize", "harvest"):
        config, ask = questions.asking()[stage]
        changed += ask(with_value(config, "language_model", str(copied))) != ask(config)
    assert changed == stages
