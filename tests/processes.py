"""Groups of real processes over gloo, for tests of what ranks do together.

Processes are forked from a server that has imported torch once, so a group starts in well under a second. A check
is a function at module level, ``check(rank, size, *arguments)``, that returns something picklable.
"""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

_SECONDS = 300  # a group that takes longer hangs


def run_group(check: Callable, *arguments, sizes: tuple[int, ...] = (2,)) -> dict[int, list]:
    """Run ``check`` in groups of ``sizes`` processes, one group after the other; return each group's results by rank.

    A failure in any process fails the test, with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm.data", "timm.optim", "timm.utils", "torchvision.transforms"])
    with tempfile.TemporaryDirectory() as folder:
        members = [
            context.Process(target=_member, args=(check, rank, sizes, Path(folder), arguments))
            for rank in range(max(sizes))
        ]
        for member in members:
            member.start()
        for member in members:
            member.join(_SECONDS)
        hanging = [rank for rank, member in enumerate(members) if member.is_alive()]
        for member in members:
            member.kill()
            member.join()
        failures = [path.read_text() for path in sorted(Path(folder).glob("failure-*"))]
        assert not failures, "\n".join(failures)
        assert not hanging, f"ranks {hanging} of {len(members)} hang"
        assert not any(member.exitcode for member in members), [member.exitcode for member in members]
        read = {s: [Path(folder, f"result-{s}-{rank}").read_bytes() for rank in range(s)] for s in sizes}
        return {size: [pickle.loads(data) for data in results] for size, results in read.items()}


def _member(check: Callable, rank: int, sizes: tuple[int, ...], folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    try:
        for size in sizes:
            if rank < size:
                store = dist.FileStore(str(folder / f"store-{size}"), size)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
                result = check(rank, size, *arguments)
                dist.destroy_process_group()
                (folder / f"result-{size}-{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"failure-{rank}").write_text(f"rank {rank} of {size}:\n{traceback.format_exc()}")
        raise
