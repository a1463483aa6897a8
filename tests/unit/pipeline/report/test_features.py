import base64
import json
import re
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.analysis import AnalysisResult
from pipeline.report import ReportInputs, Section, features, write_report
from tests.planted_features import case_studies, sections

WORDS = ["the", " of", "\n", "<script>", "\u2028", " \U0001f600"]


def unpacked(name: str, files: dict[str, bytes]) -> Any:
    match = re.fullmatch(
        r'sparsemill\.receive\("([\w/-]+)", "([A-Za-z0-9+/=]*)"\);\n', files[f"{name}.js"].decode("ascii")
    )
    assert match is not None
    assert match[1] == name
    return json.loads(zlib.decompress(base64.b64decode(match[2])))


@pytest.fixture(scope="module")
def found() -> list[Section]:
    return sections(150, WORDS)


@pytest.fixture(scope="module")
def files(found: list[Section]) -> dict[str, bytes]:
    table = features.feature_table(found)
    assert table is not None
    return features.explorer_files(table, found)


def section(name: str, **columns: Any) -> Section:
    return Section(name, "analyze-0", {"ultra_low_below": 0.15}, AnalysisResult({}, {"features": pa.table(columns)}))


def test_the_feature_table_joins_by_feature_whatever_the_order_and_whatever_is_missing() -> None:
    joined = features.feature_table(
        [section("kurtosis", feature=[2, 0], a=[20.0, 0.0]), section("enc_dec", feature=[0, 1, 2], b=["x", "y", "z"])]
    )
    assert joined is not None
    assert joined.to_pydict() == {"feature": [0, 1, 2], "a": [0.0, None, 20.0], "b": ["x", "y", "z"]}


def test_columns_of_one_name_stay_apart_unless_they_are_equal() -> None:
    joined = features.feature_table(
        [
            section("kurtosis", feature=[0, 1], a=[1.0, 2.0], same=[5, 6]),
            section("enc_dec", feature=[1, 0], a=[3.0, 4.0], same=[6, 5]),
        ]
    )
    assert joined is not None
    assert joined.to_pydict() == {"feature": [0, 1], "a": [1.0, 2.0], "same": [5, 6], "enc_dec_a": [4.0, 3.0]}


def test_density_gives_each_features_share_of_l0_and_says_which_are_rare() -> None:
    joined = features.feature_table([section("density", feature=[0, 1, 2], density=[0.1, 0.3, 0.6])])
    assert joined is not None
    assert joined["l0_share"].to_pylist() == pytest.approx([0.1, 0.3, 0.6])
    assert joined["rare"].to_pylist() == [True, False, False]
    dead = features.feature_table([section("density", feature=[0], density=[0.0])])
    assert dead is not None
    assert "l0_share" not in dead.column_names


@pytest.mark.parametrize(("rare", "name"), [([True, False], "rare"), ([True, True], "rare_cluster_rare")])
def test_the_ultra_low_of_two_analyses_are_one_column_where_they_agree(rare: list[bool], name: str) -> None:
    density = section("density", feature=[0, 1], density=[0.1, 0.3])
    joined = features.feature_table([density, section("rare_cluster", feature=[0, 1], rare=rare)])
    assert joined is not None
    assert joined.column_names[-1] == name
    assert joined[name].to_pylist() == rare


def test_every_table_that_a_page_offers_is_in_the_folder(found: list[Section]) -> None:
    files = write_report(ReportInputs("t", "p", {}, [], found))
    offered = re.findall(r'href="(tables/[^"]+)" download', files["index.html"].decode())
    assert {f"tables/{name}-features.csv" for name in ("density", "kurtosis", "case_studies")} < set(offered)
    assert "tables/features.parquet" in offered
    shipped = {name for name in files if name.startswith("tables/") and not name.endswith(".js")}
    assert shipped == set(offered)


def test_no_feature_tables_make_no_explorer() -> None:
    assert features.feature_table([Section("geometry", "a", {}, AnalysisResult({}))]) is None


def test_the_explorers_columns_begin_with_what_it_shows_and_keep_five_digits(files: dict[str, bytes]) -> None:
    columns = unpacked("features/columns", files)
    assert [one["name"] for one in columns[:5]] == ["feature", "top_token", "density", "l0_share", "max_activation"]
    shown = {one["name"]: one["shown"] for one in columns}
    assert shown["decoder_kurtosis"]
    assert not shown["nearest_cosine"]
    by_name = {one["name"]: one for one in columns}
    assert by_name["nearest_feature"]["kind"] == "feature"
    density = (np.arange(150) + 1) / 150 / 100
    assert by_name["density"]["values"] == pytest.approx(density, rel=5e-5)
    assert by_name["density"]["values"][6] == 0.00046667


def test_details_of_every_feature_are_in_its_shard_and_say_what_the_tables_say(
    files: dict[str, bytes], found: list[Section]
) -> None:
    tables = found[2].result.tables
    shards = {name for name in files if re.fullmatch(r"features/\d{4}\.js", name)}
    assert shards == {"features/0000.js", "features/0001.js", "features/0002.js"}
    words = unpacked("features/vocabulary", files)
    for feature in (0, 63, 64, 148):
        shard = unpacked(f"features/{feature // 64:04d}", files)
        assert shard["studied"]["feature"] == [one for one in range(150) if one // 64 == feature // 64]
        for kind in ("top", "quantile"):
            rows = [row for row in tables["examples"].to_pylist() if row["feature"] == feature and row["kind"] == kind]
            columns = shard["examples"]
            places = [
                place
                for place, (of, what) in enumerate(zip(columns["feature"], columns["kind"], strict=True))
                if (of, what) == (feature, kind)
            ]
            assert [columns["prompt"][place] for place in places] == [row["prompt"] for row in rows]
            for place, row in zip(places, rows, strict=True):
                assert [words[rank] for rank in columns["tokens"][place]] == [WORDS[token] for token in row["tokens"]]
                assert columns["activations"][place] == pytest.approx(row["activations"], rel=5e-3)
                assert columns["effects"][place] == pytest.approx(row["effects"], rel=5e-3)
        logits = [row for row in tables["logits"].to_pylist() if row["feature"] == feature]
        theirs = [place for place, of in enumerate(shard["logits"]["feature"]) if of == feature]
        found_logits = [(words[shard["logits"]["token"][at]], shard["logits"]["effect"][at]) for at in theirs]
        assert sorted(found_logits) == sorted((row["token"], row["effect"]) for row in logits)


def test_the_vocabulary_has_the_commonest_token_first(files: dict[str, bytes], found: list[Section]) -> None:
    tables = found[2].result.tables
    shown = [
        *tables["examples"]["tokens"].combine_chunks().flatten().to_pylist(),
        *tables["logits"]["token_id"].to_pylist(),
    ]
    counts = np.bincount(shown, minlength=len(WORDS))
    words = unpacked("features/vocabulary", files)
    assert sorted(words) == sorted(WORDS)
    assert [counts[WORDS.index(word)] for word in words] == sorted(counts, reverse=True)


def test_some_features_alone_may_be_studied(found: list[Section]) -> None:
    tables = {
        name: table.filter(pa.compute.equal(table["feature"], 100)) if "feature" in table.column_names else table
        for name, table in case_studies(150, WORDS).tables.items()
    }
    some = [*found[:2], Section("case_studies", "a", {}, AnalysisResult({}, tables))]
    table = features.feature_table(some)
    assert table is not None
    made = features.explorer_files(table, some)
    assert unpacked("features/0001", made)["studied"]["feature"] == [100]
    assert "features/0000.js" not in made


def test_text_of_the_corpus_is_nowhere_in_a_script_as_text(files: dict[str, bytes]) -> None:
    for name, data in files.items():
        if name.endswith(".js"):
            assert b"<" not in data, name
            assert data.isascii(), name


def test_equal_findings_give_equal_bytes(files: dict[str, bytes]) -> None:
    again = sections(150, WORDS)
    table = features.feature_table(again)
    assert table is not None
    assert features.explorer_files(table, again) == files
