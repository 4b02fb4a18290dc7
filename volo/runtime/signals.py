"""Signals as a request to stop after the current step, and the end of a process whose step never ends."""

import os
import signal
import threading
import time

from volo.runtime.program import end_at_once, stop_at_once

# One request often arrives several times: Ctrl-C and schedulers signal every process, and torchrun forwards its own.
_SAME_REQUEST_SECONDS = 5.0


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask this process to stop.

    SIGTERM and SIGINT; SIGUSR1, with which Slurm warns of the end of a job; and SIGHUP, the end of a terminal, unless
    the process was started to ignore it, as nohup does.
    """
    asked = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    return asked if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [*asked, signal.SIGHUP]


class StopRequest:
    """``requested`` turns true at the first of :func:`stop_signals`; a separate later one ends the process at once.

    Args:
        limit_seconds: If given, the process is ended with exit code 1 unless :meth:`heed` is called within this time
            after a signal. A main thread that waits for a GPU, or for a process that is gone, never gets to run a
            signal handler, so a thread of its own watches.
        starting: If true, a signal before :meth:`begin` ends the process at once with exit code 75: there is nothing
            to save yet. It needs ``limit_seconds``.
    """

    def __init__(self, limit_seconds: float | None = None, starting: bool = False):
        self.requested = False
        self._starting = starting
        self._since = 0.0
        self._before = {s: signal.signal(s, self._handle) for s in stop_signals()}
        self._heeded = threading.Event()
        self._writer: int | None = None
        if limit_seconds is not None:
            # Python writes the number of a signal to this pipe when it arrives, whatever the main thread does.
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            signal.set_wakeup_fd(self._writer)
            threading.Thread(target=self._watch, args=(reader, limit_seconds), daemon=True).start()

    def _handle(self, signum, frame) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > _SAME_REQUEST_SECONDS:
            self.restore()
            os.kill(os.getpid(), signum)

    def _watch(self, reader: int, limit_seconds: float) -> None:
        signum = 0
        while signum not in self._before:
            arrived = os.read(reader, 1)
            if not arrived:  # the other end was closed
                os.close(reader)
                return
            signum = arrived[0]
        if self._starting:
            stop_at_once()
        if not self._heeded.wait(limit_seconds):
            end_at_once(
                f"the step under way did not end within {limit_seconds:g} s of the signal to stop "
                "(train.stop_timeout_seconds): a GPU or another process of the run does not answer. The last "
                "checkpoint is intact"
            )

    def begin(self) -> None:
        """Say that work begins, which a signal interrupts only where it can be saved."""
        self._starting = False

    def heed(self) -> None:
        """Say that work has stopped; what is left, such as saving a checkpoint, may take as long as it needs."""
        self._heeded.set()

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if self._writer is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._writer)
            self._writer = None


def _forget_wakeup() -> None:
    signal.set_wakeup_fd(-1)


# A forked data worker shares the pipe, and its signals are not its parent's.
os.register_at_fork(after_in_child=_forget_wakeup)
