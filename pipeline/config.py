"""What a run is: one frozen model a stage, read from a preset's TOML with dotted overrides on top.

The models here hold *identity*: whatever changes a stage's output. What does not (device, threads, folders) is
``Runtime``, a model of its own, and never enters an artifact's id.
"""

import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sae.config import TrainerConfig
from storage.encoding import Encoding
from storage.errors import ConfigError


class StageModel(BaseModel):
    """Frozen, strict about unknown fields, and described field by field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Source(StageModel):
    """One source of documents."""

    name: str
    """How prompts of this source are labelled."""
    kind: Literal["standard-library-code", "standard-library-prose", "files", "folder", "hub", "tokenized"]
    """The running Python's own library, as code or as prose; files of rows or texts; folders of source code; a data set
    of the Hugging Face Hub; or rows of token ids, in files or on the Hub."""
    files: tuple[str, ...] = ()
    """For ``files`` and ``tokenized``: paths or glob patterns of .jsonl and .json (also .gz or .zst), .parquet, .arrow
    or .txt files, the last a document each. For ``folder``: the folders."""
    suffixes: tuple[str, ...] = (".py",)
    """For ``folder``: endings of the files that are read; hidden, binary and blank files are left out."""
    data_set: str = ""
    """For ``hub`` and ``tokenized``: the repository, such as allenai/c4."""
    config: str = ""
    """For a data set with several configurations: which one, such as en."""
    split: str = "train"
    """For a data set: which of its splits is read. (Held-out documents are chosen from it, not another split.)"""
    revision: str = "main"
    """For a data set: branch, tag or commit. The commit is part of the artifact's identity; given one, the Hub is not
    asked for it."""
    text_field: str = "text"
    """For ``files`` and ``hub`` with columns: the field that holds a document's text."""
    tokens_field: str = "tokens"
    """For ``tokenized``: the field that holds a row's ids. Rows are cut into prompts, what is left of each left out."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the training and held-out tokens asked for that this source may fill."""

    @model_validator(mode="after")
    def _says_where(self) -> "Source":
        may = {"files": {"files"}, "folder": {"files"}, "hub": {"data_set"}, "tokenized": {"files", "data_set"}}
        given = {field for field in ("files", "data_set") if getattr(self, field)}
        wanted = may.get(self.kind, set[str]())
        if len(given) != bool(wanted) or not given <= wanted:
            what = f"needs {' or '.join(map(repr, sorted(wanted)))}, and nothing else" if wanted else "needs neither"
            raise ValueError(f"of 'files' and 'data_set', kind = '{self.kind}' {what}")
        return self


class TokenizeConfig(StageModel):
    """Documents to prompts of equal length."""

    language_model: str
    """Whose tokenizer is used: ``demo``, a folder, or a name such as ``gelu-1l``."""
    sources: tuple[Source, ...] = Field(min_length=1)
    """Where documents come from; shares add up to 1."""
    train_tokens: int = Field(gt=0)
    """Tokens of training prompts, at most: a source that runs out leaves its share unfilled, and the stats say so."""
    held_out_tokens: int = Field(gt=0)
    """Tokens of held-out prompts, at most."""
    prompt_tokens: int = Field(default=128, ge=2)
    """Length of a prompt, the BOS at position 0 included (the post: 128)."""
    bos: bool = True
    """Whether position 0 of each prompt is BOS; of rows of ids, whether BOS is written over it. Without it, set
    ``harvest.include_bos``, so that position 0 is harvested."""
    eos: bool = True
    """Whether EOS stands after each document; of rows of ids nothing is changed."""
    on_bad_document: Literal["stop", "skip"] = "stop"
    """Whether a bad document (malformed line, missing field, empty or null text, invalid UTF-8, broken file, id outside
    the vocabulary...) stops the stage or is skipped and counted by kind."""
    seed: int = 0
    """Seed of the order in which the standard library's modules, and the files of a folder, are taken."""

    @model_validator(mode="after")
    def _shares_fill_one(self) -> "TokenizeConfig":
        total = sum(source.share for source in self.sources)
        if abs(total - 1) > 1e-9:
            raise ValueError(f"the shares of the sources add up to {total:g}, expected 1")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError("two sources have one name")
        return self


class HarvestConfig(StageModel):
    """Prompts to shuffled shards of activations."""

    language_model: str
    """The model whose activations are harvested; of a Hub repository also ``name@revision``."""
    hook_name: str = "blocks.0.mlp.hook_post"
    """TransformerLens's name of the site."""
    also_hook_names: tuple[str, ...] = ()
    """Further sites harvested in the same pass, each an artifact of its own over the same prompts in the same order.
    Not identity: an artifact is the same whichever others were harvested beside it."""
    include_bos: bool = False
    """Whether position 0 is harvested too. Its activation is constant; the post kept it."""
    window_prompts: int = Field(gt=0)
    """Prompts shuffled together, and rows of a shard."""
    n_windows: int | None = Field(default=None, gt=0)
    """Windows to harvest; all whole windows of the tokens artifact by default."""
    chunk_rows: int = Field(default=256, gt=0)
    """Rows of an inner chunk: the unit of reading and of checksums. Divides ``window_prompts``."""
    encoding: Encoding = "float16"
    """How rows are stored."""
    forward_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model's weights and activations; rows are then stored as ``encoding`` says. Analyses use the same."""
    weight_processing: Literal["none"] = "none"
    """What is done to the model's weights, in the harvest and in analyses alike: W_out is not centred, layer norms are
    not folded. Stated, because other programs do either by default, and activations or null spaces differ."""
    model_batch_prompts: int = Field(default=8, gt=0)
    """Prompts a forward pass; part of the identity, since the batch's shape moves the last bits."""
    second_moment_stride: int = Field(default=256, gt=0)
    """Every how many batches one enters the second-moment matrix (cost: 2 d_in^2 operations a row that does)."""
    seed: int = 0
    """Seed of the shuffle."""

    @model_validator(mode="after")
    def _chunks_divide_shards(self) -> "HarvestConfig":
        if self.window_prompts % self.chunk_rows:
            raise ValueError(f"chunk_rows {self.chunk_rows} does not divide window_prompts {self.window_prompts}")
        return self

    @property
    def first_position(self) -> int:
        """The first harvested position of a prompt."""
        return 0 if self.include_bos else 1


class TrainConfig(StageModel):
    """Shards, or a model's activations as they are computed, to a sparse autoencoder."""

    autoencoder: TrainerConfig
    """The autoencoder and its optimisation."""
    source: Literal["store", "live"] = "store"
    """Where batches come from: the store; or, for a corpus larger than the disk, its model, at the same site, over all
    training prompts. The store, which may then be of a few windows, serves for statistics, start and analyses."""
    pool_rows: int = Field(default=65_536, gt=0)
    """Rows of the shuffling pools together; at least 20 chunks, which for ``live`` are model batches."""
    lanes: int = Field(default=8, gt=0)
    """Pools the reader deals chunks to; any number of ranks that divides it trains on the same batches."""
    reader_seed: int = 0
    """Seed of the order of the rows."""
    evaluate_every_steps: int = Field(default=500, gt=0)
    """Steps between measurements of loss recovered."""
    evaluate_prompts: int = Field(default=64, gt=0)
    """Held-out prompts of such a measurement."""
    log_every_steps: int = Field(default=20, gt=0)
    """Steps between rows of the training log."""


class SurveyConfig(StageModel):
    """The pass of the encoder over the store that analyses read."""

    rows: int = Field(default=1_638_400, gt=0)
    """Rows of the store to look at, or all where it has fewer (the author's 1,638,400)."""
    top_firings: int = Field(default=16, gt=0)
    """Largest firings kept of each feature."""
    sample_firings: int = Field(default=128, gt=0)
    """Firings of each feature in its uniform sample."""
    kept_firings: int = Field(default=256, gt=0)
    """A feature that fired no more often than this has all its firings kept; above the ultra-low threshold's."""


class AnalyzeConfig(StageModel):
    """Which analyses are made, with which options."""

    analyses: tuple[str, ...]
    """Names of analyses, in any order, such as ``density`` and ``null_space``."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """For an analysis: options that differ from its defaults."""
    survey: SurveyConfig = Field(default_factory=SurveyConfig)
    """What analyses read of the store."""


class Preset(StageModel):
    """A whole run."""

    name: str
    """Of the preset's file."""
    description: str
    """What it is for."""
    tokenize: TokenizeConfig
    """Documents to prompts."""
    harvest: HarvestConfig
    """Prompts to shards."""
    train: TrainConfig
    """Shards to an autoencoder."""
    analyze: AnalyzeConfig
    """The autoencoder to findings."""


class Runtime(StageModel):
    """What does not change any artifact's content."""

    root: Path = Field(default_factory=lambda: Path(os.environ.get("SPARSEMILL_HOME", "artifacts")))
    """The artifact store's folder; SPARSEMILL_HOME by default, else ./artifacts."""
    remote: str | None = Field(default_factory=lambda: os.environ.get("SPARSEMILL_REMOTE") or None, repr=False)
    """URL of the team's artifacts: what is not in ``root`` is looked for there before it is computed."""
    push: bool = False
    """Whether what a stage made, or found in ``root``, is published to ``remote``."""
    device: str = "cpu"
    """Where the language model runs when activations are harvested or computed live, and the autoencoder is trained: a
    torch device."""
    threads: int | None = Field(default=None, gt=0)
    """CPU threads of torch and numba; torch's own choice by default."""
    dask: str | None = None
    """Address of a Dask scheduler, such as ``tcp://host:8786``, whose workers share the stages that they can."""
    workers: int | None = Field(default=None, gt=0)
    """Processes of a Dask cluster on this machine, which share these stages, its threads and its memory."""
    tensorboard: Path | None = None
    """Folder that trainings write TensorBoard events to; none by default."""
    checkpoint_seconds: float = Field(default=60.0, gt=0)
    """Seconds between checkpoints of a training."""

    @model_validator(mode="after")
    def _one_cluster(self) -> "Runtime":
        if self.dask is not None and self.workers is not None:
            raise ValueError("dask names a cluster, and workers starts one on this machine: give one of them")
        return self

    @property
    def on_cluster(self) -> bool:
        """Whether stages that can be shared are, by a cluster."""
        return self.dask is not None or self.workers is not None


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.name.removesuffix(".toml") for path in _preset_folder() if path.name.endswith(".toml"))


def load_preset(name: str, overrides: Sequence[str] = ()) -> Preset:
    """Reads a preset and applies overrides.

    Args:
        name: a shipped preset, or the path of a TOML file.
        overrides: ``stage.field=value`` each, the value as JSON, or as a bare string.

    Raises:
        ConfigError: an unknown preset or field (the nearest names are given), or a value out of range.
    """
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError("no such preset file", where=path)
        text, label = path.read_text(), path.stem
    else:
        if name not in preset_names():
            raise ConfigError(
                "no such preset", found=name, expected=_nearest(name, preset_names()),
                remedy="see 'sparsemill presets', or give the path of a TOML file",
            )  # fmt: skip
        text, label = resources.files("pipeline").joinpath("presets", f"{name}.toml").read_text(), name
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError, or numbers of thousands of digits
        raise ConfigError("the preset is no TOML", where=path, found=str(error)) from error
    values["name"] = label
    for override in overrides:
        _apply(values, override)
    return validate(Preset, values, where=f"preset {label}")


M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], values: Mapping[str, Any], *, where: str) -> M:
    """Builds a config model; raises ``ConfigError`` naming each bad field and the fields that exist."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_explain(model, dict(problem)) for problem in error.errors()]
        raise ConfigError("not a valid config", where=where, found="; ".join(problems)) from error


def _preset_folder() -> Iterator[Any]:
    return resources.files("pipeline").joinpath("presets").iterdir()


def _apply(values: dict[str, Any], override: str) -> None:
    path, sign, raw = override.partition("=")
    if not sign or not path:
        raise ConfigError("not an override", found=override, expected="stage.field=value")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = raw
    *parents, leaf = path.strip().split(".")
    node = values
    for key in parents:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError("not a section of the config", found=path, expected=f"a field below {key!r} cannot exist")
        node = child
    node[leaf] = value


def _explain(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    place = tuple(problem["loc"])
    dotted = ".".join(str(part) for part in place)
    if problem["type"] != "extra_forbidden":
        given = f", not {problem['input']!r}" if isinstance(problem["input"], str | int | float) else ""
        return f"{dotted}: {problem['msg'].removeprefix('Value error, ')}{given}"
    name, elsewhere = str(place[-1]), [path for path in _paths(model) if path.split(".")[-1] == place[-1]]
    near = ", ".join(elsewhere) or _nearest(name, _fields_at(model, place[:-1]))
    return f"{dotted}: unknown option; nearest: {near}"


def _paths(model: type[BaseModel]) -> Iterator[str]:
    """Dotted names of all fields, sections included."""
    for name, field in model.model_fields.items():
        yield name
        for section in _models_in(field.annotation):
            yield from (f"{name}.{path}" for path in _paths(section))


def _fields_at(model: type[BaseModel], place: Sequence[Any]) -> list[str]:
    for part in place:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part))
        found = [] if field is None else _models_in(field.annotation)
        if not found:
            return []
        model = found[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _nearest(name: str, known: Sequence[str]) -> str:
    return ", ".join(get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known))
