from threading import Event
from typing import Any

import httpx
import pytest

from flows import story
from pipeline.progress import Plain, Quiet


class Server:
    """Notes what progress artifacts are told."""

    def __init__(self, *, answers: bool = True):
        self.answers = answers
        self.told: list[tuple[float, str]] = []

    def tell(self, *arguments: Any, description: str) -> str:
        if not self.answers:
            raise httpx.ConnectError("no answer")
        self.told.append((round(arguments[-1], 1), description))
        return "place"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(story, "LISTENER", story.Listener())
    monkeypatch.setattr(story, "create_progress_artifact", server.tell)
    monkeypatch.setattr(story, "update_progress_artifact", server.tell)
    return server


def test_progress_is_told_at_the_start_now_and_then_and_at_the_end(server: Server, monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(story.time, "monotonic", lambda: clock[0])
    with story.InUI(Quiet()).track("train", 40, "steps", start=10) as advance:
        for _ in range(30):
            clock[0] += 0.5
            advance(note="L0 3")
    assert [percent for percent, _ in server.told] == [25, 50, 75, 100, 100]
    assert server.told[0][1] == "train: 10 of 40 steps"
    assert server.told[1][1] == "train: 20 of 40 steps  L0 3"


def test_a_stage_that_fails_leaves_its_progress_where_it_was_told_last(server: Server):
    def fail() -> None:
        with story.InUI(Quiet()).track("train", 40, "steps") as advance:
            advance(30)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert server.told == [(0, "train: 0 of 40 steps")]


def test_a_server_that_does_not_answer_costs_no_work(server: Server, capsys: pytest.CaptureFixture[str]):
    server.answers = False
    with story.InUI(Plain()).track("train", 40, "steps") as advance:
        advance(40)
    assert "train: 40 steps in" in capsys.readouterr().err


def refuse() -> None:
    raise httpx.ConnectError("no answer")


def deny() -> None:
    raise httpx.HTTPStatusError("denied", request=httpx.Request("GET", "http://it"), response=httpx.Response(403))


def test_work_waits_for_a_silent_server_once_and_then_no_more():
    answer = Event()
    listener = story.Listener(patience=0.1)
    first = listener.tell(answer.wait)
    assert first is not None
    assert not first.done()
    assert listener.tell(lambda: None) is None  # the first is without its answer still
    answer.set()
    assert first.result(10) is True
    assert story.Listener().ask(refuse) is None


def test_a_server_that_was_gone_is_told_again_but_not_waited_for_until_it_answers():
    listener, answer = story.Listener(patience=60), Event()
    assert listener.ask(refuse) is None
    later = listener.tell(answer.wait)  # returns at once
    assert later is not None
    assert not later.done()
    answer.set()
    assert later.result(10) is True
    assert listener.ask(lambda: 5) == 5


def test_a_server_that_denies_something_answers():
    listener = story.Listener()
    assert listener.ask(deny) is None
    assert listener.ask(lambda: 5) == 5


def test_a_defect_in_what_is_told_is_no_silence():
    with pytest.raises(ZeroDivisionError):
        story.Listener().ask(lambda: 1 / 0)
