import numpy as np
import pyarrow as pa
import pytest

from pipeline.report import tables


def test_a_token_is_a_column_of_its_own_where_there_is_no_passage_around_it() -> None:
    view = tables.view("logits", "logits", pa.table({"rank": [1], "token": ["<b>"]}))
    assert view.columns == [("rank", "number"), ("token", "text")]
    assert [cell.text for cell in view.rows[0]] == ["1", "<b>"]


def test_long_tables_are_files_alone_and_those_of_the_explorer_not_shipped() -> None:
    long = pa.table({"feature": np.zeros(tables.MOST_ROWS + 1, np.int32)})
    assert tables.view("pairs", "pairs", long).place == "file"
    assert tables.view("pairs", "pairs", long.slice(1)).place == "page"
    view = tables.view("case_studies", "logits", long.slice(0, 5), "artifact")
    assert (view.place, view.rows, view.n_rows) == ("artifact", (), 5)


def test_short_tables_and_passages_are_shown_unasked() -> None:
    short = pa.table({"x": list(range(tables.PREVIEW_ROWS))})
    assert tables.view("a", "short", short).open
    assert not tables.view("a", "longer", pa.concat_tables([short, short])).open
    passages = pa.table({name: ["x"] * 40 for name in ("before", "token", "after")})
    assert tables.view("a", "passages", passages).open


def test_white_space_is_made_visible_in_cells_and_kept_in_files() -> None:
    table = pa.table({"token": ["\n\t"]})
    assert tables.view("a", "a", table).rows[0][0].text == "↵⇥"
    assert b"\n\t" in tables.to_csv(table)


def test_columns_for_the_page_have_kinds_rounded_numbers_and_no_lists() -> None:
    table = pa.table(
        {
            "feature": [1, 2],
            "prompt": [3, 4],
            "count": [5, 6],
            "value": [1 / 3, float("nan")],
            "rare": [True, None],
            "token": ["<b>", None],
            "lists": [[1], [2]],
        }
    )
    found = tables.columns(table)
    assert [one["kind"] for one in found] == ["feature", "place", "integer", "number", "flag", "text"]
    assert [one["values"] for one in found][3:] == [[0.33333, None], [True, None], ["<b>", None]]


@pytest.mark.parametrize("digits", [3, 5, 9])
def test_rounding_agrees_with_formatting_at_every_size(digits: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=2000) * 10.0 ** rng.integers(-12, 3, 2000)
    values[:3] = 0, -0.5, 99.9999999
    wanted = [float(f"{value:.{digits}g}") if abs(value) < 10 ** (digits - 1) else round(value) for value in values]
    assert tables.rounded(pa.array(values), digits).to_pylist() == pytest.approx(wanted, rel=1e-12, abs=1e-300)
    assert tables.rounded(pa.array([np.inf, -np.inf, np.nan]), digits).to_pylist() == [None] * 3


def test_lists_are_in_the_files_and_not_on_the_page() -> None:
    table = pa.table({"feature": [3], "tokens": [[1, 2]]})
    assert tables.view("examples", "examples", table).columns == [("feature", "number")]
    assert tables.to_csv(table) == b'feature,tokens\n3,"[1, 2]"\n'
