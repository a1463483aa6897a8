import pytest

from pipeline.progress import Plain


def told(capsys: pytest.CaptureFixture[str], done: int) -> str:
    with Plain().track("survey", 1000, "rows") as advance:
        advance(done)
    return capsys.readouterr().err.strip()


def test_work_that_ended_early_is_not_told_as_done(capsys: pytest.CaptureFixture[str]):
    assert told(capsys, 1000).startswith("survey: 1,000 rows in ")
    assert told(capsys, 240).startswith("survey: 240 rows of 1,000 rows in ")


def test_no_time_left_is_guessed_from_the_first_hundredth(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Plain().track("train", 200, "steps") as advance:
        advance(1)
        advance(1)
    first, second, _ = capsys.readouterr().err.splitlines()
    assert first.strip() == "train: 1 steps of 200 steps, 11 s"
    assert second.strip() == "train: 2 steps of 200 steps, 22 s, about 2178 s left"
