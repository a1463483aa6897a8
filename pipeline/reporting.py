"""The report stage: findings of one autoencoder, or of several side by side -> a folder of HTML, an artifact."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from typing import Any, NamedTuple

from pipeline import analyzing, commands, training
from pipeline.analysis import ANALYSES
from pipeline.analysis.post import RunFacts
from pipeline.analysis.published import Numbers, comparison_note, headline_rows, highlights
from pipeline.report import Column, ComparisonInputs, LineageStep, ReportInputs, Section, write_comparison, write_report
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.fingerprint import Json

OUTPUT_VERSION = 3


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
        findings: its analyses by name; the report has them in the registry's order.
        workspace: where it happens.
    """
    findings = _in_order(findings)
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
    """The analyses that a report shows, in its order; those of a comparison have the autoencoder's letter in front."""
    parent = workspace.store.parent
    analyses = [name for name, one in made.parents.items() if one.id.startswith("analyze-")]
    found = _in_order({name: parent(made, name) for name in analyses})
    reports = [name for name in sorted(made.parents) if name.startswith("report_")]
    for place, role in enumerate(reports):
        theirs = findings_of(parent(made, role), workspace)
        found |= {f"{_letter(place)}-{name}": artifact for name, artifact in theirs.items()}
    return found


def headline_markdown(made: Artifact, workspace: Workspace) -> str:
    """The headline table of a report on one autoencoder, as Markdown.

    Args:
        made: the report.
        workspace: where its parents are.
    """
    numbers, run = _measured(findings_of(made, workspace), _origin(workspace.store.parent(made, "sae"), workspace))
    rows = [("quantity", "this run", "the post", "comparable"), ("---",) * 4]
    for row in headline_rows(numbers, run):
        comparable = f"{'yes' if row.comparable else 'no'}: {row.why}"
        rows.append((row.quantity, row.here, row.post, comparable))
    return "".join(f"| {' | '.join(escape(cell).replace('|', '&#124;') for cell in row)} |\n" for row in rows)


def _in_order(findings: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """Analyses in the registry's order; those that it no longer has come last, by name."""
    places = {name: place for place, name in enumerate(ANALYSES)}
    return dict(sorted(findings.items(), key=lambda item: (places.get(item[0], len(places)), item[0])))


def _measured(findings: Mapping[str, Artifact], origin: _Origin) -> tuple[dict[str, Numbers], RunFacts]:
    """What the headline table is made from: numbers by analysis, and what decides whether they compare."""
    return {name: facts(artifact)["numbers"] for name, artifact in findings.items()}, _run_facts(origin)


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
    numbers, run = _measured(findings, origin)
    return ReportInputs(
        title=f"Sparse features of {'the demo model' if run.model == 'demo' else run.model}",
        preset=title,
        facts=_described(origin, run),
        lineage=_lineage(origin),
        sections=[_section(name, artifact, sae, workspace) for name, artifact in findings.items()],
        headline=headline_rows(numbers, run),
        note=comparison_note(run) if run.train_tokens else "",
        highlights=highlights(numbers),
        summary=f"A sparse autoencoder on {run.hook_name}, measured as the post measured its own.",
        command=commands.to_train(title, sae, workspace),
        version=version("sparsemill"),
    )


def _comparison_inputs(reports: Sequence[Artifact], matches: Artifact | None, workspace: Workspace) -> ComparisonInputs:
    saes = [workspace.store.parent(one, "sae") for one in reports]
    columns: list[Column] = []
    for place, (sae, made) in enumerate(zip(saes, reports, strict=True)):
        origin, findings = _origin(sae, workspace), findings_of(made, workspace)
        numbers, run = _measured(findings, origin)
        columns.append(
            Column(
                letter=_letter(place),
                artifact_id=sae.id,
                report_id=made.id,
                facts=_described(origin, run),
                settings=_flat(training.settings(sae)["config"]),
                headline=headline_rows(numbers, run),
                sections=[_section(name, artifact, sae, workspace) for name, artifact in findings.items()],
            )
        )
    return ComparisonInputs(
        columns=columns,
        matches=None if matches is None else _section("cross_seed", matches, saes[0], workspace),
        command=commands.to_compare(saes, findings_of(reports[0], workspace), workspace),
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


def _section(name: str, artifact: Artifact, sae: Artifact, workspace: Workspace) -> Section:
    options = artifact.config["options"]
    return Section(
        name=name,
        artifact_id=artifact.id,
        options=options if isinstance(options, Mapping) else {},
        result=analyzing.load_result(artifact),
        command=commands.to_analyze(name, artifact, sae, workspace),
    )


def _letter(place: int) -> str:
    return chr(ord("A") + place)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: str(value)}
    return found
