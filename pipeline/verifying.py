"""What ``sparsemill verify`` does: check an artifact, mend it if told to, check it again, and say what was found."""

import json
from dataclasses import asdict

from pipeline import repair
from pipeline.repair import Repair
from pipeline.workspace import Workspace
from storage.artifact import Artifact, Problem
from storage.errors import SparsemillError, repair_remedy
from storage.remote import RemoteStore


def verify_and_print(
    artifact: Artifact, workspace: Workspace, *, mend: bool, remote: str | None, rewrite: bool, as_json: bool
) -> bool:
    """Checks an artifact and prints every problem to stdout, a line each, or all as one JSON object.

    Args:
        artifact: what to check.
        workspace: whose store holds it; shows the progress.
        mend: whether to repair what is damaged.
        remote: URL of where committed files may be fetched; SPARSEMILL_REMOTE by default.
        rewrite: see ``pipeline.repair``.
        as_json: what to print.

    Returns:
        Whether all is as committed, in the end.

    Raises:
        SparsemillError: the repair was refused or failed; what is damaged has been printed.
    """
    problems, done = _check(artifact, workspace), None
    if problems and mend:
        if not as_json:
            print(*problems, sep="\n")
        try:
            remote_store = RemoteStore.configured(remote)
            done = repair.repair(artifact, problems, workspace, remote=remote_store, rewrite=rewrite)
        except SparsemillError:
            if as_json:
                _print_json(artifact, problems, None)
            raise
        artifact = workspace.store.open(artifact.id)
        problems = _check(artifact, workspace)
    if as_json:
        _print_json(artifact, problems, done)
    else:
        _print_lines(artifact, problems, done)
    return not problems


def _check(artifact: Artifact, workspace: Workspace) -> list[Problem]:
    shown = 0
    with workspace.reporter.track(f"verify {artifact.id}", artifact.manifest.total_bytes, "bytes") as advance:

        def show(done: int, _total: int) -> None:
            nonlocal shown
            advance(done - shown)
            shown = done

        return workspace.store.verify(artifact, show)


def _print_json(artifact: Artifact, problems: list[Problem], done: Repair | None) -> None:
    document = {
        "id": artifact.id,
        "manifest_sha256": artifact.manifest_sha256,
        "files": len(artifact.manifest.files),
        "bytes": artifact.manifest.total_bytes,
        "problems": [asdict(problem) for problem in problems],
        "repair": None if done is None else asdict(done),
    }
    print(json.dumps(document, indent=2))


def _print_lines(artifact: Artifact, problems: list[Problem], done: Repair | None) -> None:
    if done is not None:
        print(_told(artifact, done))
    for problem in problems:
        print(problem)
    files = _files(len(artifact.manifest.files))
    if not problems:
        print(f"{artifact.id}: {files} as committed")
        return
    extra = sum(problem.kind == "extra" for problem in problems)
    counts = [f"{len(problems) - extra:,} of {files} damaged"] + [f"{extra:,} extra"] * bool(extra)
    print(f"{artifact.id}: {', '.join(counts)}; {repair_remedy(artifact.id)}")


def _told(artifact: Artifact, done: Repair) -> str:
    windows = f"window{'s' * (len(done.windows) > 1)} {', '.join(map(str, done.windows))}"
    parts = [
        f"{windows} computed again" if done.windows else "",
        f"{_files(len(done.recomputed))} made again, as committed" if done.recomputed else "",
        f"{_files(len(done.fetched))} fetched" if done.fetched else "",
        f"{_files(len(done.quarantined))} moved to .quarantine/{artifact.id}" if done.quarantined else "",
        f"all computed again, manifest now {artifact.manifest_sha256}" if done.rewritten else "",
        f"made from it as it was: {', '.join(done.children)}" if done.children else "",
    ]
    return f"{artifact.id}: {'; '.join(filter(None, parts))}"


def _files(number: int) -> str:
    return f"{number:,} file{'s' * (number != 1)}"
