"""The flow and deployment ``train``."""

from typing import Any

from prefect import flow

from flows.runs import closing_state, open_chain


@flow(name="train")
def train(
    preset: str = "demo",
    overrides: list[str] | None = None,
    root: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> Any:
    """Trains an autoencoder from the shards; makes first what is missing upstream.

    Args:
        preset: a shipped preset's name, or the path of a TOML file.
        overrides: ``stage.field=value`` each, on top of the preset.
        root: the artifact store's folder; SPARSEMILL_HOME by default, else ./artifacts.
        threads: CPU threads; torch's own choice by default.
        device: where activations are computed: cpu, cuda, cuda:1...
    """
    chain = open_chain(preset, overrides or [], root, threads, device)
    chain.train()
    return closing_state(chain)
