"""Memory is counted, not run: the bytes that autograd keeps between forward and backward, storages counted once, and
for each parameter 16 bytes of weight, gradient and AdamW's two averages and 4 of the weight average (EMA). 2 GB are
left for work space and batches.
"""

import math
import statistics

import torch
from torch import Tensor, nn

GPUS = (24, 40, 80)  # GB
_BYTES_A_PARAMETER = 16 + 4
_LEFT_FREE = 2e9


def summed(output: Tensor | tuple) -> Tensor:
    """Return the sum of all logits, something to go backward from."""
    return output.float().sum() if isinstance(output, Tensor) else sum(x.float().sum() for x in output)


def kept_bytes(network: nn.Module, images: Tensor, autocast: torch.autocast) -> int:
    """Return the bytes that autograd keeps after a forward pass, those of parameters and images left out."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()} | {images.untyped_storage().data_ptr()}
    kept = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast:
        output = summed(network(images))  # held, so that no storage is freed and counted twice
    assert output.requires_grad
    return sum(kept.values())


def growth_row(
    network: nn.Module, images: Tensor, seconds: dict[str, list[float]], autocast: torch.autocast
) -> dict[str, float | str]:
    """Return what one resolution costs: ms and MB an image, and the batches that fit."""
    row = {f"{what}, ms": round(1000 * statistics.median(times) / len(images), 1) for what, times in seconds.items()}
    parameters = sum(p.numel() for p in network.parameters())
    for mode in ("cheap", "blocks"):
        network.set_recompute(mode)
        row |= memory_row(kept_bytes(network.train(), images, autocast) / len(images), parameters, mode)
    return row


def memory_row(bytes_an_image: float, parameters: int, mode: str) -> dict[str, float | str]:
    """Return MB an image under a mode of recomputation and, for each GPU, the largest batch that fits."""
    room = [gpu * 1e9 - _LEFT_FREE - parameters * _BYTES_A_PARAMETER for gpu in GPUS]
    fits = " / ".join(str(max(0, math.floor(left / bytes_an_image))) for left in room)
    return {
        f"{mode}, MB": round(bytes_an_image / 1e6, 1),
        f"{mode}, batch in {' / '.join(map(str, GPUS))} GB": fits,
    }
