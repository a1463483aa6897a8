import os
import signal
from collections.abc import Iterator

import pytest

from pipeline.interruption import EXIT_TERMINATED, deferred_interruption


class ToldToStopError(BaseException):
    pass


@pytest.fixture
def orchestrated() -> Iterator[None]:
    """A program whose own handler of SIGTERM raises."""

    def handle(*_: object) -> None:
        raise ToldToStopError

    before = signal.signal(signal.SIGTERM, handle)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("orchestrated")
def test_a_deferred_signal_ends_in_the_programs_own_handler():
    with deferred_interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal is signal.SIGTERM
        with pytest.raises(ToldToStopError):
            interruption.stop_if_asked()


@pytest.mark.usefixtures("orchestrated")
def test_a_second_signal_acts_at_once():
    with deferred_interruption():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(ToldToStopError):
            os.kill(os.getpid(), signal.SIGTERM)


def test_without_a_handler_sigterm_exits_and_sigint_interrupts():
    with deferred_interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as exit_:
            interruption.stop_if_asked()
    assert exit_.value.code == EXIT_TERMINATED
    with deferred_interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interruption.stop_if_asked()


def test_nothing_is_raised_where_nobody_asked():
    with deferred_interruption() as interruption:
        interruption.stop_if_asked()
    assert interruption.signal is None
