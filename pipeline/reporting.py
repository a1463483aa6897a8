"""The report stage: findings of one autoencoder, or of several side by side -> a folder of HTML, an artifact."""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from pipeline import analyzing, training
from pipeline.analysis.published import RunFacts, comparison_note, headline_rows, highlights
from pipeline.report import Column, ComparisonInputs, LineageStep, ReportInputs, Section, write_comparison, write_report
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.fingerprint import Json

OUTPUT_VERSION = 2


class _Origin(NamedTuple):
    """Where an autoencoder comes from.

    Attributes:
        sae: itself.
        activations: what it was trained on, or imported with.
        tokens: what these were computed from.
    """

    sae: Artifact
    activations: Artifact | None
    tokens: Artifact | None


def report(title: str, sae: Artifact, findings: Mapping[str, Artifact], workspace: Workspace) -> Made:
    """Makes, or finds, the report on an autoencoder.

    Args:
        title: name of the run, such as the preset's.
        sae: an artifact of ``training.AUTOENCODER_STAGES``.
        findings: its analyses by name, in the report's order.
        workspace: where it happens.
    """
    spec = _spec({"title": title}, {"sae": sae, **findings})

    def produce(staging: Staging) -> Result:
        _stage(staging, write_report(_inputs(title, sae, findings, workspace)))
        return Result({"analyses": list[Json](findings)})

    return workspace.make(spec, produce)


def compare(reports: Sequence[Artifact], matches: Artifact | None, workspace: Workspace) -> Made:
    """Makes, or finds, the report that has several autoencoders side by side.

    Args:
        reports: the report on each, which the new one links to, in order.
        matches: the analysis ``cross_seed`` of the first with the others, where they are of one width.
        workspace: where it happens.
    """
    parents = {f"report_{place:02d}": one for place, one in enumerate(reports, 1)}
    spec = _spec({"title": "compare"}, parents if matches is None else parents | {"cross_seed": matches})

    def produce(staging: Staging) -> Result:
        _stage(staging, write_comparison(_comparison_inputs(reports, matches, workspace)))
        return Result({"reports": [one.id for one in reports]})

    return workspace.make(spec, produce)


def findings_of(made: Artifact, workspace: Workspace) -> dict[str, Artifact]:
    """The analyses that a report shows, by name; those of a comparison have the autoencoder's letter in front."""
    parent = workspace.store.parent
    found = {name: parent(made, name) for name in made.parents if made.parents[name].id.startswith("analyze-")}
    if "analyses" in facts(made):
        found = {name: found[name] for name in facts(made)["analyses"]}  # in the report's order
    reports = [name for name in sorted(made.parents) if name.startswith("report_")]
    for place, role in enumerate(reports):
        theirs = findings_of(parent(made, role), workspace)
        found |= {f"{_letter(place)}-{name}": artifact for name, artifact in theirs.items()}
    return found


def _spec(config: Mapping[str, Json], parents: Mapping[str, Artifact]) -> Spec:
    return Spec(
        "report",
        OUTPUT_VERSION,
        {**config, "version": version("sparsemill")},
        {role: artifact.as_parent() for role, artifact in parents.items()},
    )


def _stage(staging: Staging, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        staging.write_bytes(name, data)


def _inputs(title: str, sae: Artifact, findings: Mapping[str, Artifact], workspace: Workspace) -> ReportInputs:
    origin = _origin(sae, workspace)
    numbers = {name: facts(artifact)["numbers"] for name, artifact in findings.items()}
    run = _run_facts(origin)
    made_by = {"train": f"sparsemill replicate --preset {title}"}
    return ReportInputs(
        title=f"Sparse features of {'the demo model' if run.model == 'demo' else run.model}",
        preset=title,
        facts=_described(origin, run),
        lineage=_lineage(origin),
        sections=[_section(name, artifact, sae) for name, artifact in findings.items()],
        headline=headline_rows(numbers, run),
        note=comparison_note(run) if run.train_tokens else "",
        highlights=highlights(numbers),
        summary=f"A sparse autoencoder on {run.hook_name}, measured as the post measured its own.",
        command=made_by.get(sae.stage, f"sparsemill analyze {sae.id} --preset {title}"),
        version=version("sparsemill"),
    )


def _comparison_inputs(reports: Sequence[Artifact], matches: Artifact | None, workspace: Workspace) -> ComparisonInputs:
    saes = [workspace.store.parent(one, "sae") for one in reports]
    columns: list[Column] = []
    for place, (sae, made) in enumerate(zip(saes, reports, strict=True)):
        origin, findings = _origin(sae, workspace), findings_of(made, workspace)
        run = _run_facts(origin)
        numbers = {name: facts(artifact)["numbers"] for name, artifact in findings.items()}
        columns.append(
            Column(
                letter=_letter(place),
                artifact_id=sae.id,
                report_id=made.id,
                facts=_described(origin, run),
                settings=_flat(training.settings(sae)["config"]),
                headline=headline_rows(numbers, run),
                sections=[_section(name, artifact, sae) for name, artifact in findings.items()],
            )
        )
    return ComparisonInputs(
        columns=columns,
        matches=None if matches is None else _section("cross_seed", matches, saes[0]),
        command=f"sparsemill report compare {' '.join(sae.id for sae in saes)}",
        version=version("sparsemill"),
    )


def _origin(sae: Artifact, workspace: Workspace) -> _Origin:
    if "activations" not in sae.parents:
        return _Origin(sae, None, None)
    activations = workspace.store.parent(sae, "activations")
    return _Origin(sae, activations, workspace.store.parent(activations, "tokens"))


def _run_facts(origin: _Origin) -> RunFacts:
    own = facts(origin.sae)
    stated = own if origin.activations is None else facts(origin.activations)
    return RunFacts(
        model=str(stated["language_model"] or own["language_model_as_named"] or "an unnamed model"),
        hook_name=str(training.settings(origin.sae)["hook_name"]),
        d_in=own["d_in"],
        d_sae=own["d_sae"],
        train_tokens=own["rows_seen"] or 0,
    )


def _described(origin: _Origin, run: RunFacts) -> dict[str, str]:
    described = {"Language model": f"{run.model}, {run.hook_name}, {run.d_in} wide"}
    seen = f"{run.train_tokens:,} rows" if run.train_tokens else "an unknown number of rows"
    if origin.activations is not None and origin.tokens is not None:
        stored, train = facts(origin.activations), facts(origin.tokens)["train"]
        mix = ", ".join(f"{source['share_of_tokens']:.0%} {name}" for name, source in train["sources"].items())
        described["Data"] = f"{train['tokens']:,} tokens: {mix}"
        described["Activations"] = (
            f"{stored['rows']:,} rows in {stored['shards']:,} shards, {origin.activations.config['encoding']}"
        )
        seen += f" ({run.train_tokens / stored['rows']:.3g} epochs)" if origin.sae.stage == "train" else ""
    described["Autoencoder"] = f"{run.d_in} → {run.d_sae:,} features"
    if origin.sae.stage == "train":
        return described | {"Training": f"{facts(origin.sae)['steps']:,} steps on {seen}"}
    return described | {"Training": f"elsewhere, on {seen}; imported from {facts(origin.sae)['format']}"}


def _lineage(origin: _Origin) -> list[LineageStep]:
    own, steps = facts(origin.sae), list[LineageStep]()
    if origin.tokens is not None and origin.activations is not None:
        stored = facts(origin.activations)
        size = f"{math.ceil(stored['activation_bytes'] / 2**20):,} MiB"
        prompts = f"{facts(origin.tokens)['train']['prompts']:,}"
        steps.append(LineageStep("tokenize", origin.tokens.id, {"prompts": prompts}))
        steps.append(LineageStep("harvest", origin.activations.id, {"rows": f"{stored['rows']:,}", "size": size}))
    trained = {"steps": f"{own['steps']:,}", "L0": f"{own['l0']:.1f}"} if origin.sae.stage == "train" else {}
    return [*steps, LineageStep(origin.sae.stage, origin.sae.id, trained or {"format": own["format"]})]


def _section(name: str, artifact: Artifact, sae: Artifact) -> Section:
    others = (f" --with {other}" for other in analyzing.companion_ids(artifact))
    options = artifact.config["options"]
    return Section(
        name=name,
        artifact_id=artifact.id,
        options=options if isinstance(options, Mapping) else {},
        result=analyzing.load_result(artifact),
        command=f"sparsemill analyze {sae.id} --only {name}{''.join(others)}",
    )


def _letter(place: int) -> str:
    return chr(ord("A") + place)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: str(value)}
    return found
