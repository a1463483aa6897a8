"""The command line: the same stages without Prefect, and the artifact store at hand.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done; 1 an error of the work, or 'verify' found
damage; 2 the command line itself was wrong; 130 interrupted (the same command continues where it stopped).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from pipeline.config import Runtime, load_preset, preset_names
from pipeline.progress import for_stderr
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace
from storage.artifact import Artifact
from storage.errors import SparsemillError

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130

Set = Annotated[
    tuple[str, ...],
    Parameter(name="--set", negative=(), help="stage.field=value, on top of the preset; may be repeated"),
]
Threads = Annotated[int | None, Parameter(help="CPU threads; torch's own choice by default")]
Home = Annotated[Path | None, Parameter(help="the artifact store; SPARSEMILL_HOME by default, else ./artifacts")]
PresetName = Annotated[str, Parameter(help="a shipped preset (see 'sparsemill presets') or a TOML file")]
AsJson = Annotated[bool, Parameter(name="--json", negative=(), help="print JSON")]


@Parameter(name="*")
@dataclass(frozen=True)
class Run:
    """What the commands that run stages have in common.

    Attributes:
        preset: what to run.
        set_: overrides.
        threads: of torch and numba.
        device: where activations are computed.
        home: the artifact store's folder.
    """

    preset: PresetName = "demo"
    set_: Set = ()
    threads: Threads = None
    device: Annotated[str, Parameter(help="where activations are computed: cpu, cuda, cuda:1...")] = "cpu"
    home: Home = None

    def chain(self) -> Chain:
        """The chain of stages that the options ask for."""
        workspace = _workspace(self.threads, self.home, self.device)
        return Chain(load_preset(self.preset, self.set_), workspace, run_directly)


_DEFAULTS = Run()

app = App(
    name="sparsemill",
    help="Grind a language model's activations into sparse features: tokenize, harvest, train, analyse, share.",
    suppress_keyboard_interrupt=False,  # main() says how to go on
)
artifacts = App(name="artifacts", help="Look at what is in the artifact store.")
app.command(artifacts)


@app.command
def tokenize(*, run: Run = _DEFAULTS) -> None:
    """Cut documents into prompts of token ids."""
    _finish(run.chain().tokenize())


@app.command
def harvest(*, run: Run = _DEFAULTS) -> None:
    """Run the language model and store its activations, exactly shuffled; tokenizes first where that is missing."""
    _finish(run.chain().harvest())


@app.command
def train(*, run: Run = _DEFAULTS) -> None:
    """Train a sparse autoencoder from stored activations; makes first what is missing upstream."""
    _finish(run.chain().train())


@app.command
def analyze(
    sae: str | None = None,
    *,
    only: Annotated[str, Parameter(help="names of analyses, separated by commas; the preset's by default")] = "",
    run: Run = _DEFAULTS,
) -> None:
    """Analyse an autoencoder and write the report.

    Args:
        sae: id, unique prefix or tag of an autoencoder, or 'latest'; the preset's own by default.
    """
    chain = run.chain()
    artifact = None if sae is None else chain.workspace.store.resolve(sae, stage="train")
    _finish(chain.report(artifact, [name for name in only.split(",") if name]))


@app.command
def replicate(*, run: Run = _DEFAULTS) -> None:
    """Run every stage, from documents to the report; what is there already is found."""
    from pipeline.summary import print_summary

    chain = run.chain()
    chain.report()
    print_summary(chain)


@app.command(name="plan")
def plan_run(
    preset: PresetName = "demo",
    *,
    set_: Set = (),
    tokens: Annotated[int, Parameter(help="tokens of the full run put beside the preset's own")] = 2_000_000_000,
    calibration: Annotated[bool, Parameter(help="measure this machine for some seconds, to tell times")] = True,
    memory_gib: Annotated[
        float | None, Parameter(help="memory that a stage may hold in all; what the machine has left by default")
    ] = None,
    threads: Threads = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a run would be, before anything is made: rows, bytes, shards, files, memory, mixing, time.

    The preset's own run stands beside a full one of --tokens. A run that does not fit the disk, or the memory, is
    refused with exit code 1, naming the settings that would fit and what each needs. Nothing is made; a calibration
    writes a temporary folder beside the artifacts and removes it.
    """
    from pipeline.planning.plan import plan
    from pipeline.planning.table import print_plan

    budget = None if memory_gib is None else round(memory_gib * 2**30)
    found, refusal = plan(
        load_preset(preset, set_), _workspace(threads, home), full_tokens=tokens, calibrated=calibration,
        budget_bytes=budget,
    )  # fmt: skip
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        print_plan(found)
    if refusal is not None:
        raise refusal


@app.command
def presets(name: str | None = None, *, as_json: AsJson = False) -> None:
    """List the shipped presets, or show one as it resolves.

    Args:
        name: the preset to show.
    """
    if name is not None:
        print(load_preset(name).model_dump_json(indent=2))
        return
    described = {name: load_preset(name).description for name in preset_names()}
    if as_json:
        print(json.dumps(described, indent=2))
        return
    _print_table(["preset", "what it is for"], [[name, text] for name, text in described.items()])


@app.command
def hooks(model: str = "demo") -> None:
    """List the hooks of a language model.

    Args:
        model: 'demo', a folder, or a name such as 'gelu-1l'.
    """
    from pipeline import language_model

    print("\n".join(language_model.load(model).hook_names))


@artifacts.command(name="ls")
def list_artifacts(stage: str | None = None, *, home: Home = None, as_json: AsJson = False) -> None:
    """List artifacts, newest first.

    Args:
        stage: only those of one stage: tokenize, harvest, train, analyze or report.
    """
    found = _workspace(None, home).store.list(stage)
    if as_json:
        print(json.dumps([_described(artifact) for artifact in found], indent=2))
        return
    rows = [
        [artifact.id, _size(artifact.manifest.total_bytes), str(len(artifact.manifest.files))] for artifact in found
    ]
    _print_table(["artifact", "size", "files"], rows)


@artifacts.command
def show(reference: str, *, home: Home = None) -> None:
    """Print an artifact's config, parents, stats and place as JSON.

    Args:
        reference: id, unique prefix, tag, or a stage's name for its latest.
    """
    artifact = _workspace(None, home).store.resolve(reference)
    detail = {"config": artifact.config, "stats": artifact.stats, "provenance": artifact.manifest.provenance}
    print(json.dumps(_described(artifact) | detail, indent=2, default=str))


@app.command
def verify(
    reference: str,
    *,
    repair: Annotated[bool, Parameter(negative=(), help="mend what is damaged, then check again")] = False,
    remote: Annotated[str | None, Parameter(help="where committed files may be fetched; SPARSEMILL_REMOTE")] = None,
    rewrite: Annotated[
        bool,
        Parameter(negative=(), help="repair; a harvest that cannot be mended is made again, with other bytes"),
    ] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Check every file's size and sha256, and every chunk's crc32c; exit code 1 if any differs.

    Args:
        reference: id, unique prefix, tag or path.
    """
    from pipeline.verifying import verify_and_print

    workspace = _workspace(None, home)
    artifact = workspace.store.resolve(reference)
    mend = repair or rewrite
    if not verify_and_print(artifact, workspace, mend=mend, remote=remote, rewrite=rewrite, as_json=as_json):
        sys.exit(EXIT_ERROR)


@artifacts.command
def tag(name: str, reference: str, *, home: Home = None) -> None:
    """Give an artifact a name that stays with it.

    Args:
        name: the tag.
        reference: id, unique prefix or another tag.
    """
    store = _workspace(None, home).store
    artifact = store.resolve(reference)
    store.tag(name, artifact)
    print(f"{name} -> {artifact.id}")


@artifacts.command
def lineage(reference: str, *, home: Home = None) -> None:
    """Print what an artifact was made from, back to the tokens.

    Args:
        reference: id, unique prefix or tag.
    """
    store = _workspace(None, home).store

    def walk(artifact: Artifact, role: str, depth: int) -> None:
        print(f"{'  ' * depth}{role}{artifact.id}")
        for parent_role in artifact.parents:
            walk(store.parent(artifact, parent_role), f"{parent_role}: ", depth + 1)

    walk(store.resolve(reference), "", 0)


def main() -> None:
    """Entry point of ``sparsemill``: turns errors into one line and an exit code."""
    try:
        app()
    except SparsemillError as error:
        print(f"sparsemill: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        print("sparsemill: interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _workspace(threads: int | None, home: Path | None, device: str = "cpu") -> Workspace:
    runtime = Runtime(threads=threads, device=device)
    return Workspace.open(runtime if home is None else runtime.model_copy(update={"root": home}), for_stderr())


def _finish(artifact: Artifact) -> None:
    print(artifact.id)
    if artifact.stage == "report":
        print(artifact.folder / "index.html")


def _described(artifact: Artifact) -> dict[str, Any]:
    return {
        "id": artifact.id,
        "stage": artifact.stage,
        "folder": str(artifact.folder),
        "bytes": artifact.manifest.total_bytes,
        "files": len(artifact.manifest.files),
        "manifest_sha256": artifact.manifest_sha256,
        "parents": {role: parent.id for role, parent in artifact.parents.items()},
    }


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


if __name__ == "__main__":
    main()
