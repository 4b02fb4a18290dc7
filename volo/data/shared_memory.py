"""Whether /dev/shm has room for the batches that workers read ahead.

Workers hand batches over in shared memory. Where it is full they die of a bus error in the middle of a run; a
container has 64 MB unless told otherwise. So it is compared, before the first step, with what will be needed.
"""

import os
import shutil
from dataclasses import dataclass

from volo.data.workers import PREFETCHED_BATCHES

_FOLDER = "/dev/shm"


@dataclass(frozen=True)
class ReadAhead:
    """What one loader of this process keeps in shared memory at most.

    Args:
        workers: Its worker processes.
        batch_bytes: Bytes of one of its batches.
    """

    workers: int
    batch_bytes: int

    @property
    def bytes(self) -> int:
        """Those that are read ahead, the one in use and the one being handed over."""
        return (PREFETCHED_BATCHES * self.workers + 2) * self.batch_bytes if self.workers else 0


def lacking_room(loaders: list[ReadAhead], processes: int) -> str | None:
    """Return what is wrong and what to do where ``processes`` of this machine need more than there is; else None."""
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
    advice = f"data.workers {fits}, the most that fit" if fits else "data.workers 0, which needs none"
    whose = f"{processes} processes with {most} data.workers each" if processes > 1 else f"{most} data.workers"
    return (
        f"{_FOLDER} has {_size(free)} free, and the batches that {whose} read ahead need up to {_size(needed)}: "
        f"workers would die of a bus error. In a container give it more: docker run --shm-size={_round_up(needed)}g or "
        "--ipc=host; Kubernetes: an emptyDir of medium Memory on /dev/shm. Or set smaller batches "
        f"(train.device_batch_size, eval.batch_size) or {advice}. Torch's other sharing strategy lies there, too"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _round_up(count: int) -> int:
    """Return gigabytes with room for others, NCCL among them."""
    return int(2 * count / 2**30) + 1
