from pathlib import Path

import pytest

from storage.artifacts import ArtifactStore, Result, Spec, Staging
from storage.explaining import differences, explain
from storage.manifest import Parent

PARENT = Parent("harvest-0123456789ab", "a" * 64)
OTHER = Parent("harvest-0123456789ab", "b" * 64)
SPEC = Spec(
    "train", 1, {"seed": 1, "sae": {"l1": 0.1, "steps": 10}, "sources": [{"name": "a"}]}, {"activations": PARENT}
)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def make(store: ArtifactStore, spec: Spec) -> str:
    def produce(staging: Staging) -> Result:
        return Result({})

    return store.make(spec, produce, provenance={}).artifact.id


def test_fields_that_differ_are_named_by_their_place():
    wanted = Spec(
        "train", 2, {"seed": 1, "sae": {"l1": 0.2, "steps": 10, "tied": True}, "sources": [{"name": "b"}]},
        {"activations": OTHER},
    )  # fmt: skip
    found = {one.field: (one.there, one.wanted) for one in differences(SPEC, wanted)}
    assert found == {
        "version": (1, 2),
        "config.sae.l1": (0.1, 0.2),
        "config.sae.tied": (None, True),
        "config.sources.0.name": ("a", "b"),
        "parents.activations": (f"{PARENT.id} (manifest {'a' * 12})", f"{PARENT.id} (manifest {'b' * 12})"),
    }
    assert differences(SPEC, SPEC) == []


def test_the_nearest_artifact_of_the_stage_is_compared(store: ArtifactStore):
    wanted = Spec("train", 1, {**SPEC.config, "seed": 3}, SPEC.parents)
    assert explain(store, wanted).nearest is None
    make(store, Spec("train", 1, {"seed": 3}, {}))
    near = make(store, SPEC)
    make(store, Spec("train", 2, {**SPEC.config, "seed": 2}, {"activations": OTHER}))
    make(store, Spec("survey", 1, {**SPEC.config, "seed": 3}, SPEC.parents))
    explanation = explain(store, wanted)
    assert explanation.nearest == near
    assert [str(one) for one in explanation.differences] == ["config.seed: 1 there, 3 wanted"]


def test_an_analysis_is_compared_with_its_own_kind(store: ArtifactStore):
    make(store, Spec("analyze", 1, {"analysis": "density", "options": {}}))
    wanted = Spec("analyze", 1, {"analysis": "kurtosis", "options": {}})
    assert explain(store, wanted).nearest is None
    near = make(store, Spec("analyze", 1, {"analysis": "kurtosis", "options": {"bins": 3}}))
    assert explain(store, wanted).nearest == near
