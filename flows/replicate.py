"""The flow and deployment ``replicate``: every stage, and what ``make demo`` runs (``python -m flows.replicate``)."""

import sys
from typing import Annotated, Any

from cyclopts import App, Parameter
from prefect import flow

from flows.runs import closing_state, open_chain
from pipeline.summary import print_summary
from storage.errors import SparsemillError


@flow(name="replicate")
def replicate(
    preset: str = "demo",
    overrides: list[str] | None = None,
    root: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> Any:
    """Tokenizes, harvests, trains, analyses and reports; what is there already is found.

    Args:
        preset: a shipped preset's name, or the path of a TOML file.
        overrides: ``stage.field=value`` each, on top of the preset.
        root: the artifact store's folder; SPARSEMILL_HOME by default, else ./artifacts.
        threads: CPU threads; torch's own choice by default.
        device: where activations are computed: cpu, cuda, cuda:1...
    """
    chain = open_chain(preset, overrides or [], root, threads, device)
    chain.report()
    print_summary(chain)
    return closing_state(chain)


app = App(name="python -m flows.replicate", help="Run the whole pipeline as a Prefect flow, in this process.")


@app.default
def main(
    *,
    preset: str = "demo",
    overrides: Annotated[list[str] | None, Parameter(name=["--set"])] = None,
    threads: int | None = None,
) -> None:
    """Runs the flow and exits with 1 if it failed.

    Args:
        preset: a shipped preset's name, or the path of a TOML file.
        overrides: stage.field=value, on top of the preset.
        threads: CPU threads; torch's own choice by default.
    """
    try:
        replicate(preset, overrides, threads=threads)
    except SparsemillError as error:
        sys.exit(f"sparsemill: {error}")


if __name__ == "__main__":
    app()
