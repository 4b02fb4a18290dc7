"""Memory order of images and convolution weights."""

from typing import Literal

import torch
from torch import nn

ChannelsLast = bool | Literal["auto"]


def wants_channels_last(choice: ChannelsLast, device: torch.device) -> bool:
    """Resolve ``train.channels_last``; "auto" is true on CUDA, whose convolutions are faster that way."""
    return device.type == "cuda" if choice == "auto" else choice


def convolutions_to_channels_last(model: nn.Module) -> None:
    """Lay out the weights of convolutions, and no other tensor with four dimensions, channels last; in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
