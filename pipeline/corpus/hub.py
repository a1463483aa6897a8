"""Files of a Hub data set at one commit, each fetched into the Hub's own cache when reading comes to it.

The repository's list of files, and the few that describe it, come first: huggingface_hub keeps both in its cache, so
with ``HF_HUB_OFFLINE=1`` the list is known too. Which files a configuration and a split consist of is ``datasets``'
to say: it is shown a temporary folder of empty files with the repository's names, which needs no network and gives the
same answer online and offline. Files that the budget of tokens does not reach are not fetched: of C4's 1,024 files a
hundredth holds what 1.6e9 tokens take.

Rejected: ``load_dataset(streaming=True)``, which reads a file through the network as it goes. A broken connection ends
it, the held-out side would be read through the network again, nothing is left for a run offline, and a damaged line
stops it (``pipeline.corpus.readers``).
"""

import re
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from shutil import copyfile
from typing import Any

from pipeline.corpus.sources import DataFile
from storage.errors import InputError

_DESCRIPTIONS = ("README.md", ".huggingface.yaml", "dataset_infos.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NUMBERED = re.compile(r"(\d{5})-of-(\d{5})")


class HubFiles:
    """The files of one split.

    Args:
        data_set: the repository, such as ``allenai/c4``.
        config: of the data set's configurations one; empty where it has but one, or a default.
        split: such as ``train``.
        revision: a branch, tag or commit.
    """

    def __init__(self, data_set: str, config: str, split: str, revision: str):
        self._data_set, self._config, self._split, self._revision = data_set, config, split, revision

    def identity(self) -> Mapping[str, Any]:
        """The repository at its commit; where the revision is a commit, nothing is asked of the Hub."""
        return {"data_set": self._data_set, "commit": self._commit, "config": self._config, "split": self._split}

    def list(self) -> Sequence[DataFile]:
        """See ``Files``; in the order in which ``datasets`` has them."""
        where = f"{self._data_set}@{self._commit[:12]}"
        return [DataFile(name, f"{where}/{name}", partial(self._fetch, name)) for name in self._names]

    @cached_property
    def _commit(self) -> str:
        return self._revision if _COMMIT.fullmatch(self._revision) else self._snapshot.name

    @cached_property
    def _snapshot(self) -> Path:
        """The cache's folder of the commit, with the files that describe the data set, and a list of all others."""
        from pipeline.hub_reading import snapshot

        with self._explained("its list of files"):
            return snapshot(self._data_set, "dataset", self._revision, _DESCRIPTIONS)

    @cached_property
    def _names(self) -> Sequence[str]:
        from datasets import load_dataset_builder

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary).resolve() / "files"
            for name in self._all_names():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
            for name in _DESCRIPTIONS:
                if (self._snapshot / name).is_file():
                    copyfile(self._snapshot / name, folder / name)
            try:
                cache = str(folder.with_name("cache"))
                builder = load_dataset_builder(str(folder), self._config or None, cache_dir=cache)
            except (ValueError, OSError) as error:
                raise InputError(
                    "no such configuration of the data set, or none whose files are read", where=self._data_set,
                    found=str(error).replace(f"{folder}/", ""), remedy="set the source's config",
                ) from error  # fmt: skip
            splits: Mapping[str, Sequence[str]] = builder.config.data_files or {}
            if self._split not in splits:
                raise InputError(
                    "no such split", where=self._data_set, found=self._split, expected=", ".join(map(str, splits))
                )
            return [Path(file).relative_to(folder).as_posix() for file in splits[self._split]]

    def _all_names(self) -> Sequence[str]:
        """Names of all files of the commit.

        A cache that something older filled holds no list. Then it is that of the files that are there, and of those
        that must be there beside them where they are numbered (00003-of-01024): a gap is met when reading comes to it.
        """
        from pipeline.hub_reading import names_of

        with self._explained("its list of files"):
            listed = names_of(self._data_set, "dataset", self._commit)
        if listed is not None:
            return listed
        files = [path for path in self._snapshot.rglob("*") if path.is_file()]
        found = {path.relative_to(self._snapshot).as_posix() for path in files}
        return sorted({complete for name in found for complete in _numbered(name)})

    def _fetch(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with self._explained(name):
            return Path(hf_hub_download(self._data_set, name, repo_type="dataset", revision=self._commit))

    @contextmanager
    def _explained(self, what: str) -> Generator[None]:
        from huggingface_hub.errors import HFValidationError

        from pipeline.hub_reading import asking, reason

        where = f"{self._data_set}@{self._revision}"
        try:
            with asking(f"{what} of {where}"):
                yield
        except (HFValidationError, OSError) as error:
            raise InputError(
                f"of a Hub data set {what} is not to be had", where=where, found=reason(error),
                remedy="check the name, the revision, the network and, for a gated one, your token; offline "
                "(HF_HUB_OFFLINE=1), the Hub cache must hold the file",
            ) from None  # fmt: skip


def _numbered(name: str) -> Sequence[str]:
    """The names of all files of a numbered series that one name belongs to, or that name alone."""
    found = _NUMBERED.search(name)
    if found is None:
        return [name]
    return [f"{name[: found.start()]}{i:05d}-of-{found[2]}{name[found.end() :]}" for i in range(int(found[2]))]
