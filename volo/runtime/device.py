"""Which device a process computes on, and whether the processes' devices fit together."""

import copy
import glob
import logging
import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_logger = logging.getLogger("volo")


def resolve_device(choice: str, local_rank: int = 0) -> torch.device:
    """Return the device for ``train.device``.

    A process that sees one CUDA device takes it whatever its ``local_rank``: some launchers (Slurm with
    --gpus-per-task) show every process its own.

    Raises ValueError if CUDA is requested but missing, or if there are fewer devices than processes.
    """
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise ValueError(f"train.device is 'cuda', but {_missing_cuda()}. Mend that, or use 'cpu' or 'auto'")
    if choice == "cpu" or not available:
        if choice == "auto" and _has_cuda_card() and torch.version.cuda:
            _logger.warning("computing on the CPU: %s. train.device cpu hides this warning", _missing_cuda())
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1:
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise ValueError(
            f"{local_rank + 1} or more processes were started on this machine, which has {count} CUDA devices; "
            f"start at most {count} (torchrun --nproc_per_node={count})"
        )
    return torch.device("cuda", local_rank)


def _has_cuda_card() -> bool:
    """Return whether this machine has NVIDIA cards that the user has not hidden."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and bool(glob.glob("/dev/nvidia[0-9]*"))


def _missing_cuda() -> str:
    """Return why PyTorch may see no CUDA device."""
    if not torch.version.cuda:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    if not _has_cuda_card():
        return "this PyTorch sees no CUDA device"
    return (
        f"this machine has NVIDIA cards and this PyTorch is built for CUDA {torch.version.cuda}, but CUDA does not "
        "start (nvidia-smi shows whether the driver works, and up to which CUDA)"
    )


class Place(NamedTuple):
    """Where a rank computes: kind of device, machine, and what identifies the card ("" for the CPU)."""

    kind: str
    machine: str
    card: str


def place_of(device: torch.device) -> Place:
    """Return the place of a process that computes on ``device``."""
    card = ""
    if device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")  # tells slices of one card apart, if the card does not
        card = f"{torch.cuda.get_device_properties(device).uuid} {visible}"
    return Place(device.type, socket.gethostname(), card)


def require_fitting_places(places: list[Place]) -> None:
    """Raise ValueError if some ranks compute on the CPU and others on CUDA, or two of them on one card.

    Args:
        places: Of every rank, by rank.
    """
    kinds = {place.kind: rank for rank, place in reversed(list(enumerate(places)))}  # the first rank of each kind
    if len(kinds) > 1:
        (one, first), (other, second) = sorted(kinds.items(), key=lambda item: item[1])
        raise ValueError(
            f"rank {first} on {places[first].machine} computes on {one}, rank {second} on {places[second].machine} on "
            f"{other}. Mend CUDA where it does not start (train.device cuda says why), or set train.device cpu"
        )
    users: dict[Place, int] = {}
    for rank, place in enumerate(places):
        if place.card and users.setdefault(place, rank) != rank:
            raise ValueError(
                f"ranks {users[place]} and {rank} on {place.machine} were given the same CUDA device. Start one "
                "process per device (torchrun --nproc_per_node), or show each process one of its own in "
                "CUDA_VISIBLE_DEVICES"
            )


def snapshot(state: dict) -> tuple[dict, Callable[[], None]]:
    """Copy nested containers, with their tensors in host memory, without waiting for the device.

    Returns:
        The copy, and a function that waits until its tensors are there. What is done to the originals later, on the
        same stream, does not change the copy.
    """
    taken: dict = _copied(state)
    if not torch.cuda.is_initialized():
        return taken, lambda: None
    copied = torch.cuda.Event()
    copied.record()
    return taken, copied.synchronize


def _copied(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        host = torch.empty_like(item, device="cpu", pin_memory=item.is_cuda)
        return host.copy_(item.detach(), non_blocking=True)
    if isinstance(item, dict):
        new = copy.copy(item)  # state_dict() returns one with versions of the modules as an attribute
        new.update((name, _copied(value)) for name, value in item.items())
        return new
    if isinstance(item, list | tuple):
        return type(item)(map(_copied, item))
    return item
