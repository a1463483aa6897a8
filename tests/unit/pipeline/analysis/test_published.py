from dataclasses import replace

import pytest

from pipeline.analysis import ANALYSES
from pipeline.analysis.display import percent, show, show_large
from pipeline.analysis.post import POST, PUBLISHED
from pipeline.analysis.published import comparison_note, differences, headline_rows, highlights

DEMO = replace(POST, model="demo", d_in=512, d_sae=2048, train_tokens=4_700_000)


def test_a_run_compares_with_the_post_only_at_the_same_model_site_and_size() -> None:
    assert differences(POST) == []
    assert differences(replace(POST, model="NeelNanda/GELU_1L512W_C4_Code")) == []
    assert differences(DEMO) == ["model", "size"]
    assert differences(replace(POST, hook_name="blocks.0.hook_mlp_out")) == ["site"]
    assert differences(replace(POST, train_tokens=10**8)) == ["size"]


def test_baselines_compare_when_the_shapes_agree_whatever_the_model() -> None:
    def row(rank: int, d_in: int) -> tuple[bool, str]:
        numbers = {"null_space": {"random_mean_theory": 0.75, "rank": rank}}
        *_, baseline, _ = headline_rows(numbers, replace(DEMO, d_in=d_in))
        return baseline.comparable, baseline.why

    assert row(512, 2048) == (True, "same shapes")
    assert row(128, 512) == (False, "other shapes")
    assert row(511, 2048) == (False, "other shapes")
    geometry = {"geometry": {"random_mean": 0.0, "random_variance": 1 / 2048}}
    *_, directions, _ = headline_rows(geometry, DEMO)
    assert (directions.why, directions.here) == ("other shapes", "mean\u00a00, variance\u00a00.000488")
    assert headline_rows(geometry, replace(POST, model="demo"))[-2].comparable


def test_a_part_that_does_not_exist_is_left_out() -> None:
    row, _ = headline_rows({"enc_dec": {"cosine_median_frequent": 0.77, "lower_mode": None}}, POST)
    assert row.here == "median\u00a00.77"


def test_rows_show_both_numbers_and_why_they_do_not_compare() -> None:
    numbers = {"loss_recovered": {"loss_recovered": 0.9412, "mean_ablation_recovered": None}}
    row, *_ = headline_rows(numbers, DEMO)
    assert (row.here, row.post) == ("94.1\u202f%", "92\u202f%")
    assert not row.comparable
    assert row.why == "other model and size"
    assert headline_rows(numbers, POST)[0].comparable
    mean = headline_rows(numbers, POST)[2]
    assert mean.here == "not measured"
    assert not mean.comparable


def test_no_cluster_and_no_null_space_are_said_and_do_not_compare() -> None:
    results = {"rare_cluster": {"cluster": "no cluster", "n_rare": 0}, "null_space": {"applies": "no: another site"}}
    *rows, _ = headline_rows(results, POST)
    assert {row.here for row in rows} == {"no cluster", "does not apply"}
    assert not any(row.comparable for row in rows)


def test_only_analyses_that_were_made_have_rows() -> None:
    assert headline_rows({}, POST) == []
    assert [row.analysis for row in headline_rows({"kurtosis": {"decoder_median": 3.0}}, POST)] == ["kurtosis", "run"]


PUBLISHED_NUMBERS = (
    "92 %", "91 %", "25 %", "about 60 %", "bimodal", "none", "97.5 %", "95 %", "0.96", "92.1 %, 3.9 %, 4.0 %", "1700",
    "median 0.5, modes 0.5 and 0.75", "mean 0.0026, variance 0.002", "mean 0, variance 0.0005", "mean 75 %, std 0.013",
    "wider than random", "2B in about 12 h on one A6000", "1.6B",
)  # fmt: skip


@pytest.mark.parametrize("number", PUBLISHED_NUMBERS)
def test_every_number_of_the_post_has_a_row_once_all_is_measured(number: str) -> None:
    everything = {name: {label.key: 0.5 for label in one.numbers} for name, one in ANALYSES.items()}
    assert any(number in " ".join(row.post.split()) for row in headline_rows(everything, POST))


def test_the_training_stands_beside_the_posts() -> None:
    numbers = {"kurtosis": {"decoder_median": 3.0}}
    last = headline_rows(numbers, DEMO)[-1]
    assert (last.here, last.comparable, last.why) == ("4.7M", False, "other model and size")
    assert headline_rows(numbers, POST)[-1].comparable
    assert headline_rows(numbers, replace(POST, train_tokens=0))[-1].here == "unknown"


def test_every_published_quantity_names_numbers_its_analysis_labels() -> None:
    for item in PUBLISHED:
        keys = {number.key for number in ANALYSES[item.analysis].numbers}
        assert {part.key for part in item.parts} <= keys, item.quantity


def test_the_note_names_both_runs_unless_they_are_one() -> None:
    assert "16,384 features on 2B" in comparison_note(DEMO)
    assert "demo (512 wide" in comparison_note(DEMO)
    assert "one experiment, done twice" in comparison_note(POST)


def test_highlights_leave_out_what_was_not_measured() -> None:
    found = highlights(
        {"density": {"l0": 24.04, "dead_fraction": 0.0, "ultra_low_fraction": 0.02, "n_rows": 1_638_400}}
    )
    assert [item.label for item in found] == ["L0", "ultra-low", "dead"]
    assert found[0].value == "24"
    assert found[2].note == "over 1.64M tokens"
    loss = {
        "loss_recovered": 0.94,
        "loss_recovered_low": 0.93,
        "loss_recovered_high": 0.95,
        "fve": 0.8,
        "norm_ratio": 0.9,
    }
    assert highlights({"loss_recovered": loss})[0].note == "93.0 to 95.0\u202f%"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "plain", "–"),
        ("below resolution", "fraction", "below resolution"),
        (0.0, "fraction", "0\u202f%"),
        (1.0, "fraction", "100\u202f%"),
        (0.99996, "fraction", "100.0\u202f%"),
        (0.00042, "fraction", "0.042\u202f%"),
        (3e-7, "fraction", "3.0e\u22125\u202f%"),
        (16384, "plain", "16,384"),
        (3.14159, "nats", "3.1416"),
        (-0.0026, "plain", "\u22120.0026"),
        (1e-5, "plain", "1e\u22125"),
        (1714.2, "plain", "1,714"),
    ],
)
def test_numbers_as_people_read_them(value: float | str | None, unit: str, text: str) -> None:
    assert show(value, unit) == text  # type: ignore[arg-type]


def test_large_counts_and_per_cents_in_short() -> None:
    assert [show_large(n) for n in (2e9, 4_718_592, 1500, 12)] == ["2B", "4.72M", "1.5k", "12"]
    assert percent(0.5) == "50.0\u202f%"
