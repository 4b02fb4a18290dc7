"""Memory is counted rather than measured: the bytes that autograd keeps between forward and backward, each storage
once, plus 20 bytes per parameter, 16 for its weight, gradient and AdamW's two averages and 4 for its average (EMA). The
batches are for GPUs of 24 / 40 / 80 GB, 2 GB of which are left for work space and data.
"""

import math

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

GPUS = (24, 40, 80)  # GB
_BYTES_PER_PARAMETER = 16 + 4
_LEFT_FREE = 2e9


def summed(output: Tensor | tuple) -> Tensor:
    """Return the sum of all logits, for a backward pass to start from."""
    return output.float().sum() if isinstance(output, Tensor) else sum(x.float().sum() for x in output)


def kept_bytes(network: nn.Module, images: Tensor, autocast: torch.autocast) -> int:
    """Return the bytes that autograd keeps after a forward pass in training, without parameters and images.

    The pass runs on tensors with shapes but no values, which keep what real ones would: D5 at 512 px takes a second
    and no memory.
    """
    kept: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x  # held, so that no storage is freed and counted twice
        return x

    with FakeTensorMode() as mode:
        state = {name: mode.from_tensor(x) for name, x in (*network.named_parameters(), *network.named_buffers())}
        images = mode.from_tensor(images)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast:
            output = summed(functional_call(network.train(), state, (images,)))
        assert output.requires_grad
        for own in (*state.values(), images):
            kept.pop(own.untyped_storage()._cdata, None)
        return sum(x.untyped_storage().nbytes() for x in kept.values())


def batches(bytes_per_image: float, parameters: int) -> str:
    """Return the largest batch that fits each of the GPUs."""
    room = [gpu * 1e9 - _LEFT_FREE - parameters * _BYTES_PER_PARAMETER for gpu in GPUS]
    return " / ".join(str(max(0, math.floor(left / bytes_per_image))) for left in room)
