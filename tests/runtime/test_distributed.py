"""What ranks do together, in real groups of two and three processes over gloo, and alone."""

import math
import os

import pytest
import torch
from processes import run_group
from torch import nn

from volo.runtime import distributed
from volo.runtime.distributed import OtherRankFailed, StopVote, World, worker_count


class Buffered(nn.Module):
    """A float and an integer buffer and a parameter, all different on every rank."""

    def __init__(self, rank: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), float(rank)))
        self.norm = nn.BatchNorm1d(3)
        self.norm.running_mean += rank + 1
        self.norm.num_batches_tracked += 10 * (rank + 1)


def collectives(rank: int, size: int) -> dict:
    """The answers of every collective on this rank."""
    module = Buffered(rank)
    distributed.broadcast_buffers(module)
    distributed.barrier()
    return {
        "world size": distributed.world_size(),
        "sum": distributed.sum_over_ranks([rank + 1, 0.5, 2.0**52 if rank else 1.0]),
        "max": distributed.max_over_ranks([rank, -rank]),
        "min": distributed.min_over_ranks([rank, -rank, 2.0**53 - 1]),
        "lists": distributed.gather_lists([(rank, i) for i in range(rank % 2 + rank // 2)]),
        "object": distributed.broadcast_object({"from": rank}),
        "buffers": (module.norm.running_mean.tolist(), module.norm.num_batches_tracked.item()),
        "parameter": module.weight.tolist(),
    }


def on_main(rank: int, size: int) -> dict:
    """Actions on rank 0 that succeed, fail, and fail where the others are at the same point again afterwards."""
    ran = []
    results = {
        "result": distributed.on_main(lambda: ran.append(rank) or ("whole", rank), share=lambda result: result[0]),
        "none": distributed.on_main(lambda: None),
    }

    def fail():
        ran.append(rank)
        raise KeyError("no such thing")

    try:
        distributed.on_main(fail)
    except (KeyError, OtherRankFailed) as error:
        results["failure"] = type(error).__name__
    results["afterwards"] = distributed.on_main(lambda: "still in step")
    return results | {"ran": ran}


def votes(rank: int, size: int) -> dict:
    """At which steps of a loop each rank learns of the stop, for wishes at different moments."""

    def loop(wishes_from: dict[int, int], steps: int = 8) -> tuple[int, bool]:
        vote = StopVote()
        step, stopping = 0, False
        while step < steps and not stopping:
            wish = step >= wishes_from.get(rank, steps + 1)
            # Work of different length, so that the ranks are not in step by chance.
            torch.randn(40 * (1 + (rank + step) % 3), 200) @ torch.randn(200, 200)
            step += 1
            stopping = vote(wish)
        late = step > wishes_from.get(rank, steps)
        return step, vote.finish(stopping or late)

    return {
        "nobody": loop({}),
        "rank 0 at once": loop({0: 0}),
        "the last rank in the middle": loop({size - 1: 3}),
        "both, at different steps": loop({0: 5, size - 1: 4}),
        "in the last step": loop({size - 1: 7}),
        "after the last step": loop({0: 8, size - 1: 9}, steps=8),
    }


def awkward_state() -> dict:
    """Containers, and tensors of many types, without elements, without dimensions, in other orders, and shared."""
    shared = torch.arange(3)
    return {
        "floats": [torch.tensor([1.5, math.nan]), torch.tensor(-0.0), torch.ones(2, dtype=torch.bfloat16)],
        "rest": (
            torch.tensor([True, False]),
            torch.tensor(2**60),
            torch.arange(5, dtype=torch.uint8),
            torch.empty(0, 3),
        ),
        "order": torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)[:, :, ::2],
        "shared": {"one": shared, "other": shared},
        "plain": {"lr": 0.1, "betas": (0.9, 0.999), "name": "é", "none": None},
    }


def states(rank: int, size: int) -> tuple[dict | None, dict | None]:
    """What arrives of a state, and of no state."""
    return (
        distributed.broadcast_state(awkward_state() if rank == 0 else None),
        distributed.broadcast_state(None),
    )


def checks(rank: int, size: int) -> dict:
    return {
        "collectives": collectives(rank, size),
        "on_main": on_main(rank, size),
        "states": states(rank, size),
        "votes": votes(rank, size),
    }


@pytest.fixture(scope="module")
def groups() -> dict[int, list]:
    return run_group(checks, sizes=(3, 2))


@pytest.mark.parametrize("size", [2, 3])
def test_collectives(groups, size):
    for rank, found in enumerate(result["collectives"] for result in groups[size]):
        assert found["world size"] == size
        assert found["sum"] == [sum(range(size + 1)), 0.5 * size, (size - 1) * 2.0**52 + 1], "counts are exact"
        assert found["max"] == [size - 1, 0]
        assert found["min"] == [0, 1 - size, 2.0**53 - 1]
        assert found["lists"] == [(1, 0), (2, 0)][: size - 1], "in rank order, empty ones included"
        assert found["object"] == {"from": 0}
        assert found["buffers"] == ([1.0, 1.0, 1.0], 10)
        assert found["parameter"] == [rank, rank], "parameters are none of its business"


@pytest.mark.parametrize("size", [2, 3])
def test_on_main(groups, size):
    for rank, found in enumerate(result["on_main"] for result in groups[size]):
        assert found["result"] == (("whole", 0) if rank == 0 else "whole")
        assert found["none"] is None
        assert found["failure"] == ("KeyError" if rank == 0 else "OtherRankFailed")
        assert found["afterwards"] == "still in step"
        assert found["ran"] == ([0, 0] if rank == 0 else [])


@pytest.mark.parametrize("size", [2, 3])
def test_states_arrive_to_the_bit(groups, size):
    expected = awkward_state()
    for state, nothing in (results["states"] for results in groups[size]):
        assert nothing is None
        assert state["plain"] == expected["plain"] and list(state) == list(expected)
        for name in ("floats", "rest"):
            assert type(state[name]) is type(expected[name])
            for found, wanted in zip(state[name], expected[name], strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
                assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert torch.equal(state["order"], expected["order"]) and torch.equal(state["shared"]["other"], torch.arange(3))
    assert math.copysign(1, groups[size][1]["states"][0]["floats"][1]) == -1


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_stop_after_the_same_step(groups, size):
    expected = {
        "nobody": (8, False),
        "rank 0 at once": (2, True),  # wished during step 1, known to all after step 2
        "the last rank in the middle": (5, True),
        "both, at different steps": (6, True),
        "in the last step": (8, True),
        "after the last step": (8, False),
    }
    assert [result["votes"] for result in groups[size]] == [expected] * size


def test_alone_nothing_is_asked():
    module = Buffered(0)
    distributed.broadcast_buffers(module)
    distributed.barrier()
    distributed.shutdown()
    assert distributed.world_size() == 1
    assert distributed.sum_over_ranks([1, 2.5]) == distributed.max_over_ranks([1, 2.5]) == [1, 2.5]
    assert distributed.min_over_ranks([1]) == [1]
    items = [1, "a"]
    assert distributed.gather_lists(items) == items and distributed.gather_lists(items) is not items
    assert distributed.broadcast_object(items) is items
    assert distributed.on_main(lambda: "done", share=lambda _: "shared") == "done"
    with pytest.raises(KeyError):
        distributed.on_main(lambda: {}["key"])
    vote = StopVote()
    assert [vote(False), vote(True)] == [False, True]
    assert (vote.finish(False), vote.finish(True)) == (False, True)


def test_one_process_is_the_whole_world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = distributed.initialise("cpu")
    assert world == World(0, 1, 0, torch.device("cpu")) and world.is_main
    assert not World(1, 2, 1, torch.device("cpu")).is_main


def test_readers_share_the_cores_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(40)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [worker_count(asked) for asked in (None, 0, 3, 20)] == [16, 0, 3, 20]
    for processes, share in ((2, 16), (5, 8), (24, 1), (64, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert worker_count(None) == share
