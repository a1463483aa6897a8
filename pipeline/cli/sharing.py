"""``sparsemill push``, ``pull`` and ``explain``: artifacts of a team, and why a stage would run again."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.filesize import decimal

from pipeline.cli.options import AsJson, Home, PresetName, Set, print_table, workspace_at
from pipeline.config import load_preset
from storage.errors import ConfigError
from storage.remote import RemoteStore

if TYPE_CHECKING:
    from pipeline.sharing import Moved

WithParents = Annotated[
    bool, Parameter(name="--with-parents", negative=(), help="also what it was made from, back to the tokens")
]
DryRun = Annotated[bool, Parameter(negative=(), help="only say which bytes and files would move")]


def push(
    reference: str,
    url: str | None = None,
    *,
    with_parents: WithParents = False,
    dry_run: DryRun = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Publish an artifact: to a bucket, a shared folder, or an autoencoder, report or bundle to the Hugging Face Hub.

    Others see it only once all of it is there. After an interruption the same command goes on where it stopped; an
    artifact that is there already costs one request. Credentials come from the environment or the service's own
    profile files: AWS's and ~/.aws, gcloud's, Azure's, HF_TOKEN or 'hf auth login'.

    For instance: sparsemill push latest s3://bucket/team --with-parents; sparsemill push harvest-af2f /mnt/team
    --dry-run; sparsemill push train-2ab7 hf://owner/my-autoencoder.

    Args:
        reference: id, unique prefix, tag, or 'latest'; for the Hub also a folder that 'export --bundle' wrote.
        url: s3://, gs://, az://, file://, a folder, or hf://owner/name; SPARSEMILL_REMOTE by default.
    """
    from pipeline import sharing
    from pipeline.checkpoints.bundle import is_bundle
    from pipeline.hub import PREFIX, Address, push_bundle, push_to_hub
    from pipeline.sharing import Moved

    if url is not None and url.startswith(PREFIX) and is_bundle(Path(reference)):
        files, n_bytes = push_bundle(Path(reference), Address.parse(url), dry_run=dry_run)
        _tell("push", [Moved(reference, files, n_bytes, there=False)], dry_run=dry_run, as_json=as_json)
        return
    workspace = workspace_at(None, home)
    artifact = workspace.store.resolve(reference)
    if url is not None and url.startswith(PREFIX):
        if with_parents:
            raise ConfigError("the Hub takes autoencoders and reports alone", found="--with-parents")
        files, n_bytes = push_to_hub(artifact, Address.parse(url), dry_run=dry_run)
        _tell("push", [Moved(artifact.id, files, n_bytes, there=False)], dry_run=dry_run, as_json=as_json)
        return
    moved = sharing.push(artifact, _remote(url), workspace, with_parents=with_parents, dry_run=dry_run)
    _tell("push", moved, dry_run=dry_run, as_json=as_json)


def pull(
    url: str,
    reference: str,
    *,
    with_parents: WithParents = False,
    windows: Annotated[
        str | None, Parameter(help="of a harvest: a sample of so many windows, such as 3 or 1%; an artifact of its own")
    ] = None,
    dry_run: DryRun = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Fetch an artifact that somebody pushed; every file's sha256 is checked before it counts.

    After an interruption the same command goes on where it stopped. To use an artifact without fetching all of it,
    set SPARSEMILL_REMOTE, or name it by its URL: sparsemill train --activations s3://bucket/team/harvest/ID.

    For instance: sparsemill pull s3://bucket/team harvest-af2f --windows 1%; sparsemill pull /mnt/team train-2ab7
    --with-parents.

    Args:
        url: s3://, gs://, az://, https://, file://, or a folder.
        reference: id; where the remote can be listed also the unique beginning of one.
    """
    from pipeline import sharing

    workspace = workspace_at(None, home)
    artifact, moved = sharing.pull(
        reference, _remote(url), workspace, with_parents=with_parents, windows=windows, dry_run=dry_run
    )
    _tell("pull", moved, dry_run=dry_run, as_json=as_json)
    if not as_json and not dry_run:
        print(artifact.id)


def explain(
    preset: PresetName = "demo",
    *,
    set_: Set = (),
    full: Annotated[
        bool, Parameter(negative=(), help="of each stage that would run, every difference from the nearest artifact")
    ] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Say which stages of a preset are there, and why each of the others would run.

    A stage that would run is compared with the nearest artifact of its kind: the fields of its config, the version of
    its output, and its parents, as far as they differ. What would run only because something before it does is told in
    one line. Nothing is made.

    For instance: sparsemill explain demo --set train.autoencoder.l1_coeff=0.2.
    """
    from pipeline.explaining import explain_chain, told

    answers = explain_chain(load_preset(preset, set_), workspace_at(None, home))
    if as_json:
        print(json.dumps([_described(asdict(answer)) for answer in answers], indent=2, default=str))
        return
    print("\n".join(told(answers, full=full)))


def list_remote(url: str, *, as_json: bool) -> None:
    """Prints what a remote has."""
    from pipeline import sharing

    remote = _remote(url)
    found = sharing.list_remote(remote)
    if as_json:
        print(json.dumps([asdict(pointer) for pointer in found], indent=2))
        return
    if not found:
        print(f"{remote.shown} holds no artifacts; 'sparsemill push' publishes some")
        return
    print_table(
        ["artifact", "size", "files"],
        [[pointer.id, decimal(pointer.total_bytes), f"{pointer.files:,}"] for pointer in found],
    )


def _remote(url: str | None) -> RemoteStore:
    remote = RemoteStore.configured(url)
    if remote is None:
        raise ConfigError("no remote is named", remedy="give a URL, or set SPARSEMILL_REMOTE")
    return remote


def _described(answer: dict[str, object]) -> dict[str, object]:
    why = answer.pop("why")
    kept = {name: why[name] for name in ("nearest", "differences")} if isinstance(why, dict) else {}
    return answer | kept


def _tell(verb: str, moved: "Sequence[Moved]", *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"dry_run": dry_run, "artifacts": [asdict(one) for one in moved]}, indent=2))
        return
    would = f"would {verb}" if dry_run else {"push": "pushed", "pull": "pulled"}[verb]
    for one in moved:
        done = "there already" if one.there else f"{would} {one.files:,} files, {decimal(one.bytes)}"
        print(f"{one.id}: {done}")
    if len(moved) > 1:
        from pipeline import sharing

        all_of_it = sharing.total(moved)
        print(f"all: {would} {all_of_it.files:,} files, {decimal(all_of_it.bytes)}")
