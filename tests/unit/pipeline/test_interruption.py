import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.interruption import EXIT_TERMINATED, deferred_interruption, ending_in_a_line
from storage.errors import InputError


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


@pytest.mark.usefixtures("orchestrated")  # which puts the handler back
@pytest.mark.parametrize(
    ("ending", "code", "line"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), EXIT_TERMINATED, "terminated; the same command continues"),
        (lambda: signal.raise_signal(signal.SIGINT), 130, "interrupted; the same command continues"),
        (lambda: (_ for _ in ()).throw(InputError("no text", found="''")), 1, "no text; found ''"),
        (lambda: Path("/no/such/place").stat(), 1, "No such file or directory; where: /no/such/place"),
    ],
)
def test_a_program_ends_in_one_line_and_a_code(
    ending: Callable[[], object], code: int, line: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended, ending_in_a_line():
        ending()
    assert ended.value.code == code
    told = capsys.readouterr().err
    assert told.startswith(f"sparsemill: {line}")
    assert told.count("\n") == 1


SWALLOWING = """
import ctypes, os, signal, sys, time
from pipeline.interruption import ending_in_a_line

@ctypes.CFUNCTYPE(None)
def called_by_compiled_code():
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(1)

with ending_in_a_line():
    called_by_compiled_code()  # what it raises is lost
    time.sleep(30)
print("went on")
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_that_compiled_code_swallows_comes_again(number: signal.Signals, code: int):
    command = [
        sys.executable,
        "-c",
        f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{SWALLOWING}",
    ]
    done = subprocess.run([*command, str(int(number))], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == 1
    assert "the same command continues" in done.stderr
