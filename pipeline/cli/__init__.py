"""The command line: the same stages without Prefect, and the artifact store at hand.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done; 1 an error of the work, or 'verify' found
damage; 2 the command line itself was wrong; 130 after Ctrl-C and 143 after SIGTERM (the same command continues where it
stopped).
"""

import json
import sys
from importlib.metadata import version
from typing import Annotated

from cyclopts import App, Group, Parameter

from pipeline.cli.artifacts import artifacts
from pipeline.cli.checkpoints import export, import_checkpoint
from pipeline.cli.options import (
    AFTERWARDS,
    BEFORE,
    DEFAULTS,
    SHARE,
    STAGES,
    AsJson,
    Home,
    PresetName,
    Run,
    Set,
    Threads,
    finish,
    print_table,
    workspace_at,
)
from pipeline.cli.report import report
from pipeline.cli.sharing import explain, pull, push
from pipeline.cli.study import study
from pipeline.config import load_preset, preset_names
from pipeline.interruption import EXIT_ERROR, ending_in_a_line

app = App(
    name="sparsemill",
    help="""Grind a language model's activations into sparse features: tokenize, harvest, train, analyse, share.

    To begin with: 'sparsemill plan demo' says what the demo takes, 'sparsemill replicate' runs it, 'sparsemill report
    open' shows what came out. A run is a preset, and --set stage.field=value on top of it. What is made lies in
    ./artifacts, or where SPARSEMILL_HOME says; what is there is found, not made again, and what was interrupted goes
    on with the same command.
    """,
    version=lambda: version("sparsemill"),
    suppress_keyboard_interrupt=False,  # main() says how to go on
)
app["--help"].group = app["--version"].group = Group.create_ordered("Options")


@app.command(group=STAGES, sort_key=1)
def tokenize(*, run: Run = DEFAULTS) -> None:
    """Cut documents into prompts of token ids.

    For instance: sparsemill tokenize --preset mine.toml --on-bad-document skip.
    """
    from pipeline.summary import warnings

    chain = run.chain()
    artifact = chain.tokenize()
    for warning in warnings(chain):
        chain.workspace.reporter.say(f"  warning: {warning}")
    finish(artifact)


@app.command(group=STAGES, sort_key=2)
def harvest(*, run: Run = DEFAULTS) -> None:
    """Run the language model and store its activations, exactly shuffled; tokenizes first where that is missing.

    For instance: sparsemill harvest --set harvest.encoding=uint8; sparsemill harvest --preset mine.toml --workers 4.
    """
    finish(run.chain().harvest())


@app.command(group=STAGES, sort_key=3)
def train(
    *,
    activations: Annotated[
        str | None, Parameter(help="a harvest, here or s3://.../harvest/ID; the preset's own by default")
    ] = None,
    run: Run = DEFAULTS,
) -> None:
    """Train a sparse autoencoder from stored activations; makes first what is missing upstream.

    For instance: sparsemill train --set train.autoencoder.l1_coeff=0.2; sparsemill train --activations harvest-af2f
    --set train.autoencoder.d_sae=8192.
    """
    chain = run.chain()
    parent = None if activations is None else chain.workspace.store.resolve(activations, stage="harvest")
    finish(chain.train(parent))


@app.command(group=STAGES, sort_key=4)
def analyze(
    sae: str | None = None,
    *,
    only: Annotated[str, Parameter(help="names of analyses, separated by commas; the preset's by default")] = "",
    with_: Annotated[
        tuple[str, ...],
        Parameter(name="--with", negative=(), help="an autoencoder to compare with (cross_seed...); may be repeated"),
    ] = (),
    run: Run = DEFAULTS,
) -> None:
    """Analyse an autoencoder and write the report.

    Each analysis is an artifact: those that are there are found, and a changed option makes that one again.

    For instance: sparsemill analyze latest --only kurtosis,null_space; sparsemill analyze latest --only kurtosis --set
    analyze.options.kurtosis.clip=30; sparsemill analyze latest --only cross_seed --with train-2ab7.

    Args:
        sae: id, unique prefix or tag of an autoencoder, or 'latest'; the preset's own by default.
    """
    from pipeline.training import AUTOENCODER_STAGES

    chain = run.chain()
    store = chain.workspace.store
    artifact = None if sae is None else store.resolve(sae, stage=AUTOENCODER_STAGES)
    others = [store.resolve(reference, stage=AUTOENCODER_STAGES) for reference in with_]
    finish(chain.report(artifact, [name for name in only.split(",") if name], others))


@app.command(group=STAGES, sort_key=5)
def replicate(*, run: Run = DEFAULTS) -> None:
    """Run every stage, from documents to the report; what is there already is found.

    For instance: sparsemill replicate --preset demo-as-published; sparsemill replicate --preset mine.toml.
    """
    from pipeline.summary import print_summary

    chain = run.chain()
    chain.report()
    print_summary(chain)


@app.command(name="plan", group=BEFORE, sort_key=1)
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

    For instance: sparsemill plan post; sparsemill plan mine.toml --set harvest.encoding=uint8 --no-calibration.
    """
    from pipeline.planning.plan import plan
    from pipeline.planning.table import print_plan

    budget = None if memory_gib is None else round(memory_gib * 2**30)
    found, refusal = plan(
        load_preset(preset, set_), workspace_at(threads, home), full_tokens=tokens, calibrated=calibration,
        budget_bytes=budget,
    )  # fmt: skip
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        print_plan(found)
    if refusal is not None:
        raise refusal


@app.command(group=BEFORE, sort_key=2)
def presets(name: str | None = None, *, as_json: AsJson = False) -> None:
    """List the shipped presets, or show one as it resolves: every field that --set can change, with its value.

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
    print_table(["preset", "what it is for"], [[name, text] for name, text in described.items()])


@app.command(group=BEFORE, sort_key=3)
def hooks(model: str = "demo") -> None:
    """List the hooks of a language model: the sites that can be harvested, by harvest.hook_name.

    Args:
        model: 'demo', a folder, a name such as 'gelu-1l' or 'pythia-70m', or a repository of the Hugging Face Hub.
    """
    from pipeline import language_model

    print("\n".join(language_model.load(model).hook_names))


@app.command(group=AFTERWARDS, sort_key=3)
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

    For instance: sparsemill verify harvest-af2f --repair; sparsemill verify s3://bucket/team/harvest/ID.

    Args:
        reference: id, unique prefix, tag, path, 'latest', or URL/STAGE/ID of what a remote has.
    """
    from pipeline.verifying import verify_and_print

    workspace = workspace_at(None, home)
    artifact = workspace.store.resolve(reference)
    mend = repair or rewrite
    if not verify_and_print(artifact, workspace, mend=mend, remote=remote, rewrite=rewrite, as_json=as_json):
        sys.exit(EXIT_ERROR)


app.command(explain, group=BEFORE, sort_key=4)
app.command(study)
app.command(report)
app.command(artifacts)
app.command(push, group=SHARE)
app.command(pull, group=SHARE)
app.command(export, group=SHARE)
app.command(import_checkpoint, name="import", group=SHARE)


def main() -> None:
    """Entry point of ``sparsemill``: turns errors and signals into one line and an exit code."""
    with ending_in_a_line():
        app()
