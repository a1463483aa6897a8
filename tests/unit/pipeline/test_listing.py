import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.listing import RunRecord, run_record, settings_apart, shown
from storage.artifact import Artifact
from storage.artifacts import ArtifactStore, Result, Staging
from storage.fingerprint import Json
from storage.manifest import Manifest, Parent, Spec


def artifact(stage: str, config: dict[str, Json], parents: dict[str, str] | None = None, **stats: Json) -> Artifact:
    named = {role: Parent(name, "a" * 64) for role, name in (parents or {}).items()}
    spec = Spec(stage, 1, config, named)
    return Artifact(Path("nowhere") / spec.id, Manifest(spec, {}, stats, {}), "0" * 64)


def train(harvest: str = "harvest-000000000000", **settings: Json) -> Artifact:
    config: dict[str, Json] = {"source": "store", "autoencoder": {"l1_coeff": 0.7, "seed": 0, "steps": 10} | settings}
    return artifact("train", config, {"activations": harvest})


def test_only_what_artifacts_of_a_kind_do_not_share_is_told():
    made = [train(), train(l1_coeff=0.4), artifact("report", {"title": "demo"}), train(l1_coeff=0.4, seed=1)]
    assert settings_apart(made) == [
        {"l1_coeff": 0.7, "seed": 0}, {"l1_coeff": 0.4, "seed": 0}, {}, {"l1_coeff": 0.4, "seed": 1},
    ]  # fmt: skip
    assert settings_apart([train()]) == [{}]
    assert settings_apart([]) == []


def test_where_settings_are_the_same_the_parent_tells_them_apart():
    made = [train(), train("harvest-111111111111")]
    assert settings_apart(made) == [{"activations": "harvest-000000000000"}, {"activations": "harvest-111111111111"}]


def test_of_parents_the_autoencoder_is_named_first():
    reports = [
        artifact("report", {}, {"density": f"analyze-{digit * 12}", "sae": f"train-{digit * 12}"}) for digit in "01"
    ]
    assert settings_apart(reports)[1] == {"sae": "train-111111111111"}
    assert settings_apart([reports[0], artifact("report", {}, {"other": "train-222222222222"})]) == [{}, {}]


def test_analyses_are_told_by_their_name_and_compared_with_their_own():
    def analysis(name: str, **options: Json) -> Artifact:
        return artifact("analyze", {"analysis": name, "options": options})

    made = [analysis("kurtosis", clip=7), analysis("density"), analysis("kurtosis", clip=30)]
    assert settings_apart(made) == [
        {"analysis": "kurtosis", "clip": 7}, {"analysis": "density"}, {"analysis": "kurtosis", "clip": 30},
    ]  # fmt: skip
    assert shown(settings_apart(made)[0]) == "kurtosis, clip 7"


def test_models_are_told_by_name_and_not_by_their_hashes():
    def harvest(name: str, digest: str) -> Artifact:
        model = {"weights_sha256": digest * 64, "config_sha256": digest * 64, "tokenizer_sha256": digest * 64}
        return artifact("harvest", {"encoding": "float16", "model": model}, language_model=name)

    assert settings_apart([harvest("demo", "a"), harvest("/models/gelu-1l", "b")]) == [
        {"language_model": "demo"}, {"language_model": "gelu-1l"},
    ]  # fmt: skip
    hashes = settings_apart([harvest("demo", "a"), harvest("demo", "b")])[1]
    assert set(hashes) == {"weights_sha256", "config_sha256", "tokenizer_sha256"}


def test_settings_of_one_name_keep_their_sections():
    made = [artifact("train", {"a": {"seed": value}, "b": {"seed": value}}) for value in (0, 1)]
    assert settings_apart(made) == [{"a.seed": 0, "b.seed": 0}, {"a.seed": 1, "b.seed": 1}]


def test_a_line_has_the_first_few_hashes_last_and_is_short():
    made = [
        artifact("tokenize", {"corpus": letter * 64, "t": tokens, "u": tokens, "v": 1e-5 * tokens, "w": letter * 99})
        for letter, tokens in (("a", 1), ("b", 2))
    ]
    assert shown(settings_apart(made)[1]) == f"t 2, u 2, v 2e-05, w {'b' * 31}…, corpus bbbbbbbb"
    six: dict[str, Json] = dict.fromkeys("fedcba", 0)
    assert shown(six) == "f 0, e 0, d 0, c 0, 2 more"


def made_in(folder: Path) -> Artifact:
    def produce(_: Staging) -> Result:
        return Result({})

    return ArtifactStore(folder).make(Spec("train", 1, {}), produce, provenance={}).artifact


def test_when_it_was_made_is_told_in_this_places_time(tmp_path: Path):
    before = datetime.now(UTC)
    record = run_record(made_in(tmp_path / "store"))
    assert record.finished is not None
    assert before <= record.finished <= datetime.now(UTC)
    assert (record.status, record.day) == ("made", f"{record.finished.astimezone():%Y-%m-%d %H:%M}")
    assert record.seconds is not None


@pytest.mark.parametrize(
    "text",
    ["", "3", "[]", "null", "{}", '{"finished": 3}', '{"finished": "then"}', "[" * 10_000, "\udcff"],
)
def test_of_a_record_that_is_none_nothing_is_known(text: str, tmp_path: Path):
    made = made_in(tmp_path / "store")
    (made.folder / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    assert run_record(made) == RunRecord()
    (made.folder / "run.json").unlink()
    assert run_record(made) == RunRecord()
    assert RunRecord().day == ""


def test_a_time_that_no_calendar_here_has_is_left_out(tmp_path: Path):
    made = made_in(tmp_path / "store")
    (made.folder / "run.json").write_text(json.dumps({"finished": "0001-01-01T00:00:00+14:00", "seconds": "long"}))
    assert run_record(made).day == ""
    assert run_record(made).seconds is None
