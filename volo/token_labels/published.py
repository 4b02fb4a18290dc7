"""Label maps as in the published code, bit for bit: how they follow the pixels, and the dense targets made from them.

The map is flipped with the image and warped on its own coarse grid, with no half-cell offset, no aspect ratio and zeros
outside. Only the image is cropped; the crop's box goes to roi_align with rows and columns exchanged, which pools scores
that were spread over all classes. Do not correct it here: the paper's numbers depend on it.

One of the two geometries of label maps (the other is :mod:`volo.token_labels.aligned`): both have ``ONE_SIZE``,
:func:`transformed` and :func:`collate`, which gives maps of a batch with the methods ``map`` and ``targets``.

B images, C classes, k scores per cell, h x w cells of a map, N = L_h * L_w tokens.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from volo.data.pixels.crop import ResizedCrop
from volo.data.pixels.rand_augment import Op
from volo.data.pixels.transforms import Plan
from volo.token_labels.store import TokenLabelMap
from volo.token_labels.targets import DenseTargets, smoothing_terms

ONE_SIZE = True
"""Whether all maps of a batch need the same number of cells."""


class PublishedMap(NamedTuple):
    """A label map after flip and RandAugment, and where the crop looks in it.

    Args:
        scores: float32 [k, h, w].
        classes: int64 [k, h, w].
        box: float32 [4], in cells, passed to roi_align as (x1, y1, x2, y2).
    """

    scores: np.ndarray
    classes: np.ndarray
    box: np.ndarray


class PublishedMaps(NamedTuple):
    """The maps of a batch, on the host or on the device: scores [B, k, h, w], classes [B, k, h, w], boxes [B, 4]."""

    scores: Tensor
    classes: Tensor
    boxes: Tensor

    @classmethod
    def collate(cls, samples: Sequence[PublishedMap]) -> "PublishedMaps":
        """Stack samples; their maps have one size, which is checked before the first step."""
        return cls(*(torch.from_numpy(np.stack(column)) for column in zip(*samples, strict=True)))

    def map(self, function) -> "PublishedMaps":
        """Return a copy with ``function`` applied to every tensor."""
        return PublishedMaps(*map(function, self))

    def targets(
        self, truth: Tensor, grid: tuple[int, int], smoothing: float, published_smoothing: bool
    ) -> DenseTargets:
        """Build the targets of the batch; see :func:`dense_targets`."""
        return DenseTargets(dense_targets(self, truth, grid, smoothing, published_smoothing))


def transformed(
    labels: TokenLabelMap,
    plan: Plan,
    image_hw: tuple[int, int],
    out_hw: tuple[int, int],
    grid: tuple[int, int],
    covers: str,
) -> PublishedMap:
    """Return the label map once ``plan`` is applied to the image; arguments as in :func:`aligned.transformed`.

    The published code uses neither the size of the input nor what a map covers.
    """
    return published_map(labels, plan, image_hw)


def collate(samples: Sequence["PublishedMap"]) -> "PublishedMaps":
    """Return the maps of a batch; see :meth:`PublishedMaps.collate`."""
    return PublishedMaps.collate(samples)


def published_map(labels: TokenLabelMap, plan: Plan, image_hw: tuple[int, int]) -> PublishedMap:
    """Flip and warp ``labels``, the map of an image of ``image_hw`` pixels, as ``plan`` says."""
    assert plan.order == "published" and isinstance(plan.crop, ResizedCrop), plan
    scores, classes = labels.scores.astype(np.float32), labels.classes.astype(np.int64)
    if plan.hflip:
        scores, classes = scores[:, :, ::-1], classes[:, :, ::-1]
    if plan.vflip:
        scores, classes = scores[:, ::-1], classes[:, ::-1]
    for op in plan.ops:
        if op.resample is not None:
            scores, classes = warp(scores, classes, op)

    crop = plan.crop
    corners = np.array(
        [crop.top / image_hw[0], crop.left / image_hw[1], crop.height / image_hw[0], crop.width / image_hw[1]],
        dtype=np.float32,
    )
    corners[2:] += corners[:2]
    # (top, left, bottom, right), which roi_align reads as (x, y, x, y). The map's width is used for its height, too.
    box = corners * np.float32(scores.shape[2]) - np.float32(0.5)
    return PublishedMap(np.ascontiguousarray(scores), np.ascontiguousarray(classes), box)


def warp(scores: np.ndarray, classes: np.ndarray, op: Op) -> tuple[np.ndarray, np.ndarray]:
    """Warp planes [k, h, w] to the nearest cell, in cell indices, as the published code warps its labels.

    Outside, scores become 0, and classes are those of the nearest cell on the edge.
    """
    height, width = scores.shape[1:]
    row, column = np.arange(height, dtype=np.float64)[:, None], np.arange(width, dtype=np.float64)
    value = op.args[0]
    if op.name == "ShearX":
        column = column + value * row
    elif op.name == "ShearY":
        row = row + value * column
    elif op.name == "TranslateXRel":
        column = column + value * width
    elif op.name == "TranslateYRel":
        row = row + value * height
    else:
        cos, sin = math.cos(math.radians(value)), math.sin(math.radians(value))
        r, c = row - height / 2, column - width / 2
        row, column = cos * r + sin * c + height / 2, -sin * r + cos * c + width / 2
    nearest_row = (np.minimum(np.maximum(row, 0), height - 1) + 0.5).astype(np.int64)
    nearest_column = (np.minimum(np.maximum(column, 0), width - 1) + 0.5).astype(np.int64)
    inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
    return scores[:, nearest_row, nearest_column] * inside, classes[:, nearest_row, nearest_column]


def dense_targets(
    maps: PublishedMaps, truth: Tensor, grid: tuple[int, int], smoothing: float, published_smoothing: bool
) -> Tensor:
    """Build the published targets [B, C, 2 + N] of a batch (truth, class token, tokens), on the device of ``maps``.

    They take 100 MB for 128 images at 1,000 classes.

    Args:
        maps: The batch's label maps.
        truth: Class targets [B, C] of the images' own labels, smoothed.
        grid: (L_h, L_w).
        smoothing, published_smoothing: See :func:`volo.token_labels.targets.smoothing_terms`.
    """
    from torchvision.ops import roi_align  # its import takes seconds

    batch, num_classes = truth.shape
    spread = maps.scores.new_zeros(batch, num_classes, *maps.scores.shape[2:])
    spread.scatter_(1, maps.classes, maps.scores)  # [B, C, h, w]; the k classes of a cell differ
    numbers = torch.arange(batch, device=maps.boxes.device, dtype=maps.boxes.dtype)
    rois = torch.cat([numbers[:, None], maps.boxes], dim=1)  # [B, 5]
    tokens = roi_align(spread, rois, grid).flatten(2)  # [B, C, N]
    whole = roi_align(spread, rois, (1, 1)).flatten(2)  # [B, C, 1]
    teacher = torch.cat([whole, tokens], dim=2).softmax(1)
    scale, uniform = smoothing_terms(smoothing, num_classes, published_smoothing)
    return torch.cat([truth[..., None], teacher * scale + uniform], dim=2)
