"""From a batch on the host to the network's input on the device.

B is the number of images, H and W are height and width.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from volo.data.dataset import Batch


def normalise_and_erase(
    batch: Batch,
    device: torch.device | str,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return images [B, 3, H, W] and labels int64 [B] on ``device``.

    Pixels become (value / 255 - mean) / std; then each erase box is filled with normal noise from its sample's seed.
    Bytes are copied rather than floats, and the host never waits for the device.

    Args:
        batch: The batch; from pinned memory it is copied asynchronously.
        device: The device.
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, in [0, 1].
        dtype: Type of the images returned; the arithmetic is done in float32.
        channels_last: Return the images in channels-last memory format.
    """
    device = torch.device(device)
    offset, scale = _constants(tuple(mean), tuple(std), device)
    images = batch.images.to(device, non_blocking=True)  # uint8 [B, 3, H, W]
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    images = images.float().sub_(offset).div_(scale)
    _erase(images, batch.erase_boxes, batch.noise_seeds)
    return images.to(dtype), batch.labels.to(device, non_blocking=True)


def _erase(images: Tensor, boxes: Tensor, seeds: Tensor) -> None:
    """Fill each box of ``images``, in place, with standard normal noise; boxes and seeds are on the host."""
    rng = torch.Generator(images.device)
    for image, (top, left, bottom, right), seed in zip(images, boxes.tolist(), seeds.tolist(), strict=True):
        if bottom > top:
            rng.manual_seed(seed)
            image[:, top:bottom, left:right] = torch.randn(
                3, bottom - top, right - left, generator=rng, device=images.device
            )


@lru_cache
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return 255 * mean and 255 * std, [3, 1, 1] each; cached, because creating them waits for the device."""
    offset, scale = (torch.tensor(values, device=device).mul_(255).view(3, 1, 1) for values in (mean, std))
    return offset, scale
