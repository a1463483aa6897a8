"""The flow and deployment ``tokenize``."""

from typing import Any

from prefect import flow

from flows.parameters import Count, Texts
from flows.runs import run_chain
from pipeline.stages import Chain


@flow(name="tokenize")
def tokenize(
    preset: str = "demo",
    overrides: Texts = (),
    root: str | None = None,
    threads: Count | None = None,
    dask: str | None = None,
    workers: Count | None = None,
    push: bool = False,
) -> Any:
    """Tokenizes the preset's corpus into prompts.

    Args:
        preset: a shipped preset's name, or the path of a TOML file.
        overrides: ``stage.field=value`` each, on top of the preset.
        root: the artifact store's folder; SPARSEMILL_HOME by default, else ./artifacts.
        threads: CPU threads; torch's own choice by default.
        dask: a Dask scheduler whose workers encode texts, tcp://host:8786.
        workers: encode them in this many processes of the machine instead.
        push: publish what is made, or was found here, to SPARSEMILL_REMOTE.
    """
    return run_chain(Chain.tokenize, preset, overrides, root, threads=threads, dask=dask, workers=workers, push=push)
