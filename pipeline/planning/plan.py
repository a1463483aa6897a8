"""The command ``plan``: what a preset's run would be on this machine, and whether it fits; makes nothing.

The chain of stages is followed, by a store that only looks, as far as artifacts are there already: what is made needs
no disk and no time, and its numbers of prompts are the true ones. Then the model is loaded for the widths of its hooks,
everything is counted (``sizes``), mixing is measured on prompt numbers (``mixing``), and, if the run fits, the machine
is calibrated for some seconds (``calibration``).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch

from pipeline import language_model
from pipeline.config import Preset
from pipeline.language_model import LanguageModel
from pipeline.listing import run_record
from pipeline.memory import available_bytes, model_width, resident_bytes, room_bytes
from pipeline.planning.calibration import Calibration, calibrate, temporary_bytes
from pipeline.planning.device import device_needs, device_room_bytes, host_needs, require_device_room
from pipeline.planning.fitting import Choice, disk_choices, require_disk, require_room
from pipeline.planning.held_out import few_held_out
from pipeline.planning.mixing import Mixing, mixings
from pipeline.planning.sizes import Figures, RunPlan, Site, Subject, TokensPlan
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace, facts
from storage import atomic
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore, Made, Result, Spec, Staging
from storage.encoding import ENCODINGS, Encoding
from storage.errors import SparsemillError
from storage.fingerprint import Json

_POST, _OUT = re.compile(r"(blocks\.\d+)\.mlp\.hook_post"), r"\1.hook_mlp_out"


class Machine(Figures):
    """What there is to run on."""

    free_bytes: int
    """Free on the store's file system."""
    resident_bytes: int
    """What this process holds, with the model loaded: the stages run in one like it."""
    room_bytes: int
    """What a stage may take beside that."""
    device_room_bytes: int | None = None
    """What a stage may take of a CUDA device's memory; None on other devices."""


class SiteSizes(Figures):
    """The size of a store at one site."""

    site: Site
    """Where."""
    run: dict[Encoding, int]
    """Bytes of the run's store in each encoding."""
    full: dict[Encoding, int]
    """Bytes of the full run's."""


class Plan(Figures):
    """All that is known of a run before it is made."""

    preset: str
    """Its preset."""
    run: RunPlan
    """The preset's own run."""
    full_tokens: int
    """Tokens asked for in the full run."""
    full: RunPlan
    """The same on so many tokens."""
    sizes: tuple[SiteSizes, ...]
    """Store sizes by site and encoding."""
    memory: dict[str, dict[str, int]]
    """Bytes a stage takes beside the process with its model, by stage and part."""
    full_memory: dict[str, dict[str, int]]
    """The same for the full run."""
    device_memory: dict[str, dict[str, int]]
    """Bytes a stage takes of a CUDA device's memory, which do not grow with the tokens; empty on other devices."""
    machine: Machine
    """What there is."""
    mixing: tuple[Mixing, ...]
    """The certificate expected of each source of batches."""
    choices: tuple[Choice, ...]
    """Ways to need less disk."""
    calibration: Calibration | None
    """Rates measured, or None where that was not wanted or the run does not fit."""
    seconds: dict[str, float]
    """Time by stage, of stages not made yet; empty without calibration."""
    full_seconds: dict[str, float]
    """The same for the full run."""
    made_seconds: dict[str, float]
    """What it took to make the stages that are there, of those that were made in one run here."""
    warnings: tuple[str, ...]
    """What the run can do, but should not be surprised by."""
    refusal: str | None
    """Why the run cannot be made here; None if it can."""


def plan(
    preset: Preset,
    workspace: Workspace,
    *,
    full_tokens: int,
    calibrated: bool = True,
    budget_bytes: int | None = None,
) -> tuple[Plan, SparsemillError | None]:
    """Plans a run.

    Args:
        preset: the run's config.
        workspace: where it would be made.
        full_tokens: tokens of the full run put beside it.
        calibrated: whether to measure this machine.
        budget_bytes: what a stage's process may hold in all; what the machine has by default.

    Returns:
        ``(plan, refusal)``: the refusal is the error to raise if the run does not fit, else None.

    Raises:
        UnknownHook: the model has no such hook.
        InputError: a source is missing, or the prompts do not fill one window.
    """
    made = _made_already(preset, workspace)
    workspace.reporter.say(f"plan: load {preset.harvest.language_model}")
    model = language_model.load(
        preset.harvest.language_model, device=workspace.runtime.device, dtype=preset.harvest.forward_dtype
    )
    names = list(dict.fromkeys([preset.harvest.hook_name, *preset.harvest.also_hook_names]))
    sites, narrow = _sites(model, names), _narrower(model, preset.harvest.hook_name)
    subject = Subject(preset, sites, _tokens(made.get("tokenize")), tuple(made))
    full = subject.scaled(full_tokens)
    measured = [*sites, *([narrow] if narrow and narrow not in sites else [])]
    width = max([model_width(model), *(site.d_in for site in sites)])
    needs, full_needs = (
        one.memory_needs(model_width=width, d_vocab=model.d_vocab, workers=workspace.threads) for one in (subject, full)
    )
    root = workspace.runtime.root
    machine = Machine(
        free_bytes=atomic.free_bytes(root),
        resident_bytes=resident_bytes(),
        room_bytes=room_bytes(budget_bytes),
        device_room_bytes=device_room_bytes(model.device),
    )
    on_device = {} if machine.device_room_bytes is None else device_needs(subject, model_width=width)
    needs, full_needs = host_needs(needs, on_device), host_needs(full_needs, on_device)
    choices = disk_choices(subject, narrow, machine.free_bytes)
    refusal = _refusal(
        lambda: require_disk(subject, choices, machine.free_bytes, root),
        lambda: require_room(subject, needs, machine.room_bytes),
        lambda: require_device_room(subject, on_device, machine.device_room_bytes or 0),
    )
    workspace.reporter.say("plan: measure mixing, on prompt numbers alone")
    found = mixings(subject, full.layouts[0].n_rows)
    run, full_run = subject.plan(), full.plan()
    rates = _calibration(subject, model, workspace, run, machine) if calibrated and refusal is None else None
    return Plan(
        preset=preset.name,
        run=run,
        full_tokens=full_tokens,
        full=full_run,
        sizes=tuple(_sizes(subject, site, full_tokens) for site in measured),
        memory=needs,
        full_memory=full_needs,
        device_memory=on_device,
        machine=machine,
        mixing=tuple(found),
        choices=tuple(choices),
        calibration=rates,
        seconds=_seconds(run, rates),
        full_seconds=_seconds(full_run, rates),
        made_seconds=_made_seconds(made),
        warnings=tuple(filter(None, [few_held_out(_held_out_prompts(preset, made.get("tokenize")))])),
        refusal=None if refusal is None else str(refusal),
    ), refusal


class _NotMade(Exception):  # noqa: N818 - control flow, not an error
    """A stage's artifact is not there."""


class _LookingStore(ArtifactStore):
    """Finds artifacts and makes none."""

    def make_together(
        self,
        specs: Sequence[Spec],
        produce: Callable[[Sequence[Staging]], Sequence[Result]],  # noqa: ARG002
        provenance: Mapping[str, Json],  # noqa: ARG002
        on_wait: Callable[[], None] | None = None,  # noqa: ARG002
    ) -> list[Made]:
        """The artifacts of the specs; ``_NotMade`` if one is missing."""
        found = [artifact for artifact in map(self.find, specs) if artifact is not None]
        if len(found) < len(specs):
            raise _NotMade
        return [Made(artifact, "cached") for artifact in found]


@dataclass(frozen=True)
class _LookingWorkspace(Workspace):
    """A workspace in which stages are found or end at once."""

    @cached_property
    def store(self) -> ArtifactStore:
        """The store, only to be looked at."""
        return _LookingStore(self.runtime.root)


def _made_already(preset: Preset, workspace: Workspace) -> dict[str, Artifact]:
    """The artifacts of the stages up to training that are there, by stage."""
    chain = Chain(preset, _LookingWorkspace(workspace.runtime, Quiet()), run_directly)
    with suppress(_NotMade):
        chain.train()
    return {run.name: run.made.artifact for run in chain.runs}


def _tokens(artifact: Artifact | None) -> TokensPlan | None:
    if artifact is None:
        return None
    train = facts(artifact)["train"]
    return TokensPlan(
        train_prompts=train["prompts"],
        train_tokens=train["tokens"],
        bytes=artifact.manifest.total_bytes,
        exact=True,
    )


def _made_seconds(made: Mapping[str, Artifact]) -> dict[str, float]:
    records = {stage: run_record(artifact) for stage, artifact in made.items()}
    return {stage: one.seconds for stage, one in records.items() if one.status == "made" and one.seconds is not None}


def _held_out_prompts(preset: Preset, tokens: Artifact | None) -> int:
    """Those that are there, or else at most."""
    if tokens is not None:
        return int(facts(tokens)["held_out"]["prompts"])
    return preset.tokenize.held_out_tokens // preset.tokenize.prompt_tokens


def _sites(model: LanguageModel, hook_names: Sequence[str]) -> tuple[Site, ...]:
    for name in hook_names:
        model.check_hook(name)
    found = model.activations_at(torch.tensor([[model.bos_id]]), hook_names)
    return tuple(Site(hook_name=name, d_in=found[name].shape[-1]) for name in hook_names)


def _narrower(model: LanguageModel, hook_name: str) -> Site | None:
    """The MLP's output at the layer of a ``hook_post``, where it is narrower."""
    name = _POST.sub(_OUT, hook_name)
    if name == hook_name or name not in model.hook_names:
        return None
    wide, narrow = _sites(model, [hook_name, name])
    return narrow if narrow.d_in < wide.d_in else None


def _refusal(*checks: Callable[[], None]) -> SparsemillError | None:
    for check in checks:
        try:
            check()
        except SparsemillError as error:
            return error
    return None


def _calibration(
    subject: Subject, model: LanguageModel, workspace: Workspace, run: RunPlan, machine: Machine
) -> Calibration | None:
    if machine.free_bytes < temporary_bytes(subject):
        workspace.reporter.say("plan: too little disk is free to calibrate")
        return None
    workspace.reporter.say("plan: calibrate this machine, for about 15 seconds")
    return calibrate(subject, model, workspace, cached=run.stores[0].bytes < available_bytes() // 2)


def _seconds(run: RunPlan, rates: Calibration | None) -> dict[str, float]:
    if rates is None:
        return {}
    seconds = {"harvest": rates.harvest_seconds(run), "train": rates.train_seconds(run)}
    return {stage: value for stage, value in seconds.items() if stage not in run.made}


def _sizes(subject: Subject, site: Site, full_tokens: int) -> SiteSizes:
    def bytes_of(one: Subject) -> dict[Encoding, int]:
        found: dict[Encoding, int] = {}
        for encoding in ENCODINGS:
            found[encoding] = one.changed(harvest={"encoding": encoding}).plan().stores[0].bytes
        return found

    alone = subject.at(site)
    return SiteSizes(site=site, run=bytes_of(alone), full=bytes_of(alone.scaled(full_tokens)))
