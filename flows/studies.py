"""The studies' flows and deployments, each of the study's own name."""

from typing import Any

from prefect import flow

from flows.runs import closing_state, open_chain
from pipeline import studies
from pipeline.studies import Study


@flow(name="cross-seed")
def cross_seed(
    preset: str = "demo",
    overrides: list[str] | None = None,
    sae: str | None = None,
    seeds: int = 2,
    root: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
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
    """
    return _run(studies.cross_seed(seeds), preset, overrides, sae, root, threads, device)


@flow(name="orthogonal-rerun")
def orthogonal_rerun(
    preset: str = "demo",
    overrides: list[str] | None = None,
    sae: str | None = None,
    features: list[int] | None = None,
    root: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
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
    """
    return _run(studies.orthogonal_rerun(features or ()), preset, overrides, sae, root, threads, device)


@flow(name="encoder-sparsity")
def encoder_sparsity(
    preset: str = "demo",
    overrides: list[str] | None = None,
    sae: str | None = None,
    l1: list[float] | None = None,
    l2: list[float] | None = None,
    root: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
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
    """
    return _run(studies.encoder_sparsity(l1 or (), l2 or ()), preset, overrides, sae, root, threads, device)


@flow(name="site-comparison")
def site_comparison(
    preset: str = "demo",
    overrides: list[str] | None = None,
    sae: str | None = None,
    sites: list[str] | None = None,
    l1_factors: list[float] | None = None,
    root: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
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
    """
    study = studies.site_comparison(sites or (), l1_factors or studies.L1_FACTORS)
    return _run(study, preset, overrides, sae, root, threads, device)


def _run(
    study: Study,
    preset: str,
    overrides: list[str] | None,
    sae: str | None,
    root: str | None,
    threads: int | None,
    device: str,
) -> Any:
    chain = open_chain(preset, overrides or [], root, threads, device)
    study.run(chain, sae)
    return closing_state(chain)
