"""What is cheap to compute again is not kept for the backward pass.

The output of a norm, an activation or the outlook operator costs one pass over memory to make, and as much memory to
keep as its input. Where it goes straight into a matrix product, the input alone is kept, and the output is made again
when the product's weight gradient asks for it. A matrix product is made again only where few channels go into it, at
the full grid: bytes spared for its arithmetic, that is where it is cheapest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# none: autograd keeps what it likes; cheap: what costs a few percent of a step; blocks: the inputs of blocks alone.
Recompute = Literal["none", "cheap", "blocks"]


def recomputed(function: Callable[..., Tensor], *inputs: Tensor, norms: tuple[nn.Module, ...] = ()) -> Tensor:
    """Return ``function(*inputs)``, keeping for the backward pass the inputs and nothing that lies in between.

    Recomputation stops as soon as everything that was kept is there again, so a linear layer or convolution at the
    end of ``function`` is not computed twice: its input is all its gradient needs.

    Args:
        function: Draws nothing at random.
        inputs: Tensors it is differentiated by; its parameters it may hold itself.
        norms: BatchNorms in it. Their running statistics are updated the first time only.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _statistics_left_alone(norms)),
    )


@contextmanager
def _statistics_left_alone(norms: tuple[nn.Module, ...]) -> Iterator[None]:
    """Let the running statistics of ``norms`` be copies, which are thrown away."""
    buffers = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, own in zip(norms, buffers, strict=True):
        for name, buffer in own.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, own in zip(norms, buffers, strict=True):
            for name, buffer in own.items():
                setattr(norm, name, buffer)
