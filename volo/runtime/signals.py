"""SIGTERM and SIGINT as a request to stop after the current step."""

import os
import signal
import time

# One request often arrives several times: Ctrl-C and schedulers signal every process, and torchrun forwards its own.
_SAME_REQUEST_SECONDS = 5.0


class StopRequest:
    """``requested`` turns true at the first SIGTERM or SIGINT; a separate later signal ends the process at once."""

    def __init__(self):
        self.requested = False
        self._since = 0.0
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, signum, frame) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > _SAME_REQUEST_SECONDS:
            self.restore()
            os.kill(os.getpid(), signum)

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
