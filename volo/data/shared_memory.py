"""Checks before the first step that /dev/shm has room for the batches that workers read ahead.

Workers pass batches in shared memory. If it is full they die of a bus error in the middle of a run, and by default a
container has 64 MB of it.
"""

import os
import shutil
from dataclasses import dataclass

from volo.data.workers import PREFETCHED_BATCHES

_FOLDER = "/dev/shm"


@dataclass(frozen=True)
class ReadAhead:
    """The shared memory that one loader of this process needs.

    Args:
        workers: Its worker processes.
        batch_bytes: Size of one of its batches, in bytes.
    """

    workers: int
    batch_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes of the batches read ahead, of the one in use and of the one being passed."""
        return (PREFETCHED_BATCHES * self.workers + 2) * self.batch_bytes if self.workers else 0


def lacking_room(loaders: list[ReadAhead], processes: int) -> str | None:
    """Return the problem and the remedy if ``processes`` on this machine need more than is free; else None."""
    if not os.path.isdir(_FOLDER):  # not Linux
        return None
    free = shutil.disk_usage(_FOLDER).free
    needed = processes * sum(loader.bytes for loader in loaders)
    if needed <= free:
        return None
    most = max(loader.workers for loader in loaders)
    fits = next(
        n
        for n in range(most - 1, -1, -1)
        if processes * sum(ReadAhead(min(n, each.workers), each.batch_bytes).bytes for each in loaders) <= free
    )
    advice = f"data.workers to at most {fits}" if fits else "data.workers to 0, which needs none"
    whose = f"{processes} processes with {most} data.workers each" if processes > 1 else f"{most} data.workers"
    return (
        f"{_FOLDER} has {_size(free)} free, but the batches that {whose} read ahead need up to {_size(needed)}: "
        f"workers would die of a bus error. Give a container more (docker run --shm-size={_round_up(needed)}g or "
        "--ipc=host; Kubernetes: an emptyDir of medium Memory on /dev/shm), make batches smaller "
        f"(train.device_batch_size, eval.batch_size), or set {advice}. Torch's other sharing strategy uses the same "
        "memory"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _round_up(count: int) -> int:
    """Return gigabytes, with room for other users such as NCCL."""
    return int(2 * count / 2**30) + 1
