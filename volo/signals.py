"""SIGTERM and SIGINT as a wish to stop after the step under way."""

import signal


class StopRequest:
    """Turns true at the first SIGTERM or SIGINT. A second one ends the process at once, as without this."""

    def __init__(self):
        self.requested = False
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, signum, frame) -> None:
        self.requested = True
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
