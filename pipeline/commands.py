"""Command lines that make things again, for the report: from what artifacts recorded of themselves, and nothing else.

A command names what differs from what it would do by itself: settings beside those of the preset, options beside an
analysis' own. So it gives the very artifact, whichever way the first one came about: by hand, by a flow, by a study.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pipeline import analyzing, harvest, training
from pipeline.analysis import ANALYSES
from pipeline.config import HarvestConfig, SurveyConfig, TokenizeConfig, load_preset, preset_names
from pipeline.tokens import OUTPUT_VERSION as TOKENS_VERSION
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.errors import ArtifactNotFound

DEFAULT_PRESET = "demo"
"""Of the command line."""
_OF_PROMPTS = ("prompt_tokens", "train_tokens", "held_out_tokens", "bos", "eos", "on_bad_document", "seed")
_OF_A_SOURCE = ("name", "kind", "share")


def to_analyze(name: str, artifact: Artifact, sae: Artifact, workspace: Workspace) -> str:
    """The command that makes an analysis of an autoencoder.

    Args:
        name: of the analysis.
        artifact: the analysis.
        sae: the autoencoder.
        workspace: where parents are.
    """
    words = ["sparsemill", "analyze", sae.id, "--only", name]
    for other in analyzing.companion_ids(artifact):
        words += ["--with", other]
    return shlex.join(words + _set(_options(name, artifact, workspace)))


def to_train(title: str, sae: Artifact, workspace: Workspace) -> str:
    """The command that makes an autoencoder, from the documents on where the preset says which; "" where none does.

    Args:
        title: a preset's name; the command line's own is taken where it is none that ships.
        sae: an artifact of ``training.AUTOENCODER_STAGES``.
        workspace: where parents are.
    """
    preset = load_preset(title if title in preset_names() else DEFAULT_PRESET)
    if sae.stage != "train":
        return shlex.join(["sparsemill", "analyze", sae.id, "--preset", preset.name])
    if "directions" in sae.parents:
        return _to_rerun(sae, workspace)
    activations = workspace.store.parent(sae, "activations")
    tokens = workspace.store.parent(activations, "tokens")
    same = _is_harvest_of(preset.harvest, activations, tokens) and _is_tokens_of(preset.tokenize, tokens)
    words = ["sparsemill", "replicate"] if same else ["sparsemill", "train", "--activations", activations.id]
    recorded = training.settings(sae)["config"]
    settings = _differences("train", recorded, preset.train.model_dump(mode="json"))
    return shlex.join([*words, "--preset", preset.name, *_set(settings)])


def to_compare(saes: Sequence[Artifact], findings: Mapping[str, Artifact], workspace: Workspace) -> str:
    """The command that puts autoencoders side by side.

    Args:
        saes: the autoencoders.
        findings: of the first one's report, by the analysis' name.
        workspace: where parents are.
    """
    settings: dict[str, Any] = {}
    if set(findings) != set(load_preset(DEFAULT_PRESET).analyze.analyses):
        settings["analyze.analyses"] = [*findings]
    for name, artifact in findings.items():
        settings |= _options(name, artifact, workspace)
    return shlex.join(["sparsemill", "report", "compare", *(sae.id for sae in saes), *_set(settings)])


def _to_rerun(sae: Artifact, workspace: Workspace) -> str:
    try:
        directions = workspace.store.parent(sae, "directions")
    except ArtifactNotFound:
        return ""  # the autoencoder came alone
    words = ["sparsemill", "study", "orthogonal-rerun", "--sae", directions.parents["sae"].id]
    if features := directions.config.get("features"):
        return shlex.join([*words, "--features", *map(str, cast("list[int]", features))])
    defaults = ANALYSES["orthogonal_rerun"].options().model_dump(mode="json")
    found = _differences("analyze.options.orthogonal_rerun", directions.config, defaults)
    found |= _options("density", workspace.store.parent(directions, "density"), workspace)
    return shlex.join([*words, *_set(found)])


def _options(name: str, artifact: Artifact, workspace: Workspace) -> dict[str, Any]:
    """Settings that differ from what analyses do by themselves, of this one and of those that it reads."""
    options: Any = artifact.config["options"]
    defaults = ANALYSES[name].options().model_dump(mode="json") if name in ANALYSES else {}
    found = _differences(f"analyze.options.{name}", options, defaults)
    for role in analyzing.FINDINGS:
        if role in artifact.parents:
            found |= _options(role, workspace.store.parent(artifact, role), workspace)
    if "survey" in artifact.parents:
        survey = workspace.store.parent(artifact, "survey")
        found |= _differences("analyze.survey", survey.config, SurveyConfig().model_dump(mode="json"))
    return found


def _differences(stage: str, recorded: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in recorded.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            found |= _differences(f"{stage}.{name}", value, default)
        elif value != default:
            found[f"{stage}.{name}"] = value
    return found


def _set(settings: Mapping[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]


def _is_harvest_of(config: HarvestConfig, activations: Artifact, tokens: Artifact) -> bool:
    if activations.spec.version != harvest.OUTPUT_VERSION:
        return False
    windows = config.n_windows or facts(tokens)["train"]["prompts"] // config.window_prompts
    wanted = config.model_copy(update={"n_windows": windows, "also_hook_names": ()})
    return harvest.recorded_config(activations) == wanted


def _is_tokens_of(config: TokenizeConfig, tokens: Artifact) -> bool:
    if tokens.spec.version != TOKENS_VERSION:
        return False
    sources: Any = tokens.config["sources"]
    return all(tokens.config[name] == getattr(config, name) for name in _OF_PROMPTS) and [
        tuple(source[name] for name in _OF_A_SOURCE) for source in sources
    ] == [tuple(getattr(source, name) for name in _OF_A_SOURCE) for source in config.sources]
