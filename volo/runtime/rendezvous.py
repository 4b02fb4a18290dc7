"""Where the processes of a run find one another, and what it remembers when torchrun starts them again.

torchrun serves a store that outlives the processes. Those it starts after a failure would find the addresses of their
dead predecessors there and connect to them. Its count of restarts does not tell the attempts apart: each machine has a
count of its own, which a restart on behalf of another machine does not raise.
"""

import time
from datetime import timedelta
from uuid import uuid4

from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

_POLL_SECONDS = 0.02

_store: Store | None = None  # of torchrun; of rank 0, and gone with it, without torchrun


def join(timeout: timedelta) -> tuple[Store, int, int]:
    """Meet the processes that torchrun started together with this one, as the environment describes.

    Returns:
        A store that only these processes share, the rank of this one, and their number.

    Raises:
        RuntimeError: The store cannot be reached, or another process did not come within ``timeout``.
    """
    global _store
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    while isinstance(store, PrefixStore):  # some versions of PyTorch set attempts apart by the count of restarts
        store = store.underlying_store
    _store = store
    return meet(store, rank, size, timeout), rank, size


def remember(fact: str) -> None:
    """Note ``fact`` for processes that torchrun starts in the place of these; without torchrun nothing is noted."""
    if _store is not None:
        _store.set(f"fact/{fact}", "")


def remembers(fact: str) -> bool:
    """Return whether this run has noted ``fact``, in this attempt or an earlier one."""
    return _store is not None and _store.check([f"fact/{fact}"])


def meet(shared: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """Return the part of ``shared`` that belongs to this attempt of all ranks, without the entries of earlier ones.

    Each rank leaves a name that nobody had before, and waits until rank 0 has answered to that name. Rank 0 answers to
    whatever name it finds, also to those of dead processes, until every rank has taken up the answer.
    """
    if rank > 0:
        name = uuid4().hex
        shared.set(f"arrived/{rank}", name)
        store = PrefixStore(shared.get(f"answer/{name}").decode(), shared)
        store.set(f"joined/{rank}", "")
        return store
    attempt = f"attempt/{uuid4().hex}"
    store = PrefixStore(attempt, shared)
    missing, deadline = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if shared.check([f"arrived/{other}"]):
                shared.set(f"answer/{shared.get(f'arrived/{other}').decode()}", attempt)
            if store.check([f"joined/{other}"]):
                missing.remove(other)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"{len(missing)} of {size} processes did not come, rank {min(missing)} first")
        time.sleep(_POLL_SECONDS)
    return store
