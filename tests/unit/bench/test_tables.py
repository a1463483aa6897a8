import json
from pathlib import Path

import pytest

from bench import tables

TEXT = "before\n<!-- table: sample-cpu speeds -->\nold\n<!-- end of table -->\nafter\n"


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        @staticmethod
        def tables(figures: dict[str, int]) -> dict[str, str]:
            return {"speeds": tables.markdown(["what", "speed"], figures.items())}

    (tmp_path / "sample-cpu.json").write_text(json.dumps({"a": 1, "b": 2}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "import_module", {"bench.sample": Module}.__getitem__)
    tables._blocks.cache_clear()


@pytest.mark.usefixtures("sample")
def test_only_what_is_between_the_comments_is_written_anew():
    table = "| what | speed |\n| --- | ---: |\n| a | 1 |\n| b | 2 |"
    new = tables.with_tables(TEXT)
    assert new == TEXT.replace("old", f"\n{table}\n")
    assert tables.with_tables(new) == new


@pytest.mark.parametrize("document", sorted(tables.DOCS.glob("*.md")), ids=lambda path: path.name)
def test_the_documents_show_the_figures_of_the_results(document: Path):
    text = document.read_text()
    assert tables.with_tables(text) == text
