"""Autoencoders, reports and published bundles -> a repository of the Hugging Face Hub, in one commit.

Files lie where the URL says (the repository's root by default) under their own names, with ``manifest.json``, which
tells what each must be and what it was made from, and a model card where there is none; a bundle goes as it is, with
its own card and checksums. A commit of the Hub is atomic and leaves out what it has already, so pushing again moves
nothing; large files go as LFS. Only artifacts without other people's text are taken: activations and tokens are for
object stores. The token is the one that huggingface_hub finds: HF_TOKEN, or what 'hf auth login' kept.
"""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx  # the one it uses itself

from pipeline.checkpoints.bundle import bundle_files
from pipeline.training import AUTOENCODER_STAGES
from storage.artifact import Artifact
from storage.errors import ConfigError, InputError, RemoteError
from storage.manifest import MANIFEST_NAME

PREFIX = "hf://"
CARD_NAME = "README.md"
_ADDRESS = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+?))?(?:/(?P<path>[\w./ -]+))?/?")


@dataclass(frozen=True)
class Address:
    """A place in the Hub.

    Attributes:
        repository: ``owner/name``.
        path: folder within it, or "".
    """

    repository: str
    path: str

    @staticmethod
    def parse(url: str) -> "Address":
        """Reads ``hf://owner/name[/folder]``.

        Raises:
            ConfigError: it is something else.
        """
        match = _ADDRESS.fullmatch(url)
        parts = (match["path"] or "").split("/") if match else []
        if match is None or match["revision"] or any(part in ("..", ".") for part in parts):
            raise ConfigError("not a place in the Hub", found=url, expected="hf://owner/name or hf://owner/name/folder")
        return Address(match["repository"], match["path"] or "")

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + (f"/{self.path}" if self.path else "")


def push_to_hub(artifact: Artifact, address: Address, *, dry_run: bool = False) -> tuple[int, int]:
    """Pushes an autoencoder or a report.

    Args:
        artifact: of a stage in ``training.AUTOENCODER_STAGES``, or a report.
        address: where to; the repository is made, private, where it is missing.
        dry_run: whether only to say what would be sent.

    Returns:
        Files and bytes handed to the Hub, which leaves out those that it has.

    Raises:
        InputError: an artifact of another stage.
        CorruptArtifact: a file is not as it was committed; nothing was sent.
        RemoteError: the Hub did not take it.
    """
    if artifact.stage not in (*AUTOENCODER_STAGES, "report"):
        raise InputError(
            "only autoencoders and reports are pushed to the Hub", found=artifact.id,
            remedy="push it to an object store: s3://, gs://, az:// or file://",
        )  # fmt: skip
    files: dict[str, Path | bytes] = {name: artifact.checked_file(name) for name in artifact.manifest.files}
    if dry_run:
        return len(files), artifact.manifest.total_bytes
    files[MANIFEST_NAME] = artifact.manifest.to_bytes()
    return _commit(address, files, artifact.id, model_card(artifact)), artifact.manifest.total_bytes


def push_bundle(folder: Path, address: Address, *, dry_run: bool = False) -> tuple[int, int]:
    """Pushes a folder that ``export --bundle`` wrote; its own card takes the place of one that is there.

    Args:
        folder: the bundle.
        address: where to; the repository is made, private, where it is missing.
        dry_run: whether only to say what would be sent.

    Returns:
        Files and bytes handed to the Hub, which leaves out those that it has.

    Raises:
        InputError: a file is not what the bundle's checksums say; nothing was sent.
        RemoteError: the Hub did not take it.
    """
    files = bundle_files(folder)
    total = sum(path.stat().st_size for path in files.values())
    return (len(files) if dry_run else _commit(address, files, folder.name)), total


def _commit(address: Address, files: Mapping[str, Path | bytes], name: str, card: str | None = None) -> int:
    """One commit of files, and of a card where one is given and none is there; how many files it has."""
    folder = f"{address.path}/" if address.path else ""
    operations = [CommitOperationAdd(f"{folder}{file}", data) for file, data in files.items()]
    api = HfApi()
    try:
        api.create_repo(address.repository, private=True, exist_ok=True)
        if card is not None and not api.file_exists(address.repository, f"{folder}{CARD_NAME}"):
            operations.append(CommitOperationAdd(f"{folder}{CARD_NAME}", card.encode()))
        with warnings.catch_warnings(action="ignore"):  # of a table in a model's repository
            api.create_commit(address.repository, operations, commit_message=f"Push {name}")
    except (httpx.HTTPError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        raise RemoteError(  # from None, as the other's message quotes addresses
            "the Hub did not take it", where=str(address), found=f"{type(error).__name__} {status or ''}".strip(),
            transient=status is None or status >= 500 or status == 429,
            remedy="'hf auth login', or HF_TOKEN with the right to write" if status in (401, 403) else None,
        ) from None  # fmt: skip
    return len(operations)


def model_card(artifact: Artifact) -> str:
    """A README.md for a repository: what the artifact is, from its manifest alone."""
    numbers: Mapping[str, object] = {name: value for name, value in artifact.stats.items() if _is_short(value)}
    rows = "".join(f"| {name} | {value} |\n" for name, value in numbers.items())
    kind = "report on a sparse autoencoder" if artifact.stage == "report" else "sparse autoencoder"
    config = json.dumps(artifact.config, indent=2, sort_keys=True)
    made_from = "".join(f"- {role}: `{parent.id}`\n" for role, parent in artifact.parents.items())
    return (
        "---\ntags:\n- sparse-autoencoder\n- sparsemill\n---\n"
        f"# {artifact.id}\n\nA {kind}, made by sparsemill. "
        f"`{MANIFEST_NAME}` has the size and sha256 of every file.\n\n"
        f"| figure | value |\n| --- | --- |\n{rows}\nMade from\n\n{made_from}\nwith\n\n```json\n{config}\n```\n"
    )


def _is_short(value: object) -> bool:
    return isinstance(value, str | int | float | bool)
