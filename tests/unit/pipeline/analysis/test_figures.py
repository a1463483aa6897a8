import json

import numpy as np
import pytest

from pipeline.analysis import figures
from pipeline.analysis.figures import Series


def test_bars_add_up_to_every_value_with_what_lies_beyond_at_the_edges() -> None:
    values = np.array([-9.0, 0.1, 0.1, 0.9, 9.0, np.nan])
    figure = figures.histogram([Series("all", values, "frequent")], np.linspace(0, 1, 5), caption="c", x_title="x")
    (bars,) = figure.data
    assert sum(entry[1] for entry in bars.customdata) == 5
    assert sum(bars.y) == pytest.approx(1)
    assert bars.customdata[0][1] == 3
    assert bars.customdata[-1][1] == 2


def test_a_bar_names_some_of_its_features() -> None:
    features = np.arange(100, 108)
    series = Series("all", np.r_[np.zeros(7), 0.9], "frequent", features)
    (bars,) = figures.histogram([series], np.linspace(0, 1, 5), caption="c", x_title="x").data
    assert bars.customdata[0][2] == "<br>features 100, 101, 102, 103, 104…"
    assert bars.customdata[-1][2] == "<br>feature 107"


def test_groups_are_shares_of_their_own_and_empty_ones_left_out() -> None:
    groups = [
        Series("few", np.array([0.1, 0.6]), "frequent"),
        Series("many", np.full(10, 0.6), "rare"),
        Series("none", np.zeros(0), "third"),
        Series("random", np.array([0.1, 0.1]), "baseline"),
    ]
    figure = figures.histogram(groups, np.array([0.0, 0.5, 1.0]), caption="c", x_title="x")
    assert [trace.name for trace in figure.data] == ["few (2)", "many (10)", "random (2)"]
    assert list(figure.data[0].y) == [0.5, 0.5]
    assert list(figure.data[1].y) == [1.0]
    assert figure.data[2].type == "scatter"


def test_text_of_a_corpus_is_no_markup_in_a_figure() -> None:
    assert figures.plain('<a href="x">&</a>') == '&lt;a href="x"&gt;&amp;&lt;/a&gt;'
    series = Series("<script>", np.zeros(3), "frequent")
    figure = figures.histogram([series, series], np.array([-1.0, 1.0]), caption="c", x_title="x")
    assert "<script>" not in figure.data[0].hovertemplate


def test_every_colour_of_a_figure_has_a_dark_partner() -> None:
    series = [Series("a", np.zeros(3), "frequent"), Series("b", np.zeros(3), "baseline")]
    figure = figures.histogram(series, np.array([-1.0, 1.0]), caption="c", x_title="x")
    figures.mark_x(figure, 0.0, "here")
    content = json.loads(figure.to_json())
    content["layout"].pop("template")
    colours = {part for part in json.dumps(content).split('"') if part.startswith("#")}
    assert colours
    assert colours <= set(figures.DARK_OF)


def test_light_and_dark_palettes_name_the_same_roles() -> None:
    assert set(figures.LIGHT) == set(figures.DARK)
    assert len(figures.DARK_OF) == len(figures.LIGHT)


def test_many_points_are_drawn_with_webgl() -> None:
    few, many = (
        figures.scatter(np.zeros(n), np.zeros(n), np.arange(n), name="p", role="rare", hover="x") for n in (10, 5000)
    )
    assert (few.type, many.type) == ("scatter", "scattergl")
