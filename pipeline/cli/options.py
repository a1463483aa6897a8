"""What the commands have in common: options, where they work, how results are printed.

Commands import what computes when they run: with torch it takes seconds, which --help and a look at a store need not.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.config import Runtime, load_preset, validate
from pipeline.progress import for_stderr
from pipeline.workspace import Workspace
from storage.artifact import Artifact

if TYPE_CHECKING:
    from pipeline.stages import Chain

BEFORE = Group.create_ordered("Before a run")
STAGES = Group.create_ordered("Run")
AFTERWARDS = Group.create_ordered("Afterwards")
SHARE = Group.create_ordered("Share")
"""Groups of commands in the help, in the order in which they are listed there."""

_COMMON = Group.create_ordered("Which run, and where (the same for all commands that run stages)")

_WIDER_THAN_ANY = 1_000_000

Set = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set", negative=(), show_default=False, help="stage.field=value, on top of the preset; may be repeated"
    ),
]
Threads = Annotated[int | None, Parameter(help="CPU threads; torch's own choice by default")]
Home = Annotated[Path | None, Parameter(help="the artifact store; SPARSEMILL_HOME by default, else ./artifacts")]
PresetName = Annotated[str, Parameter(help="a shipped preset (see 'sparsemill presets') or a TOML file")]
AsJson = Annotated[bool, Parameter(name="--json", negative=(), help="print JSON")]


@Parameter(name="*", group=_COMMON)
@dataclass(frozen=True)
class Run:
    """What the commands that run stages have in common.

    Attributes:
        preset: what to run.
        set_: overrides.
        threads: of torch and numba.
        device: where the language model runs and the autoencoder is trained.
        home: the artifact store's folder.
        tensorboard: folder for a training's TensorBoard events.
        push: whether artifacts are published.
        dask: address of a scheduler.
        workers: processes of a cluster on this machine.
        on_bad_document: overrides ``tokenize.on_bad_document``.
    """

    preset: PresetName = "demo"
    set_: Set = ()
    threads: Threads = None
    device: Annotated[str, Parameter(help="where the model runs and training happens: cpu, cuda, cuda:1...")] = "cpu"
    home: Home = None
    tensorboard: Annotated[Path | None, Parameter(help="folder for TensorBoard events of a training")] = None
    push: Annotated[
        bool, Parameter(negative=(), help="publish what is made, or was found here, to SPARSEMILL_REMOTE")
    ] = False
    dask: Annotated[
        str | None,
        Parameter(
            help="a Dask scheduler whose workers share tokenizing, harvest, survey and analyses: tcp://host:8786"
        ),
    ] = None
    workers: Annotated[int | None, Parameter(help="share them among this many processes of this machine")] = None
    on_bad_document: Annotated[
        Literal["stop", "skip"] | None,
        Parameter(help="what tokenize does with one: stop with file and line, or skip and count; the preset's choice"),
    ] = None

    def chain(self) -> "Chain":
        """The chain of stages that the options ask for."""
        from pipeline.stages import Chain, run_directly

        workspace = workspace_at(
            self.threads, self.home, device=self.device, tensorboard=self.tensorboard, push=self.push,
            dask=self.dask, workers=self.workers,
        )  # fmt: skip
        more = [] if self.on_bad_document is None else [f"tokenize.on_bad_document={self.on_bad_document}"]
        return Chain(load_preset(self.preset, [*self.set_, *more]), workspace, run_directly)


DEFAULTS = Run()
"""A run of the demo preset, where it lies by default."""


def workspace_at(threads: int | None, home: Path | None, **settings: Any) -> Workspace:
    """Where a command works, with progress on stderr; further settings are fields of ``Runtime``."""
    runtime = validate(Runtime, {"threads": threads, **settings}, where="the command line")
    return Workspace.open(runtime if home is None else runtime.model_copy(update={"root": home}), for_stderr())


def finish(artifact: Artifact) -> None:
    """Prints an artifact's id, and a report's page."""
    print(artifact.id)
    if artifact.stage == "report":
        artifact.fetch()
        print(artifact.folder / "index.html")


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table to stdout; only on a terminal a row that is too long for it is folded, in its last column."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column != columns[-1])
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    if not console.is_terminal:
        console.width = _WIDER_THAN_ANY
    console.print(table)
