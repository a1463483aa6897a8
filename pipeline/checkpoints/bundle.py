"""A folder to publish: an autoencoder, what was found about it, and what it was made from; equal bytes each time.

    README.md                   a card: figures, how to load it; its head is what the Hub reads
    autoencoder.safetensors     weights, and config.json (pipeline.checkpoints.plain, which also reads the folder)
    densities.safetensors       where densities were measured
    features.parquet            the feature table, a row a feature
    report/                     the report, to open in a browser
    lineage/<id>.json           the manifest of every artifact it was made from, with its provenance
    checksums.sha256            of all files, for 'sha256sum --check'

Everything comes from committed artifacts, whose hashes are compared on the way; there is no clock in it. Manifests name
sources and models by hashes and by the names they were given. Text of the corpus is in the report's examples alone.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCardData

from pipeline import reporting, training
from pipeline.checkpoints import plain
from pipeline.checkpoints.exporting import checkpoint_files, require_empty, write_folder
from pipeline.model_files import HUB_NAMES
from pipeline.sharing import lineage
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.errors import InputError

CARD, FEATURES = "README.md", "features.parquet"
_REPORTS_TABLE = "tables/features.parquet"
_LOADING = """
`feature_acts = relu({x} @ W_enc + b_enc)` and `sae_out = feature_acts @ W_dec + b_dec`, for x the activations at
`{hook_name}`:

```python
import torch
from safetensors.torch import load_file

sae = load_file("autoencoder.safetensors")  # W_enc (d_in, d_sae), b_enc, W_dec (d_sae, d_in), b_dec
feature_acts = torch.relu({x_in_code} @ sae["W_enc"] + sae["b_enc"])
sae_out = feature_acts @ sae["W_dec"] + sae["b_dec"]
```

With sparsemill, from this folder or from the Hub (`hf://OWNER/NAME`), every analysis runs on it again:

```
sparsemill import FOLDER --activations HARVEST    # or --model, for what needs no activations
```
"""
_FILES = {
    plain.WEIGHTS: "weights, float32",
    plain.CONFIG: "site, language model, and the settings it was trained with",
    plain.DENSITIES: "`density`: the fraction of tokens on which each feature fires",
    FEATURES: "what the analyses say of each feature, a row a feature",
    "report/": "the report: open `report/index.html`",
    "lineage/": "manifests of all it was made from: configs, hashes, figures, versions",
    plain.CHECKSUMS: "`sha256sum --check` compares all files",
}


def export_bundle(reference: Artifact, folder: Path, workspace: Workspace) -> list[Path]:
    """Writes a folder to publish.

    Args:
        reference: the report on an autoencoder; or the autoencoder, where there is just one report on it.
        folder: new, or empty.
        workspace: where reports and parents are looked for.

    Returns:
        The files written.

    Raises:
        InputError: there is no report, or there are several; or the folder is not empty.
        CorruptArtifact: a file is not as it was committed.
    """
    require_empty(folder)
    report = _report_on(reference, workspace)
    sae = workspace.store.parent(report, "sae")
    files = checkpoint_files(sae, plain.NAME, reporting.findings_of(report, workspace).get("density"), workspace)
    files |= {f"report/{name}": report.read_bytes(name) for name in sorted(report.manifest.files)}
    if _REPORTS_TABLE in report.manifest.files:
        files[FEATURES] = report.read_bytes(_REPORTS_TABLE)
    chain = lineage(report, workspace.store)
    files |= {f"lineage/{one.id}.json": one.manifest.to_bytes() for one in chain}
    files[CARD] = _card(sae, report, chain, files, workspace).encode()
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    files[plain.CHECKSUMS] = "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()
    return write_folder(folder, files)


def is_bundle(folder: Path) -> bool:
    """Whether a folder is one of these."""
    return all((folder / name).is_file() for name in (CARD, plain.CONFIG, plain.WEIGHTS, plain.CHECKSUMS))


def bundle_files(folder: Path) -> dict[str, Path]:
    """The files of a bundle by name, each compared with its checksum.

    Raises:
        InputError: a file is missing or another.
    """
    names = plain.check(folder)
    return {name: folder / name for name in (*names, plain.CHECKSUMS)}


def _report_on(reference: Artifact, workspace: Workspace) -> Artifact:
    if reference.stage == "report":
        if "sae" not in reference.parents:
            raise InputError("a comparison is of several autoencoders: a bundle is of one", found=reference.id)
        return reference
    reports = [one for one in workspace.store.list("report") if one.parents.get("sae") == reference.as_parent()]
    if not reports:
        raise InputError(
            "there is no report on the autoencoder", where=reference.id, remedy=f"sparsemill analyze {reference.id}"
        )
    if len(reports) > 1:
        raise InputError(
            "there are several reports on the autoencoder", where=reference.id,
            found=", ".join(sorted(one.id for one in reports)), remedy="name the report instead",
        )  # fmt: skip
    return reports[0]


def _card(
    sae: Artifact, report: Artifact, chain: list[Artifact], files: Mapping[str, bytes], workspace: Workspace
) -> str:
    said, own = training.settings(sae), facts(sae)
    stated = workspace.store.parent(sae, "activations") if "activations" in sae.parents else sae
    model = str(facts(stated)["language_model"] or own["language_model_as_named"])
    folders = {name.partition("/")[0] + "/" for name in files if "/" in name}
    rows = "".join(
        f"| `{name}` | {what} |\n"
        for name, what in _FILES.items()
        if name in files or name in folders or name == plain.CHECKSUMS
    )
    made_from = "".join(f"- `{one.id}`\n" for one in chain if one.stage not in {"analyze", "survey", "report"})
    x, x_in_code = ("(x - b_dec)", '(x - sae["b_dec"])') if said["autoencoder"]["subtract_b_dec"] else ("x", "x")
    loading = _LOADING.format(x=x, x_in_code=x_in_code, hook_name=said["hook_name"])
    return (
        f"---\n{_head(model, chain)}\n---\n"
        f"# Sparse autoencoder on {model}, {said['hook_name']}\n\n"
        f"{own['d_sae']:,} features of {own['d_in']:,} activations: `{sae.id}`, made by sparsemill.\n\n"
        f"## Figures\n\n{reporting.headline_markdown(report, workspace)}\n"
        f"## Loading\n{loading}\n"
        f"## Files\n\n| | |\n| --- | --- |\n{rows}\n"
        f"## Made from\n\n{made_from}"
    )


def _head(model: str, chain: list[Artifact]) -> str:
    """What the Hub reads of a card; the model and the data only where the Hub has them."""
    base = HUB_NAMES.get(model) or (model if model.count("/") == 1 and not Path(model).exists() else None)
    sources = [source for one in chain if one.stage == "tokenize" for source in cast("Any", one.config["sources"])]
    data = ModelCardData(
        library_name="sparsemill",
        tags=["sparse-autoencoder", "interpretability", "sparsemill"],
        base_model=base,
        datasets=sorted({source["data_set"] for source in sources if "data_set" in source}) or None,
    )
    return data.to_yaml().strip()
