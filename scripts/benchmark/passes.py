"""The passes that are timed: forward, forward and backward, and the matrix products of a network alone."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from volo.models.memory import summed

Pass = Callable[[nn.Module, Tensor, torch.autocast], None]


@torch.no_grad()
def forward(network: nn.Module, x: Tensor, autocast: torch.autocast) -> None:
    with autocast:
        network(x)


def forward_backward(network: nn.Module, x: Tensor, autocast: torch.autocast) -> None:
    with autocast:
        total = summed(network(x.detach().requires_grad_(x.shape[1] != 3)))  # images need no gradient, features do
    total.backward()
    network.zero_grad()


class TrainForward(nn.Module):
    """timm's VOLO as it is trained: class and token logits; its own forward uses the token head only in evaluation."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        forward = getattr(self.network, "forward_train", self.network)
        return forward(images)[:2]


def products(network: nn.Module, x: Tensor, autocast: torch.autocast, backward: bool) -> Callable[[], None]:
    """Return a pass of the linear layers and convolutions of ``network`` alone, on inputs of the shapes they get."""
    calls = []

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        data, grad = torch.randn_like(inputs[0]), torch.randn_like(output)
        if not backward and data.ndim == 4 and isinstance(module, nn.Conv2d):
            data = data.contiguous(memory_format=torch.channels_last)  # the faster layout, which ours uses here
        calls.append((module, data.requires_grad_(backward), grad))

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    was_training = network.training
    with torch.no_grad():
        network.train()(x)  # in training every layer is called by itself
    network.train(was_training)
    for hook in hooks:
        hook.remove()

    def step() -> None:
        with torch.set_grad_enabled(backward):
            for module, data, grad in calls:
                with autocast:
                    if isinstance(module, nn.Linear):
                        y = F.linear(data, module.weight)
                    else:
                        y = F.conv2d(data, module.weight, None, module.stride, module.padding)
                if backward:
                    torch.autograd.grad(y, (data, module.weight), grad.to(y.dtype))

    return step


def count_macs(network: nn.Module, images: Tensor) -> int:
    # The counter knows matrix products, but not every fused attention that consists of them.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(images)
    return counter.get_total_flops() // 2
