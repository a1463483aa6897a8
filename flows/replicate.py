"""The flow and deployment ``replicate``: every stage, and what ``make demo`` runs (``python -m flows.replicate``)."""

from typing import Annotated, Any

from cyclopts import App, Parameter
from prefect import flow

from flows.parameters import Count, Texts
from flows.runs import run_chain
from pipeline.interruption import ending_in_a_line
from pipeline.stages import Chain
from pipeline.summary import print_summary


@flow(name="replicate")
def replicate(
    preset: str = "demo",
    overrides: Texts = (),
    root: str | None = None,
    threads: Count | None = None,
    device: str = "cpu",
    dask: str | None = None,
    workers: Count | None = None,
    push: bool = False,
) -> Any:
    """Tokenizes, harvests, trains, analyses and reports; what is there already is found.

    Args:
        preset: a shipped preset's name, or the path of a TOML file.
        overrides: ``stage.field=value`` each, on top of the preset.
        root: the artifact store's folder; SPARSEMILL_HOME by default, else ./artifacts.
        threads: CPU threads; torch's own choice by default.
        device: where activations are computed: cpu, cuda, cuda:1...
        dask: a Dask scheduler whose workers share tokenizing, harvest and survey, tcp://host:8786.
        workers: share them among this many processes of the machine instead.
        push: publish what is made, or was found here, to SPARSEMILL_REMOTE.
    """

    def everything(chain: Chain) -> None:
        chain.report()
        print_summary(chain)

    return run_chain(
        everything, preset, overrides, root, threads=threads, device=device, dask=dask, workers=workers, push=push
    )


app = App(name="python -m flows.replicate", help="Run the whole pipeline as a Prefect flow, in this process.")


@app.default
def main(
    *,
    preset: str = "demo",
    overrides: Annotated[Texts, Parameter(name=["--set"], negative=())] = (),
    threads: int | None = None,
) -> None:
    """Runs the flow; exits with 1 if it failed, with 130 after Ctrl-C and 143 after SIGTERM.

    Args:
        preset: a shipped preset's name, or the path of a TOML file.
        overrides: stage.field=value, on top of the preset.
        threads: CPU threads; torch's own choice by default.
    """
    with ending_in_a_line():
        replicate(preset, overrides, threads=threads)


if __name__ == "__main__":
    app()
