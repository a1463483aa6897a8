import pytest

from pipeline.progress import Plain


def told(capsys: pytest.CaptureFixture[str], done: int) -> str:
    with Plain().track("survey", 1000, "rows") as advance:
        advance(done)
    return capsys.readouterr().err.strip()


def test_work_that_ended_early_is_not_told_as_done(capsys: pytest.CaptureFixture[str]):
    assert told(capsys, 1000).startswith("survey: 1,000 rows in ")
    assert told(capsys, 240).startswith("survey: 240 rows of 1,000 rows in ")


@pytest.mark.parametrize(
    ("unit", "total", "lines"),
    [
        ("steps", 200, ["train: 1 steps of 200 steps, 11 s", "train: 2 steps of 200 steps, 22 s, about 2178 s left"]),
        ("bytes", 3 * 10**9, ["train: 15.0 MB of 3.0 GB, 11 s", "train: 30.0 MB of 3.0 GB, 22 s, about 2178 s left"]),
    ],
)
def test_no_time_left_is_guessed_from_the_first_hundredth(
    unit: str, total: int, lines: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Plain().track("train", total, unit) as advance:
        advance(total // 200)
        advance(total // 200)
    first, second, last = capsys.readouterr().err.splitlines()
    assert [first.strip(), second.strip()] == lines
    assert last.strip().startswith(lines[1].partition(",")[0])
