"""The flow and deployment ``analyze``."""

from typing import Any

from prefect import flow

from flows.runs import closing_state, open_chain
from pipeline.training import AUTOENCODER_STAGES


@flow(name="analyze")
def analyze(
    preset: str = "demo",
    overrides: list[str] | None = None,
    sae: str | None = None,
    only: list[str] | None = None,
    companions: list[str] | None = None,
    root: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> Any:
    """Analyses an autoencoder and writes the report.

    Args:
        preset: a shipped preset's name, or the path of a TOML file.
        overrides: ``stage.field=value`` each, on top of the preset.
        sae: a trained autoencoder's id, unique prefix or tag, or ``latest``; the preset's own by default.
        only: names of analyses; the preset's by default.
        companions: autoencoders to compare with, for analyses that do (``cross_seed``...).
        root: the artifact store's folder; SPARSEMILL_HOME by default, else ./artifacts.
        threads: CPU threads; torch's own choice by default.
        device: where activations are computed: cpu, cuda, cuda:1...
    """
    chain = open_chain(preset, overrides or [], root, threads, device)
    store = chain.workspace.store
    artifact = None if sae is None else store.resolve(sae, stage=AUTOENCODER_STAGES)
    others = [store.resolve(reference, stage=AUTOENCODER_STAGES) for reference in companions or ()]
    chain.report(artifact, only or (), others)
    return closing_state(chain)
