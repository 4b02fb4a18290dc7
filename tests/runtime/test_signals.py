"""A wish to stop that arrives twice is one wish; a later one ends the process."""

import os
import signal
import time

import pytest

from volo.runtime.signals import StopRequest


@pytest.fixture
def request_to_stop():
    stop = StopRequest()
    yield stop
    stop.restore()


def test_signals_of_one_wish_are_taken_together(request_to_stop):
    assert not request_to_stop.requested
    for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), signum)
    assert request_to_stop.requested


def test_a_later_signal_has_its_usual_effect(request_to_stop, monkeypatch):
    os.kill(os.getpid(), signal.SIGINT)
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_restoring_gives_the_signals_back():
    before = signal.getsignal(signal.SIGTERM)
    StopRequest().restore()
    assert signal.getsignal(signal.SIGTERM) == before
