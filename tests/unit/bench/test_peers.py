import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import peer_quality, peer_steps, peer_stores, tables
from bench.peers import environments


def size(load: float, threads: int = 2) -> dict[str, Any]:
    return {
        "l0": 60.0, "seconds": {name: {"median": 1.0, "low": 1.0, "high": 1.0} for name in ("sparsemill", "SAELens")},
        "ratios": {"SAELens": 2.0}, "load": [load, load], "threads": threads, "rounds": 3, "peers": {"saelens": "6"},
        "machine": {"cpu": "a processor", "versions": {"torch": "2"}},
    }  # fmt: skip


def test_one_size_measured_anew_leaves_the_others_and_their_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    earlier = {"seed": 0, "sizes": {"512-4096": size(1), "2048-16384": size(2)}}
    figures = peer_steps.among(earlier, {"seed": 0, "sizes": {"512-4096": size(9)}})
    assert figures["sizes"] == {"512-4096": size(9), "2048-16384": size(2)}
    (tmp_path / "peer_steps.json").write_text(json.dumps(figures))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    tables._blocks.cache_clear()
    page = "".join(
        f"<!-- table: peer_steps {block} -->\n<!-- end of table -->\n" for block in ("machine", *figures["sizes"])
    )
    try:
        shown = tables.with_tables(page)
    finally:
        tables._blocks.cache_clear()
    assert "load average 2.0 to 9.0" in shown
    assert shown.count("| SAELens | 1.000 | 1.000 to 1.000 | 2.0 x |") == 2


def test_sizes_measured_unlike_each_say_how():
    figures = {"sizes": {"512-4096": size(9, threads=4), "2048-16384": size(2)}}
    said = peer_steps.tables(figures)["machine"].split("\n\n")
    assert said[0].startswith("512-4096: a processor, 4 threads")
    assert said[1].startswith("2048-16384: a processor, 2 threads")
    assert said[1].endswith("load average 2.0 to 2.0.")


def run(program: str, l1: float, l0: float, fve: float = 0.5, rate: float = 0.005) -> dict[str, Any]:
    return {"program": program, "l1_coeff": l1, "learning_rate": rate, "l0": l0, "fve": fve, "loss_recovered": fve,
            "cross_entropy": 3.0, "load": [1.0, 1.0]}  # fmt: skip


def quality(*runs: dict[str, Any]) -> dict[str, Any]:
    setting = dict.fromkeys(peer_quality.SETTING, 0) | {"peers": {"saelens": "6"}}
    machine = {"versions": {"torch": "2"}}
    return setting | {"learning_rate": 0.005, "machine": machine, "runs": peer_quality.in_order(runs)}


def test_points_are_read_with_a_learning_rate_or_the_usual_one():
    points = peer_quality.Point.read(["SAELens=0.5,1", "SAELens@3e-4=2"], 0.005)
    assert points == [("SAELens", 0.5, 0.005), ("SAELens", 1, 0.005), ("SAELens", 2, 3e-4)]
    with pytest.raises(ValueError, match=r"'saelens=1' is not PROGRAM\[@RATE\]=L1,L1 with one of sparsemill, SAELens"):
        peer_quality.Point.read(["saelens=1"], 0.005)


def test_quality_at_one_l0_is_interpolated_in_its_logarithm_and_never_extrapolated():
    runs = [run("sparsemill", 2, 10, 0.4), run("sparsemill", 1, 40, 0.8)]
    assert peer_quality.at_l0(runs, 20, "fve") == pytest.approx(0.6)
    assert peer_quality.at_l0(runs, 40, "fve") == pytest.approx(0.8)
    assert peer_quality.at_l0(runs, 41, "fve") is None
    shown = peer_quality.tables(quality(*runs, run("SAELens", 1, 30)))["at-one-l0"]
    assert "| sparsemill | 0.6000 | 0.8000 | 60.00% | 80.00% |" in shown
    assert shown.count("not reached") == 12


def test_the_curves_leave_out_other_learning_rates():
    figures = quality(run("SAELens", 1, 30), run("SAELens", 1, 900, rate=3e-4), run("SAELens", 2, 10))
    assert [one["l0"] for one in peer_quality.curves(figures)["SAELens"]] == [10, 30]


def test_points_trained_alone_take_their_place_among_those_of_the_same_setting():
    earlier = quality(run("sparsemill", 1, 30), run("SAELens", 1, 15))
    found = peer_quality.among(earlier, quality(run("SAELens", 1, 16), run("SAELens", 2, 5)))
    assert [(one["program"], one["l0"]) for one in found["runs"]] == [
        ("SAELens", 16),
        ("SAELens", 5),
        ("sparsemill", 30),
    ]
    with pytest.raises(ValueError, match="steps 0 there, 150 here"):
        peer_quality.among(earlier, quality(run("SAELens", 2, 5)) | {"steps": 150})


def test_a_ratio_of_storing_is_the_median_of_rounds_or_says_that_it_is_of_medians():
    rate = {"median": 30.0, "low": 30.0, "high": 30.0}
    storing: dict[str, Any] = {
        peer_stores.OURS: {"tokens_per_second": rate, "bytes_per_row": 1},
        peer_stores.THEIRS: {"tokens_per_second": rate | {"median": 10.0}, "bytes_per_row": 1},
    }
    figures = {
        "storing": storing | {"load": [0, 1]}, "mixing": {}, "prompts": 1, "threads": 1, "rounds": 1,
        "peers": {"saelens": "6"}, "machine": {"cpu": "a processor", "versions": {"torch": "2"}},
    }  # fmt: skip
    shown = peer_stores.tables(figures)["storing"]
    assert "ours is faster by (ratio of medians)" in shown
    assert "| SAELens, CacheActivationsRunner | 3.0 x |" in shown
    storing[peer_stores.OURS]["ratio"], storing[peer_stores.THEIRS]["ratio"] = 1.0, 2.5
    shown = peer_stores.tables(figures)["storing"]
    assert "of medians" not in shown
    assert "| SAELens, CacheActivationsRunner | 2.5 x |" in shown


def test_an_environment_whose_installation_broke_off_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[list[str]] = []

    def fake(command: list[str], *, check: bool) -> None:
        assert check
        ran.append(command)
        (tmp_path / "saelens" / "bin").mkdir(parents=True, exist_ok=True)  # as venv does, before anything is installed
        if "sae-lens>=6,<7" in command and not full:
            raise subprocess.CalledProcessError(1, command)

    full = False
    monkeypatch.setattr(subprocess, "run", fake)
    with pytest.raises(subprocess.CalledProcessError):
        environments.python_of("saelens", tmp_path)
    full = True
    assert environments.python_of("saelens", tmp_path) == tmp_path / "saelens" / "bin" / "python"
    assert len(ran) == 6
    environments.python_of("saelens", tmp_path)
    assert len(ran) == 6
    monkeypatch.setitem(environments.REQUIREMENTS, "saelens", ["sae-lens>=7,<8"])
    environments.python_of("saelens", tmp_path)
    assert len(ran) == 9


def test_a_topk_autoencoder_keeps_the_largest_features_of_each_row():
    sae = peer_quality.TopK(torch.eye(4), torch.zeros(4), torch.eye(4), torch.zeros(4), k=2)
    rows = torch.tensor([[1.0, 4.0, -5.0, 3.0], [-1.0, 2.0, -3.0, -4.0]])
    assert torch.equal(sae.encode(rows), torch.tensor([[0.0, 4, 0, 3], [0, 2, 0, 0]]))
