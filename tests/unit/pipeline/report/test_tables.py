import pyarrow as pa

from pipeline.report import tables


def test_a_token_is_a_column_of_its_own_where_there_is_no_passage_around_it() -> None:
    view = tables.view("logits", "logits", pa.table({"rank": [1], "token": ["<b>"]}))
    assert view.columns == [("rank", "number"), ("token", "text")]
    assert [cell.text for cell in view.rows[0]] == ["1", "<b>"]


def test_lists_are_in_the_files_and_not_on_the_page() -> None:
    table = pa.table({"feature": [3], "tokens": [[1, 2]]})
    assert tables.view("examples", "examples", table).columns == [("feature", "number")]
    assert tables.to_csv(table) == b'feature,tokens\n3,"[1, 2]"\n'
