"""A wish to stop that arrives twice is one wish; a later one ends the process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from volo.runtime.signals import StopRequest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def request_to_stop():
    stop = StopRequest()
    yield stop
    stop.restore()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_each_signal_is_a_wish_to_stop(signum):
    before = signal.getsignal(signum)
    stop = StopRequest()
    try:
        assert signal.getsignal(signum) != before, "it would end the process"
        os.kill(os.getpid(), signum)
        assert stop.requested
    finally:
        stop.restore()
    assert signal.getsignal(signum) == before


def test_a_closed_terminal_means_nothing_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        stop.restore()
        assert not stop.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


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


# A main thread that waits in C, where Python runs no signal handler; a process with 42 has got out of it.
WAITING = """
import ctypes, os, signal, sys, threading, time
from volo.runtime.signals import StopRequest

stop = StopRequest(limit_seconds=0.2, starting=sys.argv[1] == "starting")
pid = os.fork()
if pid == 0:  # like a data worker: its signals are not its parent's
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
os.waitpid(pid, 0)
def signal_later():
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
if sys.argv[1] == "heeded":
    signal_later()
    assert stop.requested
    stop.heed()
    time.sleep(1)
    sys.exit(42)
threading.Thread(target=signal_later, daemon=True).start()
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex)
lock(mutex)  # waits for ever, and no signal interrupts it
"""


@pytest.mark.parametrize("what", ["heeded", "stuck", "starting"])
def test_a_step_that_does_not_end_ends_the_process(what):
    ended = subprocess.run([sys.executable, "-c", WAITING, what], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if what == "heeded":
        assert (ended.returncode, ended.stderr) == (42, "")
    elif what == "starting":
        assert (ended.returncode, ended.stderr) == (75, "")
    else:
        assert ended.returncode == 1, ended.stderr
        assert ended.stderr.startswith("error: the step under way did not end within 0.2 s")
