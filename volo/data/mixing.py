"""MixToken boxes, MixUp, CutMix and their soft targets.

Everything is drawn on the host from a generator that is passed in, and applied by pure functions. The partner of image
i is image B - 1 - i. B is the number of images, C of classes, N of tokens, H and W are height and width; boxes are
(top, left, bottom, right).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from volo.config import MixConfig


@dataclass(frozen=True)
class Mix:
    """How the images of one batch are mixed with their partners.

    Args:
        lam: Share of each image's own label, float64 [B] on the host; 1 does not mix.
        boxes: CutMix box of each image, int64 [B, 4] on the host; all zeros for an image that is blended by ``lam``
            instead (MixUp).
        mode: Whether ratio and box are drawn once per "batch", per "pair" or per image ("elem").
    """

    lam: Tensor
    boxes: Tensor
    mode: str


def draw_mix_token_box(rng: np.random.Generator, grid_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Draw MixToken's box on the final token grid (arXiv 2104.10858); an empty box mixes nothing.

    Lambda is drawn from Beta(1, 1). A side of the box is int(side of the grid * sqrt(1 - lambda)) cells, rounded down
    to an even number; the box is centred on a uniform cell and clipped to the grid.
    """
    share = np.sqrt(1 - rng.beta(1.0, 1.0))
    centre = [int(rng.integers(side)) for side in grid_hw]
    half = [int(side * share) // 2 for side in grid_hw]
    low = [max(c - h, 0) for c, h in zip(centre, half, strict=True)]
    high = [min(c + h, side) for c, h, side in zip(centre, half, grid_hw, strict=True)]
    return low[0], low[1], high[0], high[1]


def draw_mix(
    rng: np.random.Generator, config: MixConfig, batch: int, image_hw: tuple[int, int], epoch: int = 0
) -> Mix | None:
    """Draw the MixUp or CutMix of one batch, with the distribution of timm's ``Mixup``; None if it is off.

    Args:
        rng: Generator to draw from.
        config: Alphas, probabilities and mode.
        batch: B.
        image_hw: Size of the images.
        epoch: Epoch of the run; from ``config.off_epoch`` on nothing is mixed.

    Raises:
        ValueError: B is odd; the middle image would be its own partner.
    """
    if not config.mixes_images or 0 < config.off_epoch <= epoch:
        return None
    if batch % 2:
        raise ValueError(
            f"mix.mixup and mix.cutmix pair the images of a batch, but the batch size per device is odd ({batch}). "
            "Choose train.batch_size and train.device_batch_size so that it is even"
        )
    draws = {"batch": 1, "pair": batch // 2, "elem": batch}[config.mode]
    lam, is_cut = _draw_ratios(rng, config, draws)
    boxes = np.zeros((draws, 4), dtype=np.int64)
    for i in np.flatnonzero(is_cut & (lam < 1)):
        boxes[i] = _draw_cutmix_box(rng, lam[i], image_hw)
        top, left, bottom, right = boxes[i]
        # Clipping makes the box smaller than drawn; the labels follow the clipped area.
        lam[i] = 1 - (bottom - top) * (right - left) / (image_hw[0] * image_hw[1])

    if config.mode == "batch":
        lam, boxes = np.repeat(lam, batch), np.repeat(boxes, batch, axis=0)
    elif config.mode == "pair":
        lam, boxes = np.concatenate([lam, lam[::-1]]), np.concatenate([boxes, boxes[::-1]])
    return Mix(torch.from_numpy(lam), torch.from_numpy(boxes), config.mode)


def apply_mix(images: Tensor, plan: Mix) -> Tensor:
    """Return images [B, 3, H, W] mixed with their partners; the input is not changed."""
    partners = images.flip(0)
    is_cut = (plan.boxes[:, 2:] > plan.boxes[:, :2]).all(1)
    if plan.mode == "batch" and is_cut.all():
        top, left, bottom, right = plan.boxes[0].tolist()
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
        return mixed

    # An empty CutMix box comes with lam 1, so blending by lam is right for it as well.
    own = torch.where(is_cut, 1.0, plan.lam)[:, None, None, None]  # [B, 1, 1, 1]
    mixed = images * _like(own, images) + partners * _like(1 - own, images)
    for i in torch.nonzero(is_cut).flatten().tolist():
        top, left, bottom, right = plan.boxes[i].tolist()
        mixed[i, :, top:bottom, left:right] = partners[i, :, top:bottom, left:right]
    return mixed


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Return targets [B, C] of int64 labels [B]: smoothing / C for every class, plus 1 - smoothing for the label."""
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / num_classes)


def mix_targets(targets: Tensor, plan: Mix) -> Tensor:
    """Return targets [B, C] or [B, C, 2 + N] mixed with those of the partners, in the ratio ``plan.lam``."""
    own = plan.lam.view(-1, *[1] * (targets.ndim - 1))
    return targets * _like(own, targets) + targets.flip(0) * _like(1 - own, targets)


def token_shares(plan: Mix, grid: tuple[int, int], image_hw: tuple[int, int]) -> Tensor:
    """Return the share of the image's own pixels in each token, float64 [B, N], on the host.

    MixUp blends every token by its ratio; CutMix replaces the part of a token under the box. N = rows * columns of
    ``grid``.
    """
    covered = []
    for axis in (0, 1):
        edges = torch.arange(grid[axis] + 1, dtype=torch.float64) * (image_hw[axis] / grid[axis])
        low, high = plan.boxes[:, axis, None].double(), plan.boxes[:, axis + 2, None].double()  # [B, 1]
        overlap = torch.minimum(edges[1:], high) - torch.maximum(edges[:-1], low)  # [B, cells]
        covered.append(overlap.clamp_min(0) / (edges[1:] - edges[:-1]))
    under_box = (covered[0][:, :, None] * covered[1][:, None, :]).flatten(1)  # [B, N]
    is_cut = (plan.boxes[:, 2:] > plan.boxes[:, :2]).all(1)
    return torch.where(is_cut[:, None], 1 - under_box, plan.lam[:, None])


def _draw_ratios(rng: np.random.Generator, config: MixConfig, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return lambda, float64 [count] (1: not mixed), and whether it is for CutMix, bool [count]."""
    if config.mixup and config.cutmix:
        is_cut = rng.random(count) < config.switch_prob
        of_cutmix = rng.beta(config.cutmix, config.cutmix, size=count)
        lam = np.where(is_cut, of_cutmix, rng.beta(config.mixup, config.mixup, size=count))
    else:
        alpha = config.mixup or config.cutmix
        is_cut = np.full(count, config.cutmix > 0)
        lam = rng.beta(alpha, alpha, size=count)
    return np.where(rng.random(count) < config.prob, lam, 1.0), is_cut


def _draw_cutmix_box(rng: np.random.Generator, lam: float, image_hw: tuple[int, int]) -> tuple[int, ...]:
    """Return a box with a share of 1 - lam of the image's area around a uniform centre, clipped to the image."""
    cuts = [int(side * np.sqrt(1 - lam)) for side in image_hw]
    centres = [int(rng.integers(side)) for side in image_hw]
    low = [max(c - cut // 2, 0) for c, cut in zip(centres, cuts, strict=True)]
    high = [min(c + (cut + 1) // 2, side) for c, cut, side in zip(centres, cuts, image_hw, strict=True)]
    return low[0], low[1], high[0], high[1]


def _like(values: Tensor, other: Tensor) -> Tensor:
    return values.to(other.device, other.dtype, non_blocking=True)
