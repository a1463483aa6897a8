"""The studies' flows and deployments, each of the study's own name."""

from typing import Any

from prefect import flow

from flows.parameters import Count, Seeds, Texts
from flows.runs import run_chain
from pipeline import studies
from pipeline.studies import Study


@flow(name="cross-seed")
def cross_seed(
    preset: str = "demo",
    overrides: Texts = (),
    sae: str | None = None,
    seeds: Seeds = 2,
    root: str | None = None,
    threads: Count | None = None,
    device: str = "cpu",
    dask: str | None = None,
    workers: Count | None = None,
    push: bool = False,
) -> Any:
    """Trains an autoencoder from other random starts and compares what is found.

    Args:
        preset: a shipped preset's name, or the path of a TOML file.
        overrides: ``stage.field=value`` each, on top of the preset.
        sae: the first autoencoder's id, unique prefix or tag, or ``latest``; the preset's own by default.
        seeds: autoencoders in all, the first one counted.
        root: the artifact store's folder; SPARSEMILL_HOME by default, else ./artifacts.
        threads: CPU threads; torch's own choice by default.
        device: where activations are computed: cpu, cuda, cuda:1...
        dask: a Dask scheduler whose workers share harvest and survey, tcp://host:8786.
        workers: share them among this many processes of the machine instead.
        push: publish what is made, or was found here, to SPARSEMILL_REMOTE.
    """
    study = studies.cross_seed(seeds)
    return _run(
        study, sae, preset, overrides, root, threads=threads, device=device, dask=dask, workers=workers, push=push
    )


@flow(name="orthogonal-rerun")
def orthogonal_rerun(
    preset: str = "demo",
    overrides: Texts = (),
    sae: str | None = None,
    features: tuple[int, ...] = (),
    root: str | None = None,
    threads: Count | None = None,
    device: str = "cpu",
    dask: str | None = None,
    workers: Count | None = None,
    push: bool = False,
) -> Any:
    """Trains an autoencoder anew, its encoder kept orthogonal to the ultra-low direction.

    Args:
        preset: a shipped preset's name, or the path of a TOML file.
        overrides: ``stage.field=value`` each, on top of the preset.
        sae: the first autoencoder's id, unique prefix or tag, or ``latest``; the preset's own by default.
        features: features whose mean encoder the direction is; the ultra-low ones by default.
        root: the artifact store's folder; SPARSEMILL_HOME by default, else ./artifacts.
        threads: CPU threads; torch's own choice by default.
        device: where activations are computed: cpu, cuda, cuda:1...
        dask: a Dask scheduler whose workers share harvest and survey, tcp://host:8786.
        workers: share them among this many processes of the machine instead.
        push: publish what is made, or was found here, to SPARSEMILL_REMOTE.
    """
    study = studies.orthogonal_rerun(features)
    return _run(
        study, sae, preset, overrides, root, threads=threads, device=device, dask=dask, workers=workers, push=push
    )


@flow(name="encoder-sparsity")
def encoder_sparsity(
    preset: str = "demo",
    overrides: Texts = (),
    sae: str | None = None,
    l1: tuple[float, ...] = (),
    l2: tuple[float, ...] = (),
    root: str | None = None,
    threads: Count | None = None,
    device: str = "cpu",
    dask: str | None = None,
    workers: Count | None = None,
    push: bool = False,
) -> Any:
    """Trains an autoencoder anew with penalties on its encoder's weights.

    Args:
        preset: a shipped preset's name, or the path of a TOML file.
        overrides: ``stage.field=value`` each, on top of the preset.
        sae: the first autoencoder's id, unique prefix or tag, or ``latest``; the preset's own by default.
        l1: coefficients of the sum of absolute encoder weights.
        l2: coefficients of the sum of squared ones; three of each kind where neither is given.
        root: the artifact store's folder; SPARSEMILL_HOME by default, else ./artifacts.
        threads: CPU threads; torch's own choice by default.
        device: where activations are computed: cpu, cuda, cuda:1...
        dask: a Dask scheduler whose workers share harvest and survey, tcp://host:8786.
        workers: share them among this many processes of the machine instead.
        push: publish what is made, or was found here, to SPARSEMILL_REMOTE.
    """
    study = studies.encoder_sparsity(l1, l2)
    return _run(
        study, sae, preset, overrides, root, threads=threads, device=device, dask=dask, workers=workers, push=push
    )


@flow(name="site-comparison")
def site_comparison(
    preset: str = "demo",
    overrides: Texts = (),
    sae: str | None = None,
    sites: Texts = (),
    l1_factors: tuple[float, ...] = studies.L1_FACTORS,
    root: str | None = None,
    threads: Count | None = None,
    device: str = "cpu",
    dask: str | None = None,
    workers: Count | None = None,
    push: bool = False,
) -> Any:
    """Trains an autoencoder at other sites of the model, on the same corpus, and compares them at equal L0.

    Args:
        preset: a shipped preset's name, or the path of a TOML file.
        overrides: ``stage.field=value`` each, on top of the preset.
        sae: the first autoencoder's id, unique prefix or tag, or ``latest``; the preset's own by default.
        sites: hook names; by default the MLP's output for its neurons, and the other way round.
        l1_factors: of ``l1_coeff``: the sweep at each site.
        root: the artifact store's folder; SPARSEMILL_HOME by default, else ./artifacts.
        threads: CPU threads; torch's own choice by default.
        device: where activations are computed: cpu, cuda, cuda:1...
        dask: a Dask scheduler whose workers share harvest and survey, tcp://host:8786.
        workers: share them among this many processes of the machine instead.
        push: publish what is made, or was found here, to SPARSEMILL_REMOTE.
    """
    study = studies.site_comparison(sites, l1_factors)
    return _run(
        study, sae, preset, overrides, root, threads=threads, device=device, dask=dask, workers=workers, push=push
    )


def _run(study: Study, sae: str | None, preset: str, overrides: Texts, root: str | None, **runtime: Any) -> Any:
    return run_chain(lambda chain: study.run(chain, sae), preset, overrides, root, **runtime)
