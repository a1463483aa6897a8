"""Studies: variations of one autoencoder's own training, trained where they are missing, and compared with it.

A study is a list of trainings that follows from the autoencoder's recorded config and a few values to vary; each is a
train artifact like any other, with the id that the same settings give by hand. What is there is found, and a killed
study goes on with the training it was in. Then the comparing analysis is made, and a report on the first autoencoder
that includes it. The list is an artifact too (``study``), made before the first training, so that ``latest`` can mean
the newest autoencoder that no study trained: the same command goes on with the same one.

Rejected: a loop around the command line (each variation would need its settings spelt out, and a killed one its place).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pipeline import directions, harvest, training
from pipeline.analysis import ANALYSES, statistics
from pipeline.config import TrainConfig, validate
from pipeline.progress import Quiet
from pipeline.stages import Chain, run_directly
from pipeline.workspace import Workspace, facts
from storage.artifact import Artifact
from storage.artifacts import LATEST, Made, Result, Spec, Staging
from storage.errors import ConfigError
from storage.fingerprint import Json
from storage.manifest import RUN_NAME

OUTPUT_VERSION = 1
PENALTY_SHARES = (0.01, 0.03, 0.1)
"""Of the loss at the end of the first training: what penalties of the default sweep would add to it."""
L1_FACTORS = (0.5, 1.0, 2.0)
"""Of ``l1_coeff``: the default sweep at each site."""


class _NotThereError(Exception):
    """Of a stage whose artifact would have to be made first."""

    def __init__(self, stage: str):
        super().__init__(stage)
        self.stage = stage


class _Looking(Workspace):
    """A workspace in which artifacts are found, and none is made."""

    def make_together(
        self,
        specs: Sequence[Spec],
        produce: Callable[[Sequence[Staging]], Sequence[Result]],  # noqa: ARG002 - nothing is
        *,
        provenance: Mapping[str, Json] | None = None,  # noqa: ARG002
    ) -> list[Made]:
        """Finds the artifacts of specs, or raises."""
        found = [self.store.find(spec) for spec in specs]
        there = [Made(artifact, "cached") for artifact in found if artifact is not None]
        if len(there) < len(specs):
            raise _NotThereError(specs[found.index(None)].stage)
        return there


class Training(NamedTuple):
    """One autoencoder of a study.

    Attributes:
        label: what is varied.
        config: how it is trained.
        activations: on what.
        directions: what its encoder is kept orthogonal to.
    """

    label: str
    config: TrainConfig
    activations: Artifact
    directions: Artifact | None = None

    @property
    def spec(self) -> Spec:
        """The question it answers."""
        return training.spec(self.config, self.activations, self.directions)


@dataclass(frozen=True)
class Study:
    """A comparing analysis, and how the autoencoders that it compares come about.

    Attributes:
        analysis: its name; the study's own has hyphens.
        vary: the trainings, from the first autoencoder; makes what they need besides.
    """

    analysis: str
    vary: Callable[[Chain, Artifact], list[Training]]

    @property
    def name(self) -> str:
        """On the command line, and of the flow."""
        return self.analysis.replace("_", "-")

    def run(self, chain: Chain, reference: str | None) -> Artifact:
        """Trains what is missing, compares, and reports.

        Args:
            chain: how stages are run.
            reference: the first autoencoder; the preset's own by default.

        Returns:
            The report on the first autoencoder.
        """
        first = self.first(chain, reference)
        trainings = self.trainings(chain, first)
        for line in preview(self, first, trainings, chain.workspace):
            chain.workspace.reporter.say(line)
        chain.stage("study", partial(_record, self.analysis, first, trainings, chain.workspace))
        others = [chain.stage(f"train {one.label}", partial(_train, one, chain.workspace)) for one in trainings]
        return chain.report(first, (*chain.analyses(first), self.analysis), others)

    def first(self, chain: Chain, reference: str | None) -> Artifact:
        """The autoencoder whose training is varied.

        Args:
            chain: whose preset's own it is by default.
            reference: id, prefix or tag; ``latest`` is the newest that no study trained.

        Raises:
            ConfigError: it was imported, so there is no training to vary.
        """
        store = chain.workspace.store
        if reference is None:
            return chain.train()
        if reference == LATEST:
            varied = {trained for study in store.list("study") for trained in facts(study)["trainings"].values()}
            found = [artifact_id for artifact_id in store.ids("train") if artifact_id not in varied]
            reference = found[0] if found else reference
        artifact = store.resolve(reference, stage=training.AUTOENCODER_STAGES)
        if artifact.stage != "train":
            raise ConfigError(
                "a study varies an autoencoder's training, and this one was imported", where=artifact.id,
                remedy=f"'sparsemill analyze {artifact.id} --only {self.analysis} --with OTHER' compares what is there",
            )  # fmt: skip
        return artifact

    def trainings(self, chain: Chain, first: Artifact) -> list[Training]:
        """The autoencoders to compare with the first one, each once."""
        found = {one.spec.id: one for one in reversed(self.vary(chain, first))}
        found.pop(first.id, None)
        if not found:
            raise ConfigError("nothing to compare: every variation is the autoencoder itself", where=first.id)
        return list(reversed(found.values()))


def cross_seed(seeds: int) -> Study:
    """Other random starts: the trainer's seed and the reader's both go up by one.

    Args:
        seeds: autoencoders in all, the first one counted.

    Raises:
        ConfigError: fewer than two.
    """
    if seeds < 2:
        raise ConfigError("seeds to compare", found=seeds, expected="at least 2, the first autoencoder's own counted")

    def vary(chain: Chain, first: Artifact) -> list[Training]:
        config, activations = _config(first), chain.workspace.store.parent(first, "activations")
        own, reader = config.autoencoder.seed, config.reader_seed
        return [
            Training(f"seed {own + up}", _changed(config, {"seed": own + up}, reader_seed=reader + up), activations)
            for up in range(1, seeds)
        ]

    return Study("cross_seed", vary)


def orthogonal_rerun(features: Sequence[int] = ()) -> Study:
    """The same training, its encoder kept orthogonal to a direction of the first.

    Args:
        features: features whose mean encoder the direction is; the ultra-low ones by default.
    """

    def vary(chain: Chain, first: Artifact) -> list[Training]:
        if features:
            work = partial(directions.mean_direction, first, features, chain.workspace)
        else:
            options = chain.preset.analyze.options.get("orthogonal_rerun", {})
            named = validate(ANALYSES["orthogonal_rerun"].options, options, where="options of orthogonal_rerun")
            density = chain.analyze(first, ("density",))["density"]
            below: float = named.model_dump()["ultra_low_below"]
            work = partial(directions.rare_direction, first, density, below, chain.workspace)
        direction, activations = chain.stage("directions", work), chain.workspace.store.parent(first, "activations")
        return [Training("orthogonal", _config(first), activations, direction)]

    return Study("orthogonal_rerun", vary)


def encoder_sparsity(l1: Sequence[float] = (), l2: Sequence[float] = ()) -> Study:
    """A sweep of the penalty on encoder weights.

    Args:
        l1: coefficients of the sum of absolute weights.
        l2: coefficients of the sum of squared weights; where neither is given, both are swept at ``PENALTY_SHARES`` of
            the loss that the first training ended with, were the encoder to stay as it is.
    """

    def vary(chain: Chain, first: Artifact) -> list[Training]:
        config, activations = _config(first), chain.workspace.store.parent(first, "activations")
        chosen = {"encoder_l1": l1, "encoder_l2": l2} if l1 or l2 else _default_penalties(first)
        return [
            Training(f"{name} {coefficient:g}", _changed(config, {name: coefficient}), activations)
            for name, coefficients in chosen.items()
            for coefficient in coefficients
        ]

    return Study("encoder_sparsity", vary)


def site_comparison(sites: Sequence[str] = (), l1_factors: Sequence[float] = L1_FACTORS) -> Study:
    """The same corpus at other sites of the same model, with a sweep of ``l1_coeff`` at each, the first's included.

    At another site ``l1_coeff`` is scaled by the ratio of the activations' standard deviations (over all neurons): for
    activations that were merely scaled, that gives the same autoencoder.

    Args:
        sites: hook names; by default the MLP's output for its neurons, and the other way round.
        l1_factors: of that coefficient.
    """

    def vary(chain: Chain, first: Artifact) -> list[Training]:
        config, own = _config(first), chain.workspace.store.parent(first, "activations")
        spread = _spread(own)
        found: list[Training] = []
        for activations in (own, *_siblings(chain, own, sites)):
            scale = _spread(activations) / spread
            for factor in l1_factors:
                l1 = float(f"{config.autoencoder.l1_coeff * factor * scale:.3g}") if (factor, scale) != (1, 1) else None
                varied = config if l1 is None else _changed(config, {"l1_coeff": l1})
                label = f"{activations.config['hook_name']}, l1_coeff {varied.autoencoder.l1_coeff:g}"
                found.append(Training(label, varied, activations))
        return found

    return Study("site_comparison", vary)


def look_ahead(study: Study, chain: Chain, reference: str | None) -> list[str]:
    """What a study would train, as :func:`preview` has it, without making anything.

    What the trainings follow from must be there already; where it is not, the lines say what comes first.
    """
    looking = replace(chain, workspace=_Looking(chain.workspace.runtime, Quiet()), run=run_directly, runs=[])
    try:
        first = study.first(looking, reference)
        return preview(study, first, study.trainings(looking, first), looking.workspace)
    except _NotThereError as missing:
        return [f"{study.name}: {missing.stage} comes first, and decides what is trained"]


def preview(study: Study, first: Artifact, trainings: Sequence[Training], workspace: Workspace) -> list[str]:
    """What is to be trained, what is there, and roughly for how long: lines for people.

    The time is the first training's own, where it ran through, times steps and width; nothing is measured.
    """
    record = first.folder / RUN_NAME
    run: dict[str, Any] = json.loads(record.read_bytes()) if record.is_file() else {}
    lines: list[str] = []
    missing, seconds = 0, 0.0
    for one in trainings:
        found = workspace.store.find(one.spec)
        lines.append(f"  {one.label}: {'to train' if found is None else f'{found.id} is there'}")
        if found is None:
            width = facts(one.activations)["d_in"] / facts(first)["d_in"]
            missing += 1
            seconds += float(run.get("seconds", 0)) * width * one.config.autoencoder.steps / facts(first)["steps"]
    about = f", about {_duration(seconds)} here" if missing and run.get("status") == "made" else ""
    head = f"{study.name} of {first.id}: {missing} of {len(trainings)} to train{about}"
    return [head, *lines]


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def _train(one: Training, workspace: Workspace) -> Made:
    return training.train(one.config, one.activations, workspace, directions=one.directions)


def _record(analysis: str, first: Artifact, trainings: Sequence[Training], workspace: Workspace) -> Made:
    listed = {one.label: one.spec.id for one in trainings}
    spec = Spec("study", OUTPUT_VERSION, {"study": analysis, "trainings": {**listed}}, {"sae": first.as_parent()})

    def produce(staging: Staging) -> Result:
        staging.write_json("study.json", {"study": analysis, "first": first.id, "trainings": listed})
        return Result({"trainings": {**listed}})

    return workspace.make(spec, produce)


def _config(first: Artifact) -> TrainConfig:
    return validate(TrainConfig, training.settings(first)["config"], where=first.id)


def _changed(config: TrainConfig, autoencoder: dict[str, Any], **others: Any) -> TrainConfig:
    values = config.model_dump()
    values |= {**others, "autoencoder": values["autoencoder"] | autoencoder}
    return validate(TrainConfig, values, where="a variation of the training")


def _default_penalties(first: Artifact) -> dict[str, list[float]]:
    loss = float(training.training_log(first)["loss"].to_pylist()[-1])
    encoder = statistics.weights64(training.load_autoencoder(first).W_enc)
    sums = {"encoder_l1": float(np.abs(encoder).sum()), "encoder_l2": float(np.square(encoder).sum())}
    return {name: [float(f"{share * loss / total:.1g}") for share in PENALTY_SHARES] for name, total in sums.items()}


def _siblings(chain: Chain, own: Artifact, sites: Sequence[str]) -> list[Artifact]:
    config, tokens = harvest.recorded_config(own), chain.workspace.store.parent(own, "tokens")
    wanted = [site for site in dict.fromkeys(sites or [_partner(config.hook_name)]) if site != config.hook_name]
    found: list[Artifact] = []
    for number, site in enumerate(wanted):  # the first pass of the model serves them all
        there = config.model_copy(update={"hook_name": site, "also_hook_names": tuple(wanted[number + 1 :])})
        found.append(chain.stage(f"harvest {site}", partial(harvest.harvest, there, tokens, chain.workspace)))
    return found


def _partner(hook_name: str) -> str:
    for one, other in (("mlp.hook_post", "hook_mlp_out"), ("hook_mlp_out", "mlp.hook_post")):
        if hook_name.endswith(f".{one}"):
            return f"{hook_name.removesuffix(one)}{other}"
    raise ConfigError("no site goes without saying beside this one", found=hook_name, remedy="name some with --sites")


def _spread(activations: Artifact) -> float:
    moments = harvest.moments(activations)
    variance = float(np.trace(moments.second_moment)) / moments.sampled_rows - float(np.square(moments.mean).sum())
    return max(variance, 1e-30) ** 0.5
