"""Ctrl-C, sent to this very process."""

import os
import signal

import pytest

from nf_pipeline.cli.interrupts import Interrupted, interruptible
from nf_pipeline.driver.stop_request import StopRequest
from nf_pipeline.errors import RunInterrupted


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class PressesWhenFinalised:
    def __del__(self) -> None:
        press_ctrl_c()


def test_first_ctrl_c_asks_and_the_second_one_ends_with_a_hint_how_to_continue(capfd) -> None:
    stop, survived = StopRequest(), False
    with (
        pytest.raises(Interrupted, match=r"nf-pipeline resume \./nf-runs/run") as caught,
        interruptible("nf-pipeline resume ./nf-runs/run", stop),
    ):
        press_ctrl_c()
        survived = stop.is_asked
        press_ctrl_c()
        survived = False
    assert survived
    assert caught.value.exit_code == 130
    assert "Ctrl-C again stops at once" in capfd.readouterr().err


def test_run_that_ends_as_asked_gets_the_same_hint() -> None:
    with pytest.raises(Interrupted, match="with: resume run"), interruptible("resume run", StopRequest()):
        raise RunInterrupted("stopped as asked")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_request_to_terminate_ends_at_once(number: int) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # a Ray of another test may have left its own handler
    try:
        with pytest.raises(Interrupted), interruptible("run", StopRequest()):
            os.kill(os.getpid(), number)
            pytest.fail("still runs")
    finally:
        signal.signal(number, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_python_drops_in_a_finaliser_counts_at_the_next_check() -> None:
    survived = False
    stop = StopRequest()
    stop.ask()
    with pytest.raises(Interrupted), interruptible("run", stop) as check:
        check()
        PressesWhenFinalised()
        survived = True
        check()
    assert survived


def test_handler_is_put_back_and_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interruptible("run", StopRequest()) as check:
            press_ctrl_c()
            check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with interruptible("run", StopRequest()):
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
