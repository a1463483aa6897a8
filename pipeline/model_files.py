"""Where a language model's files are: a folder, or one commit of a Hub repository; and which of its files are read.

A name is resolved once: ``demo``, a folder, a short name (``gelu-1l``, or one of TransformerLens's), a repository; with
``@revision`` behind it, or the Hub's main one. The first file that is read says which commit that revision is, and all
others come from that commit, so that a repository that moves meanwhile never gives a mix. The files are those that
huggingface_hub keeps in its cache: with a commit named, or ``HF_HUB_OFFLINE=1``, they are found there with no network.

Two layouts are known. ``transformers``: ``config.json`` with a ``model_type``, safetensors or ``pytorch_model.bin``,
whole or in shards. ``properties``: TransformerLens's own of before its bridge, of gelu-1l, solu-1l and their kin:
``config.json`` without a ``model_type``, and tensors under property names in one ``.safetensors`` or ``*final.pth``.

A model's identity is the sha256 of these files, never of tensors in memory: those depend on what a library ties,
buffers and casts. Rejected: listing the repository first, as TransformerLens does, which needs a network.
"""

import json
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tokenizers import Tokenizer

from storage.errors import ConfigError, InputError
from storage.fingerprint import sha256_file, sha256_pieces

Layout: TypeAlias = Literal["properties", "transformers"]

DEMO_FOLDER = Path(__file__).parent / "assets" / "demo-model"
_WIDTHS = {6: 768, 8: 1024, 10: 1280, 12: 1536}  # of the deeper SoLU models; all others have 512
HUB_NAMES = {f"gelu-{n}l": f"NeelNanda/GELU_{n}L512W_C4_Code" for n in (1, 2, 3, 4)} | {
    f"solu-{n}l": f"NeelNanda/SoLU_{n}L{_WIDTHS.get(n, 512)}W_C4_Code" for n in (1, 2, 3, 4, *_WIDTHS)
}
"""Repositories in TransformerLens's own layout, by the short name that TransformerLens gives them."""

_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"
_WEIGHTS: dict[Layout, tuple[str, ...]] = {
    "properties": ("model_final.pth", "model.safetensors"),
    "transformers": ("model.safetensors", "pytorch_model.bin"),
}
_ENDINGS = (".safetensors", "final.pth")  # where there is neither: some files of the family have longer names


@dataclass(frozen=True)
class Folder:
    """A folder of files."""

    path: Path

    @property
    def commit(self) -> None:
        """A folder has none."""
        return

    def __str__(self) -> str:
        return str(self.path)

    def find(self, name: str) -> Path | None:
        """A file, or None where there is none of this name."""
        path = self.path / name
        return path if path.is_file() else None

    def ending(self, endings: tuple[str, ...]) -> Path | None:
        """The first file whose name ends in the first of these that any does; None where there is none."""
        first = _first_ending([path.name for path in self.path.iterdir() if path.is_file()], endings)
        return None if first is None else self.path / first


@dataclass(frozen=True)
class Repository:
    """A Hub repository at a revision, or at a commit once that is known."""

    name: str
    commit: str | None
    revision: str | None = None

    def __str__(self) -> str:
        at = self.commit or self.revision
        return f"Hub repository {self.name}" + (f" at {at}" if at else "")

    def find(self, name: str) -> Path | None:
        """A file, downloaded if need be; None where there is none of this name, or, offline, none in the cache.

        Raises:
            ConfigError: no such repository or revision, it may not be read, or its file cannot be kept.
            RemoteError: the Hub has trouble that may pass.
        """
        from huggingface_hub import hf_hub_download

        with self._explained(name):
            return Path(hf_hub_download(self.name, name, revision=self.commit or self.revision))
        return None

    def ending(self, endings: tuple[str, ...]) -> Path | None:
        """The first file whose name ends in the first of these that any does; offline, of those in the cache.

        Raises:
            ConfigError: as of ``find``.
            RemoteError: as of ``find``.
        """
        from huggingface_hub import snapshot_download

        from pipeline.hub_reading import names_of

        with self._explained("the list of files"):
            names = names_of(self.name, "model", self.commit or "")
            if names is None:
                names = [path.name for path in Path(snapshot_download(self.name, revision=self.commit)).iterdir()]
            first = _first_ending(names, endings)
            return None if first is None else self.find(first)
        return None

    @contextmanager
    def _explained(self, name: str) -> Generator[None]:
        """Ends quietly where there is no such file."""
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

        from pipeline.hub_reading import asking, reason

        try:
            with asking(f"{name} of {self}"):
                yield
        except EntryNotFoundError:
            return
        except (HfHubHTTPError, HFValidationError) as error:
            raise ConfigError(
                "no such repository, or no right to read it", where=str(self), found=reason(error),
                expected=_nearest(self.name), remedy="check the name, the revision and, for a gated one, your token",
            ) from None  # fmt: skip
        except OSError as error:
            raise ConfigError(
                f"{name} did not come from the Hub", where=str(self), found=reason(error),
                remedy="check HF_ENDPOINT, the proxy, and room and rights in the Hub cache",
            ) from None  # fmt: skip

    def at_commit_of(self, file: Path) -> "Repository":
        """The repository at the commit that a file of it came from."""
        return Repository(self.name, file.parent.name)  # .../snapshots/<commit>/<file>


@dataclass(frozen=True)
class ModelFiles:
    """A model's files; weights are fetched when they are first asked for.

    Attributes:
        name: as it was asked for, without a revision.
        place: where the files are.
        settings: what ``config.json`` says.
        config: ``config.json``.
        tokenizer: ``tokenizer.json``.
    """

    name: str
    place: Folder | Repository
    settings: Mapping[str, Any]
    config: Path
    tokenizer: Path

    @property
    def commit(self) -> str | None:
        """The commit of its Hub repository; None for a folder."""
        return self.place.commit

    @property
    def layout(self) -> Layout:
        """How its weights are named."""
        return "transformers" if "model_type" in self.settings else "properties"

    @property
    def d_vocab(self) -> int:
        """Size of the vocabulary.

        Raises:
            ConfigError: ``config.json`` does not say.
        """
        name = "d_vocab" if self.layout == "properties" else "vocab_size"
        size = self.settings.get(name)
        if not isinstance(size, int):
            raise ConfigError("the model's config lacks the size of its vocabulary", where=self.config, expected=name)
        return size

    @cached_property
    def weights(self) -> tuple[Path, ...]:
        """The files of its weights, in the order of their names; of several, the index first.

        Raises:
            ConfigError: there are none, or one is missing.
            RemoteError: the Hub has trouble that may pass.
        """
        for name in _WEIGHTS[self.layout]:
            if (found := self.place.find(name)) is not None:
                return (found,)
            if self.layout == "transformers" and (index := self.place.find(f"{name}.index.json")) is not None:
                shards = sorted(set(_read_json(index)["weight_map"].values()))
                return (index, *(_need(self.place, shard) for shard in shards))
        if self.layout == "properties" and (named := self.place.ending(_ENDINGS)) is not None:
            return (named,)
        raise ConfigError(
            "no weights are to be had", where=str(self.place),
            expected=" or ".join(_WEIGHTS[self.layout]), remedy=_remedy(self.place),
        )  # fmt: skip

    @cached_property
    def identity(self) -> dict[str, str]:
        """Sha256 of config, weights and tokenizer: a moved repository is a different model.

        Weights of several files have that of their hashes, one a line.
        """
        hashes = [sha256_file(path) for path in self.weights]
        return {
            "config_sha256": sha256_file(self.config),
            "weights_sha256": hashes[0] if len(hashes) == 1 else sha256_pieces(["\n".join(hashes).encode()]),
            "tokenizer_sha256": self.tokenizer_sha256,
        }

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Sha256 of the tokenizer, which needs no weights."""
        return sha256_file(self.tokenizer)

    def read_tokenizer(self) -> Tokenizer:
        """Reads the tokenizer.

        Raises:
            InputError: it is none, or has ids that the model has no embedding for.
        """
        tokenizer = load_tokenizer(self.tokenizer)
        largest = max(tokenizer.get_vocab().values(), default=0)
        if largest >= self.d_vocab:
            raise InputError(
                "the tokenizer has more ids than the model has embeddings", where=self.tokenizer,
                found=f"id {largest}", expected=f"at most {self.d_vocab - 1}, as {self.config} says",
                remedy="put the tokenizer that the model was trained with beside it",
            )  # fmt: skip
        return tokenizer


def find_files(name: str, revision: str | None = None) -> ModelFiles:
    """Finds a model's config and tokenizer; its weights are fetched later.

    Args:
        name: ``demo``, a folder, a short name, or a Hub repository; of the last two also ``name@revision``.
        revision: a branch, tag or commit of the repository.

    Raises:
        ConfigError: no such model, or one of its files is missing.
        InputError: ``config.json`` does not read.
        RemoteError: the Hub has trouble that may pass.
    """
    base, place = _place(name, revision)
    config = _need(place, _CONFIG)
    settings = _read_json(config)
    if isinstance(place, Repository):
        place = place.at_commit_of(config)
    tokenizer_name = None if "model_type" in settings else settings.get("tokenizer_name")
    tokenizer = None if tokenizer_name and isinstance(place, Repository) else place.find(_TOKENIZER)
    if tokenizer is None and not tokenizer_name:
        raise ConfigError(
            "the model has no tokenizer.json", where=str(place),
            remedy="write one: transformers.AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)",
        )  # fmt: skip
    return ModelFiles(
        base, place, settings, config, tokenizer or _need(Repository(str(tokenizer_name), None), _TOKENIZER)
    )


def load_tokenizer(file: Path) -> Tokenizer:
    """Reads a ``tokenizer.json``.

    Raises:
        InputError: it is none.
    """
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise InputError("not a tokenizer file", where=file, found=str(error)) from error


def _place(name: str, revision: str | None) -> tuple[str, Folder | Repository]:
    """The name without a revision, and where it leads."""
    folder = DEMO_FOLDER if name == "demo" else Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError("a folder has no revisions", where=folder, found=revision)
        return name, Folder(folder)
    if name.startswith((".", "/", "~")):
        raise ConfigError("no such folder", where=folder)
    base, _, named = name.partition("@")
    if named and revision is not None and named != revision:
        raise ConfigError("two revisions of one model", found=f"{named} and {revision}")
    repository = HUB_NAMES.get(base) or _repository(base)
    if repository is None:
        raise ConfigError(
            "no language model of this name", found=name, expected=_nearest(base),
            remedy="give demo, a folder, a name of TransformerLens or OWNER/REPOSITORY of the Hub",
        )  # fmt: skip
    return base, Repository(repository, None, named or revision)


def _repository(name: str) -> str | None:
    """The repository that a name of TransformerLens's, or of the Hub, means."""
    if name.count("/") == 1:
        return name
    return next((official for official, names in _lens_names().items() if name in {official, *names}), None)


def _lens_names() -> dict[str, list[str]]:
    """Names that TransformerLens knows, each with its short ones; this imports it, which takes seconds."""
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    return {name: MODEL_ALIASES.get(name, []) for name in OFFICIAL_MODEL_NAMES}


def _nearest(name: str) -> str:
    known = ["demo", *HUB_NAMES, *HUB_NAMES.values()]
    known += [each for official, names in _lens_names().items() for each in (official, *names)]
    return ", ".join(dict.fromkeys(get_close_matches(name, known, n=4, cutoff=0.5))) or ", ".join(["demo", *HUB_NAMES])


def _first_ending(names: Iterable[str], endings: tuple[str, ...]) -> str | None:
    """The name that comes first: by its ending, then as names are sorted; what lies in folders is left out."""
    top = sorted(name for name in names if "/" not in name)
    return next((name for ending in endings for name in top if name.endswith(ending)), None)


def _need(place: Folder | Repository, name: str) -> Path:
    found = place.find(name)
    if found is None:
        raise ConfigError(f"model file {name} is not to be had", where=str(place), remedy=_remedy(place))
    return found


def _remedy(place: Folder | Repository) -> str:
    if isinstance(place, Folder):
        return "put it there"
    return "check the name and the network; offline (HF_HUB_OFFLINE=1), the Hub cache must hold the file"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError("not a JSON file", where=file, found=str(error)) from error
    if not isinstance(found, dict):
        raise InputError("not a JSON object", where=file, found=type(found).__name__)
    return found
