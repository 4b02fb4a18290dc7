"""Processes that are started again meet one another, not their predecessors, whoever comes first."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from volo.runtime.rendezvous import meet

PATIENCE = timedelta(seconds=60)


@pytest.fixture
def server():
    """The store of torchrun, which outlives the processes."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)


def client(server) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=PATIENCE)


def attempt(server, order: list[int]) -> list[dist.Store]:
    """Let ranks meet, each but the last once all before it have arrived; return their stores by rank."""
    with ThreadPoolExecutor() as pool:
        stores, names = {}, {}
        for rank in order:
            key = f"arrived/{rank}"
            names[rank] = server.get(key) if server.check([key]) else None
            stores[rank] = pool.submit(meet, client(server), rank, len(order), PATIENCE)
            while rank > 0 and (not server.check([key]) or server.get(key) == names[rank]):
                pass
        return [stores[rank].result() for rank in range(len(order))]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_a_new_attempt_finds_nothing_of_earlier_ones(server, order):
    old = attempt(server, [0, 1, 2])
    for rank, store in enumerate(old):
        store.set(f"address/{rank}", "of a dead process")
    new = attempt(server, order)
    assert not any(store.check([f"address/{rank}"]) for rank in range(3) for store in new)
    for rank, store in enumerate(new):
        store.set(f"address/{rank}", f"of {rank}")
    assert [[store.get(f"address/{rank}") for rank in range(3)] for store in new] == [[b"of 0", b"of 1", b"of 2"]] * 3


def test_rank_0_names_who_is_missing(server):
    with pytest.raises(RuntimeError, match="2 of 3 processes did not come, rank 1 first"):
        meet(client(server), 0, 3, timedelta(0))
