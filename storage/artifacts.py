"""The artifact store: find, or else stage, resume and commit; then resolve names, list, verify.

Layout under the root::

    sparsemill-store.json                    marks the folder as a store
    <stage>/<id>/manifest.json, run.json, ...  a committed artifact: readers look at nothing else
    .staging/<id>/files/, journal.jsonl      an artifact in the making (storage.staging)
    .locks/<id>                              held (flock) by the process that makes it
    .tags/<name>                             a person's name for an artifact
    .pulled/<id>/<manifest's sha256>/        files fetched from a remote of an artifact that is not here (yet)

Commit: all files fsynced, ``run.json``, the manifest last, then one rename of ``files/`` to ``<stage>/<id>``, and an
fsync of the folder: after a crash at any point the artifact is either complete or absent, and the journal says what
need not be computed again. Finding an artifact costs one read of its manifest. Rejected: a database (a second truth
beside the folder, and sharing is copying folders), a lease with a timeout (a stopped process would lose its lock).
"""

import os
import platform
import socket
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Literal

from storage import atomic, references
from storage.artifact import Artifact, Origin, Problem, file_names, open_folder
from storage.borrowing import PULLED_NAME, Borrowing
from storage.errors import ArtifactNotFound, CorruptArtifact
from storage.fingerprint import Json, canonical_json
from storage.manifest import MANIFEST_NAME, RUN_NAME, Manifest, Parent, Spec, stage_of
from storage.references import LATEST, Stages
from storage.remote import RemoteStore, split_reference
from storage.root import check_root, create_root, make_durable_folder
from storage.staging import Staging
from storage.transfers import Track, untracked
from storage.verification import verify

__all__ = ["LATEST", "Artifact", "ArtifactStore", "Made", "Parent", "Problem", "Result", "Spec", "Staging"]


@dataclass(frozen=True)
class Result:
    """What a stage returns beside the files it staged.

    Attributes:
        stats: figures for the manifest; equal for equal specs and numerics, so no clock and no speed.
        run: figures of this run for ``run.json``, such as its speed; hashed by nothing.
    """

    stats: Mapping[str, Json]
    run: Mapping[str, Json] = field(default_factory=dict[str, Json])


@dataclass(frozen=True)
class Made:
    """An artifact, and how it came about: computed now, found, or continued from an interrupted run's journal."""

    artifact: Artifact
    status: Literal["made", "cached", "resumed"]


class ArtifactStore:
    """The artifacts under one root folder.

    Args:
        root: the store's folder; created, with its marker, when first written to.
        remote: where a team keeps its artifacts: what is not here is looked for there before it is computed.
        track: shows the progress of files that come from a remote.

    Raises:
        NotAStore: the folder holds something else, or is a file.
        UnsupportedFormat: a store of another format version.
    """

    def __init__(self, root: Path, *, remote: RemoteStore | None = None, track: Track = untracked):
        self.root = root
        self.remote = remote
        self._track = track
        self._team: Origin | None = None if remote is None else Borrowing(remote, root, track=track)
        self._superseded: set[str] = set()
        check_root(root)

    def find(self, spec: Spec) -> Artifact | None:
        """The committed artifact of a spec, here or else in the team's remote, or None; never computes."""
        found = self._here(spec.id)
        if found is not None:
            return None if found.manifest_sha256 in self._superseded else found
        lent = None if self._team is None else self._team.find(spec.id)
        return lent if lent is not None and lent.spec == spec else None

    def open(self, artifact_id: str) -> Artifact:
        """The artifact of a full id, here or else in the team's remote.

        Raises:
            ArtifactNotFound: there is none.
            CorruptArtifact: its manifest is damaged.
        """
        found = self._here(artifact_id) or (None if self._team is None else self._team.find(artifact_id))
        if found is None:
            where = self.root if self.remote is None else f"{self.root} and {self.remote.shown}"
            unfinished = references.unfinished_remedy(self.root, answers=lambda name: name == artifact_id)
            remedy = unfinished or "'sparsemill artifacts ls' lists what is there"
            raise ArtifactNotFound(f"no such artifact: {artifact_id}", where=where, remedy=remedy)
        return found

    def _here(self, artifact_id: str) -> Artifact | None:
        folder = self._folder(artifact_id)
        if not (folder / MANIFEST_NAME).is_file():
            return None
        if any((self.root / kind / artifact_id).exists() for kind in (".staging", PULLED_NAME)):
            atomic.sync_folder(folder.parent)  # who committed it may have been killed before doing this
        return open_folder(folder)

    def list(self, stage: str | None = None) -> list[Artifact]:
        """All artifacts, or those of one stage, newest first."""
        return [self.open(artifact_id) for artifact_id in self.ids(stage)]

    def ids(self, stage: Stages = None) -> "list[str]":
        """Ids of all artifacts, or of some stages, newest first, without reading their manifests."""
        return references.ids(self.root, stage)

    def resolve(self, reference: str, *, stage: Stages = None) -> Artifact:
        """The artifact that a person means.

        Args:
            reference: ``latest``, a tag, an id or the unique beginning of one (with or without its stage), the path
                of an artifact's folder, here or elsewhere, or ``<URL of a remote>/<stage>/<id>``: then files come
                when they are read, and activations are read where they are.
            stage: only artifacts of this stage, or of these, count.

        Raises:
            ArtifactNotFound: none answers to it.
            AmbiguousReference: several ids begin so.
        """
        if "://" in reference:
            artifact = self.open_remote(*split_reference(reference))
        elif "/" in reference or reference.startswith((".", "~")):
            artifact = open_folder(Path(reference).expanduser())
        else:
            artifact = self.open(references.resolve_id(self.root, reference, stage))
        if stage is not None and artifact.stage not in ((stage,) if isinstance(stage, str) else stage):
            raise ArtifactNotFound(
                "the reference names an artifact of another stage",
                where=reference,
                found=artifact.id,
                expected=references.named(stage),
            )
        return artifact

    def open_remote(self, url: str, artifact_id: str) -> Artifact:
        """An artifact of any remote, read where it is.

        Raises:
            ArtifactNotFound: the remote does not have it, or not whole yet.
        """
        remote = RemoteStore(url)
        found = Borrowing(remote, self.root, streams=True, track=self._track).find(artifact_id)
        if found is None:
            raise ArtifactNotFound("the remote has no such artifact", where=remote.shown, found=artifact_id)
        return found

    def tag(self, name: str, artifact: Artifact) -> None:
        """Gives an artifact of this store a name, moving it from the one that had it."""
        if self._here(artifact.id) is None:
            raise ArtifactNotFound(
                "only artifacts of this store can be tagged", where=self.root, found=artifact.id, remedy="pull it first"
            )
        references.write_tag(self.root, name, artifact.id)

    def tags(self) -> dict[str, str]:
        """Artifact ids by tag, sorted."""
        return references.read_tags(self.root)

    def parent(self, artifact: Artifact, role: str) -> Artifact:
        """The artifact that another was made from, checked to be the very one: here, or where the other came from.

        Raises:
            ArtifactNotFound: there is no such role, or the parent is neither here nor in a remote.
            CorruptArtifact: the parent's manifest is not the one that the child was made from.
        """
        if role not in artifact.parents:
            roles = ", ".join(artifact.parents) or "none"
            raise ArtifactNotFound("no parent in this role", where=artifact.id, found=role, expected=roles)
        wanted = artifact.parents[role]
        here = self._here(wanted.id)
        if here is not None and here.manifest_sha256 == wanted.manifest_sha256:
            return here
        for origin in filter(None, (artifact.origin, self._team)):
            lent = origin.find(wanted.id, wanted.manifest_sha256)
            if lent is not None:
                return lent
        if here is not None:
            raise CorruptArtifact(
                f"{artifact.id} was made from another {here.id}",
                where=here.folder,
                found=f"manifest {here.manifest_sha256}",
                expected=wanted.manifest_sha256,
            )
        raise ArtifactNotFound(
            f"what {artifact.id} was made from is not here", where=self.root, found=wanted.id,
            remedy=f"'sparsemill pull URL {wanted.id}' gets it, or SPARSEMILL_REMOTE says where it is read from",
        )  # fmt: skip

    def has(self, artifact: Artifact) -> bool:
        """Whether an artifact of a remote is here as well.

        Raises:
            CorruptArtifact: there is another artifact of its id here.
        """
        here = self._here(artifact.id)
        if here is not None and here.manifest_sha256 != artifact.manifest_sha256:
            raise CorruptArtifact(
                f"there is another {artifact.id} here: the same question, answered with other bytes", where=here.folder,
                found=f"manifest {here.manifest_sha256}", expected=artifact.manifest_sha256,
                remedy="remove the one here to have the remote's; what was made from it then lacks its parent",
            )  # fmt: skip
        return here is not None

    def adopt(self, artifact: Artifact) -> None:
        """Commits an artifact of a remote, all of whose files have been fetched and checked; under its lock.

        Raises:
            CorruptArtifact: there is another artifact of its id here.
        """
        if not self.has(artifact):
            files = artifact.manifest.files
            for name in set(file_names(artifact.folder)) - files.keys():  # what a killed pull was writing
                atomic.remove_file(artifact.folder / name)
            for folder in {parent for name in files for parent in (artifact.folder / name).parents}:
                if folder.is_relative_to(artifact.folder):
                    atomic.sync_folder(folder)
            run: dict[str, Json] = {"status": "pulled", "finished": datetime.now(UTC).isoformat()}
            self._publish(artifact.folder, artifact.manifest, run)
            atomic.remove_tree(artifact.folder.parent)

    def verify(self, artifact: Artifact, on_progress: Callable[[int, int], None] | None = None) -> "list[Problem]":
        """Compares every file of an artifact with its manifest, and reports missing and extra files.

        Args:
            artifact: what to check; of a remote's, its files are read there and not kept.
            on_progress: called with (bytes done, bytes in all).
        """
        if artifact.origin is not None:
            return artifact.origin.verify(artifact, on_progress)
        return verify(artifact, on_progress)

    def make(
        self,
        spec: Spec,
        produce: Callable[[Staging], Result],
        *,
        provenance: Mapping[str, Json],
        on_wait: Callable[[], None] | None = None,
    ) -> Made:
        """Finds the artifact of a spec, or makes it, continuing what an interrupted process left.

        Args:
            spec: the question.
            produce: stages the files; units that ``staging.finished`` names are there already and must be skipped.
            provenance: what the bytes depend on beside the spec. Work begun under another provenance is thrown away,
                so that no artifact mixes two.
            on_wait: called if another process is making the same artifact, before waiting for it.
        """
        return self.make_together([spec], lambda stagings: [produce(stagings[0])], provenance, on_wait)[0]

    def make_together(
        self,
        specs: Sequence[Spec],
        produce: Callable[[Sequence[Staging]], Sequence[Result]],
        provenance: Mapping[str, Json],
        on_wait: Callable[[], None] | None = None,
    ) -> "list[Made]":
        """As :meth:`make`, for artifacts that one pass can make together; those that are there already are found.

        Args:
            specs: the questions, no two alike.
            produce: stages the files of the missing ones, in the order of ``specs``.
            provenance: see :meth:`make`.
            on_wait: see :meth:`make`.

        Returns:
            An entry a spec, in their order.
        """
        made = self._found(specs)
        missing = [spec for spec in specs if spec.id not in made]
        with ExitStack() as locks:
            for spec in sorted(missing, key=lambda spec: spec.id):  # in one order, so that no two processes deadlock
                locks.enter_context(self.lock(spec.id, on_wait))
            for artifact_id, found in self._found(missing).items():  # made while this process waited
                made[artifact_id] = found
                atomic.remove_tree(self._staging_folder(artifact_id))
            missing = [spec for spec in missing if spec.id not in made]
            if missing:
                made |= self._stage_and_commit(missing, produce, provenance)
        return [made[spec.id] for spec in specs]

    def _found(self, specs: Sequence[Spec]) -> dict[str, Made]:
        found = {spec.id: self.find(spec) for spec in specs}
        return {artifact_id: Made(artifact, "cached") for artifact_id, artifact in found.items() if artifact}

    def _stage_and_commit(
        self,
        specs: Sequence[Spec],
        produce: Callable[[Sequence[Staging]], Sequence[Result]],
        provenance: Mapping[str, Json],
    ) -> dict[str, Made]:
        started, clock = datetime.now(UTC), monotonic()
        stagings = [Staging(self._staging_folder(spec.id), spec, provenance) for spec in specs]
        resumed = [bool(staging.finished) for staging in stagings]
        results = produce(stagings)
        run: dict[str, Json] = {
            "started": started.isoformat(),
            "finished": datetime.now(UTC).isoformat(),
            "seconds": round(monotonic() - clock, 3),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "python": platform.python_version(),
        }
        made: dict[str, Made] = {}
        for staging, result, again in zip(stagings, results, resumed, strict=True):
            status: Literal["made", "resumed"] = "resumed" if again else "made"
            manifest = Manifest(staging.spec, staging.seal(), result.stats, provenance)
            artifact = self._commit(staging, manifest, {**result.run, **run, "status": status})
            made[staging.spec.id] = Made(artifact, status)
        return made

    def _commit(self, staging: Staging, manifest: Manifest, run: Mapping[str, Json]) -> Artifact:
        artifact = self._publish(staging.folder, manifest, run)
        atomic.remove_tree(self._staging_folder(artifact.id))
        return artifact

    def _publish(self, made: Path, manifest: Manifest, run: Mapping[str, Json]) -> Artifact:
        """Puts a folder whose files are durable where artifacts are, by one rename, its manifest written last."""
        atomic.replace_file(made / RUN_NAME, canonical_json(run))
        atomic.replace_file(made / MANIFEST_NAME, manifest.to_bytes())
        newest = max(references.committed(self.root), default=(0, ""))[0]
        if (made / MANIFEST_NAME).stat().st_mtime_ns <= newest:  # the clock was set back
            atomic.stamp(made / MANIFEST_NAME, newest + 1)
        folder = self._folder(manifest.spec.id)
        make_durable_folder(self.root, folder.parent)
        if folder.exists():  # superseded, or without a manifest: what is left of a removed artifact
            atomic.rename(folder, made.with_name("replaced"))
        atomic.rename(made, folder)
        return open_folder(folder)

    @contextmanager
    def superseding(self, artifact: Artifact) -> Generator[None]:
        """Within the block an artifact does not count as there: making its spec computes it again and replaces it.

        The old folder stays until the commit, which moves it aside and the new one in its place; after a crash between
        the two, making the spec again commits what is staged.
        """
        self._superseded.add(artifact.manifest_sha256)
        try:
            yield
        finally:
            self._superseded.discard(artifact.manifest_sha256)

    @contextmanager
    def lock(self, artifact_id: str, on_wait: Callable[[], None] | None = None) -> Generator[None]:
        """Holds an id's lock, as whoever makes or mends its artifact does; not twice within one thread."""
        create_root(self.root)
        folder = self.root / ".locks"
        atomic.make_folder(folder)
        with atomic.exclusive_lock(folder / artifact_id, on_wait=on_wait):
            yield

    def _folder(self, artifact_id: str) -> Path:
        return self.root / stage_of(artifact_id) / artifact_id

    def _staging_folder(self, artifact_id: str) -> Path:
        return self.root / ".staging" / artifact_id
