"""SIGTERM and SIGINT as a wish to stop after the step under way."""

import os
import signal
import time

# One wish often arrives several times: Ctrl-C and schedulers signal every process, and torchrun passes its own on.
_SAME_WISH_SECONDS = 5.0


class StopRequest:
    """Turns true at the first SIGTERM or SIGINT. One that comes later, and not with it, ends the process at once."""

    def __init__(self):
        self.requested = False
        self._since = 0.0
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, signum, frame) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > _SAME_WISH_SECONDS:
            self.restore()
            os.kill(os.getpid(), signum)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
