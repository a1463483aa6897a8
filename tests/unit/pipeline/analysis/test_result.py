from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pytest

from pipeline.analysis import AnalysisResult, from_folder, to_files
from storage.errors import CorruptArtifact, NumericsError


def sample() -> AnalysisResult:
    figure = go.Figure(go.Bar(x=np.arange(3), y=np.array([0.5, 1, 2]), customdata=[["<b>", 1], ["é", 2], ["", 3]]))
    figure.update_layout(meta={"caption": "bars"})
    return AnalysisResult(
        {"b": 0.1, "a": 3, "none": None, "word": "below resolution"},
        {"zeta": pa.table({"feature": [1, 2], "text": ["a\n", None]}), "alpha": pa.table({"x": [0.25]})},
        {"second": figure, "first": go.Figure()},
        "How to read “it”.",
    )


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_a_result_comes_back_from_its_files_in_its_order(tmp_path: Path) -> None:
    result = sample()
    write(tmp_path, to_files(result))
    back = from_folder(tmp_path)
    assert back.numbers == result.numbers
    assert back.reading == result.reading
    assert list(back.tables) == ["zeta", "alpha"]
    assert list(back.figures) == ["second", "first"]
    assert back.tables["zeta"].equals(result.tables["zeta"])
    np.testing.assert_array_equal(back.figures["second"].to_dict()["data"][0]["customdata"][1], ["é", 2])
    assert to_files(back) == to_files(result)


def test_equal_results_have_equal_bytes() -> None:
    assert to_files(sample()) == to_files(sample())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(NumericsError, match="ratio"):
        to_files(AnalysisResult({"ratio": value}))


@pytest.mark.parametrize("name", ["numbers.json", "contents.json", "tables/zeta.parquet", "figures/second.json"])
def test_a_damaged_or_missing_file_is_an_error_naming_the_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path, to_files(sample()))
    (tmp_path / name).write_bytes(b"{")
    with pytest.raises(CorruptArtifact, match=tmp_path.name):
        from_folder(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CorruptArtifact):
        from_folder(tmp_path)
