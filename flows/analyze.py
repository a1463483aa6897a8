"""The flow and deployment ``analyze``."""

from typing import Any

from prefect import flow

from flows.parameters import AnalysisNames, Count, Texts
from flows.runs import run_chain
from pipeline.stages import Chain
from pipeline.training import AUTOENCODER_STAGES


@flow(name="analyze")
def analyze(
    preset: str = "demo",
    overrides: Texts = (),
    sae: str | None = None,
    only: AnalysisNames = (),
    companions: Texts = (),
    root: str | None = None,
    threads: Count | None = None,
    device: str = "cpu",
    dask: str | None = None,
    workers: Count | None = None,
    push: bool = False,
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
        dask: a Dask scheduler whose workers share harvest, survey and passes of analyses, tcp://host:8786.
        workers: share them among this many processes of the machine instead.
        push: publish what is made, or was found here, to SPARSEMILL_REMOTE.
    """

    def analyses(chain: Chain) -> None:
        store = chain.workspace.store
        artifact = None if sae is None else store.resolve(sae, stage=AUTOENCODER_STAGES)
        others = [store.resolve(reference, stage=AUTOENCODER_STAGES) for reference in companions]
        chain.report(artifact, only, others)

    return run_chain(
        analyses, preset, overrides, root, threads=threads, device=device, dask=dask, workers=workers, push=push
    )
