"""Ranks, and collectives over them that do nothing on a single process.

Host values (counts, flags, meters) travel over gloo on the CPU, so asking never waits for a GPU; gradients travel
over NCCL on CUDA and gloo on the CPU.
"""

import io
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from volo.runtime.device import Place, place_of, require_fitting_places, resolve_device
from volo.runtime.host_memory import keep_freed_memory
from volo.runtime.network import choose_gloo_interface
from volo.runtime.pulse import Pulse
from volo.runtime.rendezvous import join

_pulse: Pulse | None = None


@dataclass(frozen=True)
class World:
    """Who this process is: ``rank`` of ``size``, and the ``device`` it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class OtherRankFailed(Exception):
    """Another process of the run failed and has said why."""


class RendezvousFailed(Exception):
    """The rendezvous of the processes failed, for example because the port is in use."""


def lost_peer(error: Exception) -> str | None:
    """Return the transport's message if ``error`` says that another process is gone or silent, else None."""
    text = str(error)
    if not (isinstance(error, dist.DistError) or "gloo/transport" in text or "Application timeout" in text):
        return None
    reason = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    return reason.split("] ", 1)[-1].split(". ", 1)[0]


def worker_count(asked: int | None) -> int:
    """Return the number of data workers of this process: ``asked``, or by default its share of the cores, 1 to 16."""
    if asked is not None:
        return asked
    return min(max(usable_cores() // processes_here(), 1), 16)


def usable_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_here() -> int:
    """Return how many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def initialise(device_choice: str = "auto", timeout_minutes: float = 30.0) -> World:
    """Join the process group that torchrun describes in the environment; without one, be the only process.

    Args:
        device_choice: "auto", "cuda" or "cpu".
        timeout_minutes: How long a process waits for the others, here and in every collective.

    Raises:
        ValueError: The device is missing, the ranks' devices do not fit together, or no network leads to the other
            machines.
        RendezvousFailed: The processes did not find one another.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = resolve_device(device_choice, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return World(rank=0, size=1, local_rank=0, device=device)
    if int(os.environ["WORLD_SIZE"]) > processes_here():
        choose_gloo_interface(os.environ.get("MASTER_ADDR", ""))
    timeout = timedelta(minutes=timeout_minutes)
    try:
        store, rank, size = join(timeout)
        # Before the groups are made: those of the CPU and of CUDA would wait for one another.
        store.set(f"place/{rank}", json.dumps(place_of(device)))
        places = [Place(*json.loads(place)) for place in store.multi_get([f"place/{r}" for r in range(size)])]
        store.set(f"placed/{rank}", "")
        if rank == 0:  # Its process may serve the store, and is to end after all have read, should the places not fit.
            store.wait([f"placed/{r}" for r in range(size)])
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        require_fitting_places(places)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        global _pulse
        _pulse = Pulse(store, rank, size)
    except RuntimeError as error:  # of the store and of gloo; torch's own classes for them derive from it
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "any interface")
        raise RendezvousFailed(
            f"the rendezvous at {address} through {interface} failed: {str(error).splitlines()[0]}. If the port is in "
            "use, set MASTER_PORT to a free one; on a single machine torchrun --standalone picks one. If the machines "
            "share another network, name its interface in GLOO_SOCKET_IFNAME"
        ) from error
    # A rank that failed at its first check would take the rendezvous down while others are still joining.
    barrier()
    return World(rank=rank, size=size, local_rank=local_rank, device=device)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    global _pulse
    if _pulse is not None:
        _pulse.end()
        _pulse = None
    if dist.is_initialized():
        dist.destroy_process_group()


def note_doing(what: object) -> None:
    """Note what this process does, for messages about it; the text is only made now and then."""
    if _pulse is not None:
        _pulse.doing = what


def silent_ranks() -> str:
    """Return which ranks give no sign of life and what they last did; "" if all do. It takes some seconds."""
    return _pulse.silent() if _pulse is not None else ""


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank, through the host, so that it waits for no GPU."""
    sum_over_ranks([0.0])


def sum_over_ranks(values: list[float]) -> list[float]:
    """Return the sums of ``values`` over ranks, in float64 (exact for counts below 2**53)."""
    return _reduce(values, dist.ReduceOp.SUM)


def max_over_ranks(values: list[float]) -> list[float]:
    """Return the largest of each of ``values`` over ranks."""
    return _reduce(values, dist.ReduceOp.MAX)


def min_over_ranks(values: list[float]) -> list[float]:
    """Return the smallest of each of ``values`` over ranks."""
    return _reduce(values, dist.ReduceOp.MIN)


def _reduce(values: list[float], op) -> list[float]:
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op)
    return tensor.tolist()


def gather_lists(items: list) -> list:
    """Return the concatenation of every rank's ``items`` in rank order, on every rank."""
    if not dist.is_initialized():
        return list(items)
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def broadcast_object(value):
    """Return rank 0's ``value`` on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_state(state: dict | None) -> dict | None:
    """Return rank 0's ``state``, containers and CPU tensors, on every rank; what the others give is ignored.

    Tensors travel one by one, so that no rank ever holds all of them twice.
    """
    if not dist.is_initialized():
        return state
    tensors: list[torch.Tensor] = []
    frame = io.BytesIO()
    if dist.get_rank() == 0:
        pickler = pickle.Pickler(frame)
        pickler.persistent_id = lambda item: _keep_tensor(item, tensors)
        pickler.dump(state)
    frame, shapes = broadcast_object((frame, [(x.shape, x.dtype) for x in tensors]))
    if dist.get_rank() > 0:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
    for tensor in tensors:
        dist.broadcast(tensor.contiguous().flatten().view(torch.uint8), src=0)  # gloo does not know every dtype
    if dist.get_rank() == 0:
        return state
    unpickler = pickle.Unpickler(frame)
    unpickler.persistent_load = tensors.__getitem__
    frame.seek(0)
    return unpickler.load()


def _keep_tensor(item, tensors: list[torch.Tensor]) -> int | None:
    """Take a tensor out of what is pickled; return its place in ``tensors``, None for anything else."""
    if not isinstance(item, torch.Tensor):
        return None
    tensors.append(item)
    return len(tensors) - 1


def on_main(action: Callable, share: Callable = lambda result: result) -> Any:
    """Run ``action`` on rank 0 alone; return its result there and ``share(result)`` on the others.

    What ``action`` raises is raised on rank 0; the others raise OtherRankFailed.
    """
    if not dist.is_initialized():
        return action()
    result = shared = error = None
    if dist.get_rank() == 0:
        try:
            result = action()
            shared = share(result)
        except Exception as caught:  # the other ranks must learn of it before it is raised
            error = caught
    failed, shared = broadcast_object((error is not None, shared))
    if error is not None:
        raise error
    if failed:
        raise OtherRankFailed
    return result if dist.get_rank() == 0 else shared


@torch.no_grad()
def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank rank 0's buffers: the BatchNorm statistics that evaluation reads and checkpoints keep."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def average_in_rank_order(
    _,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[torch.Tensor]:
    """Average gradients over ranks, adding them up in the order of the ranks (a communication hook of DDP, for CPUs).

    The order in which an all-reduce adds depends on the position of a gradient in its bucket, and DDP rearranges the
    buckets after the first step: with three or more ranks, a resumed run would differ in the last bit.
    """
    mine = bucket.buffer()
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    gathered = dist.all_gather(everyones, mine, async_op=True).get_future()

    def average(_) -> torch.Tensor:
        total = everyones[0]
        for other in everyones[1:]:
            total += other
        return total.div_(len(everyones))

    return gathered.then(average)


class StopVote:
    """Agreement of all ranks on the step after which to stop.

    Signals reach ranks at different moments, and a rank that stops alone leaves the others waiting for its
    gradients. Each step starts a reduction of everybody's wish in the background and reads that of the step
    before, so the vote costs no waiting, and every rank sees the same answer after the same step.
    """

    def __init__(self):
        self._pending = None
        self._flag = torch.zeros(1)

    def __call__(self, wish: bool) -> bool:
        """Cast ``wish``; return whether any rank wished to stop in the vote before (on one process: ``wish``)."""
        if not dist.is_initialized():
            return wish
        decision = False
        if self._pending is not None:
            self._pending.wait()
            decision = bool(self._flag.item())
        self._flag = torch.tensor([1.0 if wish else 0.0])
        self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True)
        return decision

    def finish(self, wish: bool) -> bool:
        """Wait for the vote under way, then take and return one last vote that counts everybody's ``wish`` now."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return bool(max_over_ranks([float(wish)])[0])
