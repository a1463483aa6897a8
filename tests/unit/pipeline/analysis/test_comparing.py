from typing import Any

from pipeline.analysis.comparing import Described, labels, sites

CONFIG = {"reader_seed": 0, "autoencoder": {"seed": 0, "encoder_l1": 0.0, "resampling": {"scheme": "none"}}}


def described(
    name: str, *, hook_name: str = "a", model: str = "one", orthogonal: bool = False, **changed: Any
) -> Described:
    config = {**CONFIG, "autoencoder": CONFIG["autoencoder"] | changed}  # type: ignore[operator]
    return Described(name, model, {"sha256": model}, hook_name, config, orthogonal)


def test_a_label_is_what_differs() -> None:
    found = labels(
        [
            described("train-0"),
            described("train-1", seed=3),
            described("train-2", encoder_l1=1e-4),
            described("train-3", hook_name="b"),
            described("train-4", orthogonal=True),
            described("train-5", model="two"),
        ]
    )
    assert found == ["this one", "seed 3", "encoder_l1 0.0001", "b", "orthogonal encoder", "two"]


def test_where_nothing_much_or_the_same_differs_the_id_is_the_label() -> None:
    much = described("train-2", seed=1, a=1, b=2, c=3)
    twins = [described("train-3", seed=4), described("train-4", seed=4)]
    assert labels([described("train-0"), described("train-1"), much, *twins])[1:] == [
        "train-1",
        "train-2",
        "train-3",
        "train-4",
    ]


def test_a_site_names_its_model_only_where_models_differ() -> None:
    assert sites([described("0"), described("1", hook_name="b")]) == ["a", "b"]
    assert sites([described("0"), described("1", model="two")]) == ["one a", "two a"]
