"""Signs of life of every rank, so that one that froze can be named by the others.

A rank that waits for another one in a collective learns in the end only that the wait was too long. So a thread of
every rank counts in the store that the ranks share, beside what its process last did; a process that is stopped, or
whose machine is gone, counts no more.
"""

import json
import os
import socket
import threading
import time

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

INTERVAL_SECONDS = 2.0
_PATIENCE_SECONDS = 10.0  # of a question to the store, whose process may be frozen, too


class Pulse:
    """This process's signs of life, and the look at those of the others.

    Args:
        store: The store that the ranks share.
        rank: This rank.
        size: Number of ranks.
    """

    def __init__(self, store: Store, rank: int, size: int):
        self.doing: object = "starting"  # turned into text by the thread, so that noting it costs nothing
        self._store, self._rank, self._size = store.clone(), rank, size  # a connection of its own
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        beats = 0
        while True:
            beats += 1
            sign = [beats, os.getpid(), socket.gethostname(), str(self.doing)]
            try:
                self._store.set(f"pulse/{self._rank}", json.dumps(sign))
            except RuntimeError:  # the process that serves the store has ended; so will this one
                return
            if self._ended.wait(INTERVAL_SECONDS):
                return

    def end(self) -> None:
        """End the thread, before the interpreter does."""
        self._ended.set()
        self._thread.join(_PATIENCE_SECONDS)

    def silent(self) -> str:
        """Return which other ranks give no sign of life, their processes and what they last did; "" if all do."""
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.append(self._silent()), daemon=True)
        asking.start()
        asking.join(_PATIENCE_SECONDS + 2 * INTERVAL_SECONDS)
        return found[0] if found else "the process of rank 0 gives no sign of life"

    def _silent(self) -> str:
        try:
            before = self._signs()
            time.sleep(2 * INTERVAL_SECONDS)
            after = self._signs()
        except RuntimeError:
            return "the process that serves the rendezvous has ended"
        lost = [
            f"rank {rank} (pid {pid} on {host}, last seen at: {doing})"
            for rank, (beats, pid, host, doing) in after.items()
            if rank != self._rank and before[rank][0] == beats
        ]
        return f"no sign of life from {', '.join(lost)}" if lost else ""

    def _signs(self) -> dict[int, list]:
        signs = self._store.multi_get([f"pulse/{rank}" for rank in range(self._size)])
        return {rank: json.loads(sign) for rank, sign in enumerate(signs)}
