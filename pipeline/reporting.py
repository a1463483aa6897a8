"""The report stage: findings of one autoencoder -> a folder of HTML, an artifact like any other."""

import math
from collections.abc import Mapping
from importlib.metadata import version

from pipeline import analyzing
from pipeline.analysis.published import RunFacts, comparison_note, headline_rows, highlights
from pipeline.report import LineageStep, ReportInputs, Section, write_report
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.artifacts import Made, Result, Spec, Staging
from storage.fingerprint import Json

OUTPUT_VERSION = 1


def report(title: str, sae: Artifact, findings: Mapping[str, Artifact], workspace: Workspace) -> Made:
    """Makes, or finds, the report on an autoencoder.

    Args:
        title: name of the run, such as the preset's.
        sae: the train artifact.
        findings: its analyses by name, in the report's order.
        workspace: where it happens.
    """
    parents = {"sae": sae, **findings}
    spec = Spec(
        "report",
        OUTPUT_VERSION,
        {"title": title, "version": version("sparsemill")},
        {role: artifact.as_parent() for role, artifact in parents.items()},
    )

    def produce(staging: Staging) -> Result:
        for name, data in write_report(_inputs(title, sae, findings, workspace)).items():
            staging.write_bytes(name, data)
        return Result({"analyses": list[Json](findings)})

    return workspace.make(spec, produce)


def _inputs(title: str, sae: Artifact, findings: Mapping[str, Artifact], workspace: Workspace) -> ReportInputs:
    activations = workspace.store.parent(sae, "activations")
    tokens = workspace.store.parent(activations, "tokens")
    numbers = {name: facts(artifact)["numbers"] for name, artifact in findings.items()}
    run = _run_facts(sae, activations)
    sections = [
        Section(
            name=name,
            artifact_id=artifact.id,
            options=_options(artifact),
            result=analyzing.load_result(artifact),
            command=f"sparsemill analyze {sae.id} --only {name}",
        )
        for name, artifact in findings.items()
    ]
    stored, tokenized = facts(activations), facts(tokens)
    mix = ", ".join(f"{source['share_of_tokens']:.0%} {name}" for name, source in tokenized["train"]["sources"].items())
    epochs = run.train_tokens / stored["rows"]
    described = {
        "Language model": f"{run.model}, {run.hook_name}, {run.d_in} wide",
        "Data": f"{tokenized['train']['tokens']:,} tokens: {mix}",
        "Activations": f"{stored['rows']:,} rows in {stored['shards']:,} shards, {activations.config['encoding']}",
        "Autoencoder": f"{run.d_in} → {run.d_sae:,} features",
        "Training": f"{facts(sae)['steps']:,} steps on {run.train_tokens:,} rows ({epochs:.3g} epochs)",
    }
    return ReportInputs(
        title=f"Sparse features of {'the demo model' if run.model == 'demo' else run.model}",
        preset=title,
        facts=described,
        lineage=_lineage(tokens, activations, sae),
        sections=sections,
        headline=headline_rows(numbers, run),
        note=comparison_note(run),
        highlights=highlights(numbers),
        summary=f"A sparse autoencoder on {run.hook_name}, measured as the post measured its own.",
        command=f"sparsemill replicate --preset {title}",
        version=version("sparsemill"),
    )


def _run_facts(sae: Artifact, activations: Artifact) -> RunFacts:
    return RunFacts(
        model=facts(activations)["language_model"],
        hook_name=str(activations.config["hook_name"]),
        d_in=facts(sae)["d_in"],
        d_sae=facts(sae)["d_sae"],
        train_tokens=facts(sae)["rows_seen"],
    )


def _lineage(tokens: Artifact, activations: Artifact, sae: Artifact) -> list[LineageStep]:
    stored, trained = facts(activations), facts(sae)
    return [
        LineageStep("tokenize", tokens.id, {"prompts": f"{facts(tokens)['train']['prompts']:,}"}),
        LineageStep(
            "harvest",
            activations.id,
            {"rows": f"{stored['rows']:,}", "size": f"{math.ceil(stored['activation_bytes'] / 2**20):,} MiB"},
        ),
        LineageStep("train", sae.id, {"steps": f"{trained['steps']:,}", "L0": f"{trained['l0']:.1f}"}),
    ]


def _options(artifact: Artifact) -> Mapping[str, object]:
    options = artifact.config["options"]
    return options if isinstance(options, Mapping) else {}
