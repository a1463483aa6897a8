from pipeline.explaining import StageAnswer, told
from storage.explaining import UNMADE, Explanation, differences
from storage.fingerprint import Json
from storage.manifest import Parent, Spec

SAE = Parent("train-0123456789ab", "a" * 64)


def here(name: str, spec: Spec) -> StageAnswer:
    return StageAnswer(name, spec.id, "here", None)


def missing(name: str, there: Spec | None, wanted: Spec) -> StageAnswer:
    why = Explanation(wanted, None, []) if there is None else Explanation(wanted, there.id, differences(there, wanted))
    return StageAnswer(name, wanted.id, None, why)


def train(**settings: Json) -> Spec:
    return Spec("train", 1, {"autoencoder": {"l1_coeff": 0.7, "steps": 10, "seed": 0, "d_sae": 8} | settings})


def survey(sae: Parent, rows: int = 100) -> Spec:
    return Spec("survey", 1, {"rows": rows}, {"sae": sae})


NEW = Parent("train-ffffffffffff", UNMADE)
CHANGED = [
    here("harvest", Spec("harvest", 1, {})),
    missing("train", train(), train(l1_coeff=0.2)),
    missing("survey", survey(SAE), survey(NEW)),
    missing("density", None, survey(NEW)),
    missing("report", Spec("report", 1, {}, {"sae": SAE}), Spec("report", 1, {}, {"sae": NEW})),
]


def test_what_only_follows_is_one_line():
    assert told(CHANGED) == [
        f"harvest: {Spec('harvest', 1, {}).id} is here",
        f"train: would run; the nearest, {train().id}, has autoencoder.l1_coeff 0.7, not 0.2",
        "survey, density, report: would run, as train would",
    ]


def test_a_stage_with_a_change_of_its_own_is_told_beside_what_follows():
    lines = told([CHANGED[1], missing("survey", survey(SAE), survey(NEW, rows=7)), CHANGED[4]])
    assert lines[1] == f"survey: would run; the nearest, {survey(SAE).id}, has rows 100, not 7"
    assert lines[2] == "report: would run, as train and survey would"


def test_a_parent_that_is_there_and_another_is_a_reason():
    other = Parent("train-111111111111", "b" * 64)
    (line, end) = told([missing("survey", survey(SAE), survey(other))])
    assert "has parents.sae train-0123456789ab (manifest aaaaaaaaaaaa), not train-111111111111" in line
    assert end == "what follows: would run, as it is made from what is missing"


def test_many_differences_are_counted_and_full_has_them_all():
    answer = missing("train", train(), train(l1_coeff=1.0, steps=2, seed=3, d_sae=4))
    assert told([answer])[0].endswith("seed 0, not 3; 1 more with --full")
    full = told([answer, *CHANGED[2:]], full=True)
    assert full[0] == f"train: would run; {train().id} differs in"
    assert full[1:5] == [f"  {one}" for one in differences(train(), train(l1_coeff=1.0, steps=2, seed=3, d_sae=4))]
    assert "density: would run; there is none yet" in full
    assert sum("parents.sae" in line for line in full) == 2
