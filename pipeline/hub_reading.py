"""Reads of the Hugging Face Hub: its failures in this project's errors, and the list of a commit's files.

Where the Hub cannot be asked, huggingface_hub looks into its cache, and calls a file that is not there missing. Taken
for an answer, that would make another file of a model's repository the one that is read, and a corpus smaller. So
online it is trouble that may pass: that there is no such file only the Hub itself says. huggingface_hub's messages
quote addresses, which behind a redirect are signed, and what the server wrote: ours keep the error's type and the
status, and are not chained to them.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, get_cached_repo_tree, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    FileMetadataError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import httpx  # the one it uses itself

from storage.errors import RemoteError

Kind = Literal["model", "dataset"]


@contextmanager
def asking(where: str) -> Generator[None]:
    """Makes trouble that may pass our error; what the Hub refuses, or offline the cache lacks, stays huggingface_hub's.

    Args:
        where: what is read, for the error.

    Raises:
        RemoteError: transient: the Hub does not answer, is too busy, breaks off, or has trouble of its own.
    """
    try:
        yield
    except (OSError, RuntimeError, httpx.HTTPError) as error:  # RuntimeError is hf_xet's for all it meets
        if is_offline_mode():
            raise
        behind = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        met = behind if isinstance(behind, Exception) else error
        if not _may_pass(met):
            raise met from None
        raise RemoteError(
            "the Hub could not be read", where=where, found=reason(met), transient=True,
            remedy="try again: what has come is kept; offline (HF_HUB_OFFLINE=1) the Hub cache alone is read",
        ) from None  # fmt: skip


def reason(error: Exception) -> str:
    """An error's type and the status, without addresses and without what a server wrote."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = status or (error.strerror if isinstance(error, OSError) else None)
    return f"{type(error).__name__} {said}" if said else type(error).__name__


def names_of(repository: str, kind: Kind, commit: str) -> Sequence[str] | None:
    """Names of all files of a commit, within ``asking``; None where, offline, the cache holds no list of them."""
    try:
        return [file.path for file in get_cached_repo_tree(repository, repo_type=kind, revision=commit)]
    except CachedRepoTreeNotFoundError:
        return None if is_offline_mode() else HfApi().list_repo_files(repository, repo_type=kind, revision=commit)


def snapshot(repository: str, kind: Kind, revision: str | None, wanted: Sequence[str] | None) -> Path:
    """The cache's folder of a commit, within ``asking``; online with all the wanted files.

    Args:
        repository: ``owner/name``.
        kind: of the repository.
        revision: a branch, tag or commit; the main one by default.
        wanted: patterns of names; all files by default.
    """
    patterns = None if wanted is None else list(wanted)
    folder = Path(snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=patterns))
    names_of(repository, kind, folder.name)  # fails where the folder is what the cache had, for want of an answer
    return folder


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    if isinstance(error, OSError) and not isinstance(error, LocalEntryNotFoundError | ConnectionError | TimeoutError):
        return error.errno is None and not isinstance(error, FileMetadataError)  # a file came out shorter than it is
    return True
