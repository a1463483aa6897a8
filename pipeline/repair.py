"""Repair: damaged files of an artifact, computed again or fetched, and put in place only if they are as committed.

A harvest's file belongs to a window, or to none (metadata, folded statistics). The windows concerned, and only they,
are computed again from the recorded config and the parent; a file whose sha256 then is the manifest's is fsynced and
renamed over the damaged one, never written into it, as other artifacts may have it as a hard link. So a reader sees the
old file or the whole one. Windows are mended one after the other: a killed repair keeps those it finished, and leaves a
folder ``.repair/<id>`` that the next one removes. Where the numerics of this machine give other bytes, and for
artifacts of other stages, files come from a remote by the manifest's hash. Otherwise the repair is refused: nothing but
whole, committed files was put in place. Only when told to does it compute the whole harvest again as an artifact of the
same id with another manifest; what was made from the old one then says so when it is used.

Cost: a forward pass of each window concerned, and disk for one window beside the artifact.
Rejected: keeping what comes out slightly different (a manifest would lie), and all windows in scratch before the first
is put in place (a killed repair would begin anew, and need as much disk as is damaged).
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline import harvest, language_model
from pipeline.sampling import SAMPLED_FROM
from pipeline.windows import file_names
from pipeline.workspace import Workspace
from storage import atomic
from storage.artifact import Artifact, Problem, open_folder
from storage.errors import CorruptArtifact, InputError, RepairRefused, SparsemillError, StorageFull
from storage.fingerprint import sha256_file
from storage.remote import RemoteStore

_SHOWN = 3


@dataclass
class Repair:
    """What a repair did.

    Attributes:
        windows: of a harvest that were computed again.
        recomputed: files put in place that came out as committed.
        fetched: files put in place that came from the remote.
        quarantined: files moved out of the artifact's folder, to ``<root>/.quarantine/<id>``.
        rewritten: whether the whole artifact was computed again, and has another manifest now.
        children: ids of artifacts made from it as it was before it was rewritten.
    """

    windows: list[int] = field(default_factory=list[int])
    recomputed: list[str] = field(default_factory=list[str])
    fetched: list[str] = field(default_factory=list[str])
    quarantined: list[str] = field(default_factory=list[str])
    rewritten: bool = False
    children: list[str] = field(default_factory=list[str])


def repair(
    artifact: Artifact,
    problems: Sequence[Problem],
    workspace: Workspace,
    *,
    remote: RemoteStore | None = None,
    rewrite: bool = False,
) -> Repair:
    """Mends an artifact of the workspace's store, under its lock.

    Args:
        artifact: what is damaged.
        problems: all that ``verify`` found wrong with it.
        workspace: whose store holds it and its parents.
        remote: where committed files may be fetched from.
        rewrite: whether a harvest that cannot be mended is computed again as a whole, with other bytes.

    Raises:
        CorruptArtifact: the manifest is damaged, or has been replaced since.
        InputError: the artifact lies outside the workspace's store.
        RepairRefused: files come out differently, and there is no remote that has them.
        StorageFull: there is no room for one window.
    """
    store = workspace.store
    if artifact.folder.resolve() != (store.root / artifact.stage / artifact.id).resolve():
        raise InputError(
            "only artifacts of this store can be mended", where=store.root, found=artifact.folder,
            remedy="name its store with --home",
        )  # fmt: skip
    waiting = partial(workspace.reporter.say, "  another process holds it: waiting for that one")
    with store.lock(artifact.id, waiting), _scratch_folder(store.root / ".repair" / artifact.id) as scratch:
        _check_manifest(artifact)
        mending = _Mending(artifact, workspace, remote, scratch)
        try:
            mending.mend([problem.name for problem in problems if problem.kind != "extra"])
        except RepairRefused:
            if not rewrite or not _is_computed_whole(artifact):
                raise
            mending.done.rewritten = True
        mending.quarantine([problem.name for problem in problems if problem.kind == "extra"])
    if mending.done.rewritten:  # outside the lock, which making an artifact takes itself
        mending.done.children = _children(artifact, workspace)
        _rewrite(artifact, workspace)
    return mending.done


class _Mending:
    """One repair under way.

    Attributes:
        done: what it did so far.
    """

    def __init__(self, artifact: Artifact, workspace: Workspace, remote: RemoteStore | None, scratch: Path):
        self.done = Repair()
        self._artifact = artifact
        self._workspace = workspace
        self._remote = remote
        self._scratch = scratch

    def mend(self, names: Sequence[str]) -> None:
        """Puts committed bytes in the place of damaged or missing files: those of windows first, in their order."""
        if not names:
            return
        windows: Mapping[str, int] = {}
        if self._artifact.stage == "harvest":
            with suppress(SparsemillError):  # one that this version cannot compute: write_shared_files says why
                layout = harvest.recorded_layout(self._artifact)
                windows = {name: window for window in range(layout.n_windows) for name in file_names(layout, window)}
        for window in sorted({windows[name] for name in names if name in windows}):
            files = [name for name in windows if windows[name] == window]
            atomic.require_free(self._scratch, sum(self._artifact.manifest.files[name].bytes for name in files))
            compute = partial(harvest.write_window_files, self._artifact, [window], self._scratch, self._workspace)
            self._mend([name for name in names if windows.get(name) == window], compute)
            self.done.windows.append(window)
        compute = partial(harvest.write_shared_files, self._artifact, self._scratch)
        rest = [name for name in names if name not in windows]
        self._mend(rest, compute if self._artifact.stage == "harvest" else None)

    def quarantine(self, names: Sequence[str]) -> None:
        """Moves what is not the artifact's out of its folder, and removes folders left empty."""
        for name in names:
            path = self._artifact.folder / name
            if name in self.done.quarantined:  # it stood in the way of a file that is there now
                continue
            if path.is_symlink() or path.exists():
                self._move_away(path)
            for folder in path.parents:
                if folder == self._artifact.folder or not folder.is_dir() or any(folder.iterdir()):
                    break
                atomic.remove_tree(folder)

    def _mend(self, names: Sequence[str], compute: Callable[[], object] | None) -> None:
        """Mends files that one computation makes, all of them or none."""
        if not names:
            return
        reason = self._compute(compute)
        same = [name for name in names if self._is_committed(name)]
        rest = [name for name in names if name not in same]
        if rest:
            self._fetch(rest, reason)
        for name in names:
            self._put_in_place(name)
        self.done.recomputed += same
        self.done.fetched += rest
        for path in self._scratch.iterdir():
            atomic.remove_tree(path)

    def _compute(self, compute: Callable[[], object] | None) -> SparsemillError | None:
        """Computes files into the scratch folder; returns why that cannot be done here."""
        if compute is None:
            return None
        try:
            compute()
        except StorageFull:
            raise
        except SparsemillError as error:
            return error
        return None

    def _is_committed(self, name: str) -> bool:
        path, record = self._scratch / name, self._artifact.manifest.files[name]
        return path.is_file() and path.stat().st_size == record.bytes and sha256_file(path) == record.sha256

    def _fetch(self, names: Sequence[str], reason: SparsemillError | None) -> None:
        if self._remote is None:
            raise self._refusal(names, reason, None) from reason
        for name in names:
            atomic.make_folder((self._scratch / name).parent, durable=False)
            try:
                self._remote.fetch_file(self._artifact, name, self._scratch / name)
            except StorageFull:
                raise
            except SparsemillError as error:
                raise self._refusal(names, reason, error) from error

    def _put_in_place(self, name: str) -> None:
        source, target = self._scratch / name, self._artifact.folder / name
        if target.is_dir() and not target.is_symlink():
            self._move_away(target)
        for folder in target.parents:
            if folder == self._artifact.folder:
                break
            if folder.exists() and not folder.is_dir():
                self._move_away(folder)
        atomic.make_folder(target.parent)
        atomic.sync_files([source], top=source.parent)
        atomic.rename(source, target)

    def _move_away(self, path: Path) -> None:
        name = path.relative_to(self._artifact.folder)
        place = self._workspace.store.root / ".quarantine" / self._artifact.id
        target, number = place / name, 0
        while target.exists() or target.is_symlink():
            number += 1
            target = place / name.with_name(f"{name.name}.{number}")
        atomic.make_folder(target.parent)
        atomic.rename(path, target)
        self.done.quarantined.append(name.as_posix())

    def _refusal(
        self, names: Sequence[str], reason: SparsemillError | None, remote_error: SparsemillError | None
    ) -> RepairRefused:
        found = [str(error) for error in (reason, remote_error) if error is not None]
        remedies = ["'--remote URL' fetches the committed files from where they were pushed"]
        if _is_computed_whole(self._artifact):
            children = _children(self._artifact, self._workspace)
            warning = f", which {_shown(children)} would not match" if children else ""
            remedies.append(f"'--rewrite' computes all of it again under the same id, with other bytes{warning}")
        else:
            how = "take the sample" if self._artifact.stage == "harvest" else "run the stage"
            remedies.append(f"or remove {self._artifact.folder} and {how} again")
        if self._artifact.stage == "harvest" and reason is None:
            found.insert(0, self._differences())
        return RepairRefused(
            f"{self._artifact.id}: damaged files cannot be made again as they were committed",
            where=_shown(names),
            found="; ".join(found) or None,
            remedy="; ".join(remedies),
        )

    def _differences(self) -> str:
        """In what this machine's numerics differ from those on record."""
        recorded = self._artifact.manifest.provenance
        here = self._workspace.provenance() | {"threads": recorded.get("threads")}  # computed with that many
        different = [key for key in sorted(recorded.keys() | here.keys()) if recorded.get(key) != here.get(key)]
        if not different:
            parents = ", ".join(parent.id for parent in self._artifact.parents.values())
            return f"other bytes, though nothing on record differs: is {parents} as committed?"
        return ", ".join(f"{key} {here.get(key)} (recorded: {recorded.get(key)})" for key in different)


def _is_computed_whole(artifact: Artifact) -> bool:
    """Whether it is a harvest; not of one that is a sample, which is taken, and computed again it would be another."""
    return artifact.stage == "harvest" and SAMPLED_FROM not in artifact.parents


def _rewrite(artifact: Artifact, workspace: Workspace) -> None:
    config = harvest.recorded_config(artifact)
    language_model.load_recorded(artifact)  # another model would make another artifact
    with workspace.store.superseding(artifact):
        harvest.harvest(config, workspace.store.parent(artifact, "tokens"), workspace)


def _children(artifact: Artifact, workspace: Workspace) -> list[str]:
    """Ids of artifacts made from this one, as its manifest is now."""
    children: list[str] = []
    for artifact_id in workspace.store.ids():
        with suppress(SparsemillError):  # damaged itself: it is not what is being mended
            if artifact.as_parent() in workspace.store.open(artifact_id).parents.values():
                children.append(artifact_id)
    return sorted(children)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _check_manifest(artifact: Artifact) -> None:
    """The manifest on disk is the one that the problems were found with; a damaged one cannot be opened."""
    found = open_folder(artifact.folder).manifest_sha256
    if found != artifact.manifest_sha256:
        raise CorruptArtifact(
            f"the manifest of {artifact.id} has changed", where=artifact.folder, found=found,
            expected=artifact.manifest_sha256, remedy="verify it again",
        )  # fmt: skip


@contextmanager
def _scratch_folder(path: Path) -> Generator[Path]:
    """A folder for the ``with`` block, cleared of what a killed repair left."""
    atomic.remove_tree(path)
    atomic.make_folder(path, durable=False)
    try:
        yield path
    finally:
        atomic.remove_tree(path)
