"""The flow and deployment ``train``."""

from typing import Any

from prefect import flow

from flows.parameters import Count, Texts
from flows.runs import run_chain
from pipeline.stages import Chain


@flow(name="train")
def train(
    preset: str = "demo",
    overrides: Texts = (),
    root: str | None = None,
    threads: Count | None = None,
    device: str = "cpu",
    dask: str | None = None,
    workers: Count | None = None,
    push: bool = False,
) -> Any:
    """Trains an autoencoder from the shards; makes first what is missing upstream.

    Args:
        preset: a shipped preset's name, or the path of a TOML file.
        overrides: ``stage.field=value`` each, on top of the preset.
        root: the artifact store's folder; SPARSEMILL_HOME by default, else ./artifacts.
        threads: CPU threads; torch's own choice by default.
        device: where activations are computed: cpu, cuda, cuda:1...
        dask: a Dask scheduler whose workers share a harvest that is missing, tcp://host:8786.
        workers: share them among this many processes of the machine instead.
        push: publish what is made, or was found here, to SPARSEMILL_REMOTE.
    """
    return run_chain(
        Chain.train, preset, overrides, root, threads=threads, device=device, dask=dask, workers=workers, push=push
    )
