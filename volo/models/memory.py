"""How much memory a training step needs, counted rather than measured, and the activation checkpointing that fits."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from volo.models.checkpointing import Recompute
from volo.models.volo import VOLO

# Of each parameter: 16 for its weight, gradient and AdamW's two averages, 4 for its average (EMA).
BYTES_PER_PARAMETER = 16 + 4
# Whole steps of D1 ... D5 on an H100 took 1.12 ... 1.07 times what is counted: logits and work space besides.
_MEASURED_OVER_COUNTED = 1.15

Autocast = Callable[[], contextlib.AbstractContextManager]


def choose_recompute(
    network: VOLO, images: tuple[int, int, int, int], device: torch.device, autocast: Autocast, room: int
) -> tuple[Recompute, int]:
    """Set the network to recompute as little as fits; return that choice and the bytes that a step needs by count.

    Args:
        network: Its recompute mode is changed. Its kernel has been set: to find one here would be counted, too.
        images: The shape of a pass's images, [B, 3, H, W].
        device: Where the pass will run.
        autocast: Returns the context of its forward pass.
        room: Bytes of memory there; if no choice fits, it is "blocks", which needs least.
    """
    choices: tuple[Recompute, ...] = ("none", "cheap", "blocks")
    state = BYTES_PER_PARAMETER * sum(p.numel() for p in network.parameters())
    for choice in choices:
        network.set_recompute(choice)
        needed = int(_MEASURED_OVER_COUNTED * (state + kept_bytes(network, images, device, autocast)))
        if needed <= room:
            break
    return choice, needed


def kept_bytes(network: nn.Module, images: tuple[int, int, int, int], device: torch.device, autocast: Autocast) -> int:
    """Return the bytes that autograd keeps after a forward pass in training, each storage once.

    Parameters, buffers and images do not count. The pass runs on tensors with shapes but no values, which keep what
    real ones would: D5 at 512 px takes a second and no memory, nothing of the network changes, and the device need
    not exist.

    Args:
        network: The network. The kernel of a VOLO has been set.
        images: The shape of the images, [B, 3, H, W].
        device: Where the pass would run.
        autocast: Returns the context of the forward pass.
    """
    kept: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x  # held, so that no storage is freed and counted twice
        return x

    def fake(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device, requires_grad=x.requires_grad)

    training = network.training
    with FakeTensorMode():
        state = {name: fake(x) for name, x in (*network.named_parameters(), *network.named_buffers())}
        batch = torch.empty(images, device=device)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast():
            output = summed(functional_call(network.train(), state, (batch,)))
        assert output.requires_grad
        for own in (*state.values(), batch):
            kept.pop(own.untyped_storage()._cdata, None)
        network.train(training)
        return sum(x.untyped_storage().nbytes() for x in kept.values())


def summed(output: Tensor | tuple) -> Tensor:
    """Return the sum of all logits, for a backward pass to start from."""
    parts = (output,) if isinstance(output, Tensor) else (x for x in output if x is not None)
    return torch.stack([x.float().sum() for x in parts]).sum()
