"""Measured figures in sentences are those of ``bench/results``. (Tables: ``tests/unit/bench/test_tables.py``.)"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench import peer_stores

ROOT = Path(__file__).parents[2]


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())


def readme() -> dict[str, str]:
    steps = results("peer_steps")["sizes"]["2048-16384"]
    stores = results("peer_stores")
    (buffer,) = [one["pair_ratio"] for name, one in stores["mixing"].items() if name.startswith("SAELens's")]
    return {
        r"from 2,048 to 16,384 features at L0 (\d+)": f"{steps['l0']:.0f}",
        r"a step ([\d.]+) times as fast as SAELens's in float32": f"{steps['ratios']['SAELens']:.1f}",
        r"([\d.]+) times its compiled autocast": f"{steps['ratios']['SAELens, autocast, compiled']:.1f}",
        r"([\d.]+) times dictionary_learning's": f"{steps['ratios']['dictionary_learning']:.1f}",
        r"([\d.]+) times SAELens's rate": f"{peer_stores.ratio(stores['storing'], peer_stores.THEIRS):.1f}",
        r"its buffer: ([\d,]+) times the same-prompt pairs": f"{buffer:,.0f}",
    }


def orders() -> dict[str, str]:
    found = results("orders")
    exact = found["orders"]["exact"]

    def points(order: str, quality: str) -> str:
        return f"{100 * (exact[quality] - found['orders'][order][quality]):.1f}"

    return {
        r"At these (\d+) steps": f"{found['steps']}",
        r"of the store costs ([\d.]+) points of explained variance": points("half-refilled buffer", "fve"),
        r"no shuffle ([\d.]+), where": points("unshuffled", "fve"),
        r"another seed costs ([\d.]+);": points("exact, another seed", "fve"),
        r"loss recovered falls by ([\d.]+) and": points("half-refilled buffer", "loss_recovered"),
        r"loss recovered falls by [\d.]+ and ([\d.]+) points": points("unshuffled", "loss_recovered"),
    }


def encodings() -> dict[str, str]:
    found = results("encodings")
    exact = found["encodings"][0]["autoencoder"]
    stored = [one["autoencoder"] for one in found["encodings"][1:]]
    other = [found["float32_in_another_order"]]

    def moves(rows: list[Mapping[str, float]], quality: str, scale: float) -> list[float]:
        return [scale * abs(row[quality] - exact[quality]) for row in rows]

    def at_most(quality: str, digits: int, scale: float = 1) -> str:
        return f"{math.ceil(max(moves(stored, quality, scale)) * 10**digits) / 10**digits:.{digits}f}"

    def by(quality: str, digits: int, scale: float = 1) -> str:
        return f"{moves(other, quality, scale)[0]:.{digits}f}"

    return {
        r"no encoding moves L0 by more than ([\d.]+),": at_most("l0", 2),
        r"explained variance by more than ([\d.]+),": at_most("fve", 4),
        r"loss recovered by more than ([\d.]+) points": at_most("loss_recovered", 2, 100),
        r"moves them by ([\d.]+),": by("l0", 2),
        r"moves them by [\d.]+, ([\d.]+) and": by("fve", 4),
        r"moves them by [\d.]+, [\d.]+ and ([\d.]+)": by("loss_recovered", 2, 100),
    }


SENTENCES = [
    *(("README.md", *one) for one in readme().items()),
    *(("docs/performance.md", *one) for one in orders().items()),
    *(("docs/encodings.md", *one) for one in encodings().items()),
]


@pytest.mark.parametrize(("page", "sentence", "figure"), SENTENCES)
def test_a_sentence_has_the_figure_of_the_results(page: str, sentence: str, figure: str) -> None:
    text = " ".join((ROOT / page).read_text().split())
    assert [match.rstrip(".") for match in re.findall(sentence, text)] == [figure]


def test_all_results_say_seed_machine_and_load() -> None:
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        text, nothing_random = path.read_text(), {"overhead.json", "tokenizing.json"}
        assert '"machine"' in text, path.name
        assert '"load"' in text, path.name
        assert path.name in nothing_random or '"seed"' in text, path.name
