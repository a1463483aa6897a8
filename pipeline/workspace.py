"""Where stages work: the artifact store, the runtime settings and the reporter, opened once and handed down."""

import os
import platform
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from pipeline.config import Runtime
from pipeline.progress import Quiet, Reporter
from pipeline.unfinished import counted
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore, Made, Result, Spec, Staging
from storage.errors import ConfigError, UnsupportedFormat
from storage.fingerprint import Json
from storage.remote import OnBytes, RemoteStore
from storage.transfers import Plan, plan_push, push
from storage.unfinished import note_failure


@dataclass(frozen=True)
class Workspace:
    """One store, one machine, one way to report.

    Attributes:
        runtime: what does not change any content.
        reporter: shows progress.
    """

    runtime: Runtime
    reporter: Reporter

    @staticmethod
    def open(runtime: Runtime | None = None, reporter: Reporter | None = None) -> "Workspace":
        """Opens a workspace and sets torch's thread count.

        Raises:
            ConfigError: there is no such device, or no remote to publish to.
        """
        runtime = Runtime() if runtime is None else runtime
        _check_device(runtime.device)
        if runtime.push and not runtime.remote:
            raise ConfigError("there is nowhere to push to", remedy="set SPARSEMILL_REMOTE to the URL of the remote")
        if runtime.threads is not None:
            import torch  # second only to what a stage computes in what it costs: those who look at a store need none

            torch.set_num_threads(runtime.threads)
        return Workspace(runtime, Quiet() if reporter is None else reporter)

    @cached_property
    def store(self) -> ArtifactStore:
        """The artifact store below ``runtime.root``, and behind it the team's remote."""
        remote = RemoteStore(self.runtime.remote) if self.runtime.remote else None
        return ArtifactStore(self.runtime.root, remote=remote, track=self.track_bytes)

    @contextmanager
    def track_bytes(self, label: str, total_bytes: int) -> Generator[OnBytes]:
        """Shows the progress of bytes that move; see ``storage.transfers.Track``."""
        with self.reporter.track(label, total_bytes, "bytes") as advance:
            yield lambda n_bytes: advance(n_bytes)

    def make(
        self, spec: Spec, produce: Callable[[Staging], Result], *, provenance: Mapping[str, Json] | None = None
    ) -> Made:
        """Finds the artifact of a spec, or makes it, with what computes it on record.

        Args:
            spec: the question.
            produce: stages its files.
            provenance: what its bytes depend on beside the spec; :meth:`provenance` by default.
        """
        return self.make_together([spec], lambda stagings: [produce(stagings[0])], provenance=provenance)[0]

    def make_together(
        self,
        specs: Sequence[Spec],
        produce: Callable[[Sequence[Staging]], Sequence[Result]],
        *,
        provenance: Mapping[str, Json] | None = None,
    ) -> list[Made]:
        """As :meth:`make`, for artifacts that one pass can make together; see ``ArtifactStore.make_together``.

        What the team's remote has counts as found; its files come when something reads them.
        """
        on_record = self.provenance() if provenance is None else provenance

        def produce_and_tell(stagings: Sequence[Staging]) -> Sequence[Result]:
            for staging in stagings:
                self._tell_begin(staging)
            try:
                return produce(stagings)
            except Exception as error:
                for staging in stagings:
                    note_failure(self.store.root, staging.spec.id, error)
                raise

        made = self.store.make_together(specs, produce_and_tell, on_record, self._say_waiting)
        for artifact in (one.artifact for one in made):
            if artifact.origin is not None and self.store.remote is not None:
                self.reporter.say(f"  {artifact.id} is in {self.store.remote.shown}; files come as they are read")
            elif self.runtime.push and self.store.remote is not None:
                self.push(artifact, self.store.remote)
        return made

    def push(self, artifact: Artifact, remote: RemoteStore) -> Plan:
        """Pushes an artifact of this store, if it is not there; returns what that was."""
        plan = plan_push(artifact, remote)
        if plan.there:
            push(plan, remote)  # moves nothing
        else:
            with self.track_bytes(f"push {artifact.id}", plan.bytes) as advance:
                push(plan, remote, advance)
        return plan

    def _tell_begin(self, staging: Staging) -> None:
        note_failure(self.store.root, staging.spec.id, None)
        for unit in staging.dropped:
            self.reporter.say(f"  warning: {unit} of the interrupted run is damaged; going on without it")
        if staging.finished:
            kept = counted(staging.spec, staging.finished)
            self.reporter.say(f"  resuming {staging.spec.id}: {kept} are there from the run before")

    def _say_waiting(self) -> None:
        self.reporter.say("  another process is making it: waiting for that one")

    def provenance(self, *, threads: int | None = None) -> dict[str, Json]:
        """What equal bytes of arithmetic depend on: device, instruction set, versions, threads.

        Args:
            threads: of the arithmetic, where that is not the number in use.
        """
        import torch

        on_cpu = self.runtime.device == "cpu"
        return {
            "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "threads": threads or self.threads,
        }

    @property
    def threads(self) -> int:
        """CPU threads in use."""
        import torch

        return self.runtime.threads or torch.get_num_threads() or os.cpu_count() or 1


def _check_device(name: str) -> None:
    if name == "cpu":
        return
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError("not a device", found=name, expected="cpu, cuda, or cuda:0, cuda:1, ...") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise ConfigError("no such device on this machine", found=name, expected=f"cpu, or one of {count} CUDA devices")


def require_version(artifact: Artifact, version: int) -> None:
    """Refuses an artifact that another version of its stage wrote, before anything of it is taken for what it is not.

    Raises:
        UnsupportedFormat: its output version is not ``version``.
    """
    if artifact.spec.version != version:
        raise UnsupportedFormat(
            f"a {artifact.stage} artifact of another output version", where=artifact.id,
            found=f"version {artifact.spec.version}", expected=version,
            remedy=f"run {artifact.stage} again: the same command makes the artifact of this version",
        )  # fmt: skip


def facts(artifact: Artifact) -> dict[str, Any]:
    """The figures of an artifact's manifest, for a reader that knows the stage that wrote them."""
    return cast("dict[str, Any]", artifact.stats)
