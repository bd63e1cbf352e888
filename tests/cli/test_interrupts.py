"""Ctrl-C, sent to this very process."""

import os
import signal

import pytest

from nf_pipeline.cli.interrupts import Interrupted, interruptible


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class PressesWhenFinalised:
    def __del__(self) -> None:
        press_ctrl_c()


def test_ctrl_c_becomes_a_hint_how_to_continue() -> None:
    with (
        pytest.raises(Interrupted, match=r"nf-pipeline resume \./nf-runs/run") as caught,
        interruptible("./nf-runs/run"),
    ):
        press_ctrl_c()
    assert caught.value.exit_code == 130


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_python_drops_in_a_finaliser_counts_at_the_next_check() -> None:
    survived = False
    with pytest.raises(Interrupted), interruptible("run") as check:
        check()
        PressesWhenFinalised()
        survived = True
        check()
    assert survived


def test_handler_is_put_back_and_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interruptible("run") as check:
            press_ctrl_c()
            check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with interruptible("run"):
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
