"""Label maps that follow the pixels exactly, and the sparse targets made from them.

One of the two geometries of label maps (the other is :mod:`volo.token_labels.published`): both have ``ONE_SIZE``,
:func:`transformed` and :func:`collate`, which gives maps of a batch with the methods ``map`` and ``targets``.

The target of a token is softmax over all C classes of a few pooled teacher scores, every other class scoring 0. So
it is a background probability that all classes share, plus an excess on M listed ones; the [B, C, 2 + N] tensor of
the published code (100 MB for 128 images at 1,000 classes) is never made. B images, C classes, N tokens, k scores per
cell, S = h * w cells, Q cells per token, M = Q * k listed classes per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from volo.data.pixels.transforms import Plan
from volo.token_labels.store import TokenLabelMap
from volo.token_labels.targets import TokenTargets, smoothing_terms
from volo.token_labels.token_cells import TokenCells, token_cells

ONE_SIZE = False
"""Whether all maps of a batch need the same number of cells."""


def transformed(
    labels: TokenLabelMap,
    plan: Plan,
    image_hw: tuple[int, int],
    out_hw: tuple[int, int],
    grid: tuple[int, int],
    covers: str,
) -> TokenCells:
    """Return what each token takes from ``labels`` once ``plan`` is applied to the image.

    Args:
        labels: Label map of the image.
        plan: The augmentation of the pixels.
        image_hw: Size of the decoded image, in pixels.
        out_hw: Size of the network's input, in pixels.
        grid: (L_h, L_w), the network's final grid.
        covers: "whole_image" or "center_crop".
    """
    return token_cells(labels, plan, image_hw, out_hw, grid, covers)


def collate(samples: Sequence[TokenCells]) -> "AlignedMaps":
    """Return the maps of a batch; see :meth:`AlignedMaps.collate`."""
    return AlignedMaps.collate(samples)


@dataclass
class AlignedMaps:
    """The label maps of a batch and what each token takes from them, on the host or on the device.

    See :class:`volo.token_labels.token_cells.TokenCells`.

    Args:
        scores: float32 [B, k, S].
        classes: int64 [B, k, S].
        cells: int64 [B, N, Q].
        weights: float32 [B, N, Q].
        class_weights: float32 [B, S].
        valid: bool [B, N].
    """

    scores: Tensor
    classes: Tensor
    cells: Tensor
    weights: Tensor
    class_weights: Tensor
    valid: Tensor

    @classmethod
    def collate(cls, samples: Sequence[TokenCells]) -> "AlignedMaps":
        """Stack samples; maps and tokens with fewer cells than others are padded with weight 0."""
        columns = {}
        for name in TokenCells._fields:
            arrays = [getattr(sample, name) for sample in samples]
            shape = np.max([array.shape for array in arrays], axis=0)
            stacked: np.ndarray = np.zeros((len(arrays), *shape), dtype=arrays[0].dtype)
            for row, array in zip(stacked, arrays, strict=True):
                row[tuple(slice(side) for side in array.shape)] = array
            columns[name] = torch.from_numpy(stacked)
        return cls(**columns)

    def map(self, function) -> "AlignedMaps":
        """Return a copy with ``function`` applied to every tensor."""
        return AlignedMaps(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    def targets(
        self, truth: Tensor, grid: tuple[int, int], smoothing: float, published_smoothing: bool
    ) -> TokenTargets:
        """Build the targets of the batch, on the device of the maps.

        Args:
            truth: Class targets [B, C] of the images' own labels, smoothed.
            grid: (L_h, L_w); the cells of each token were chosen for it already.
            smoothing, published_smoothing: See :func:`volo.token_labels.targets.smoothing_terms`.
        """
        return token_targets(self, truth, smoothing, published_smoothing)


def token_targets(labels: AlignedMaps, truth: Tensor, smoothing: float, published_smoothing: bool) -> TokenTargets:
    """Build the targets of a batch, on the device that ``labels`` is on.

    Args:
        labels: The batch's label maps.
        truth: Class targets [B, C] of the images' own labels, smoothed.
        smoothing, published_smoothing: See :func:`volo.token_labels.targets.smoothing_terms`.
    """
    num_classes = truth.shape[1]
    scale, uniform = smoothing_terms(smoothing, num_classes, published_smoothing)

    batch, num_tokens, per_token = labels.cells.shape
    k = labels.scores.shape[1]
    flat = labels.cells.reshape(batch, 1, -1).expand(-1, k, -1)  # [B, k, N * Q]
    entries = (batch, k, num_tokens, per_token)
    scores = labels.scores.gather(2, flat).reshape(entries) * labels.weights[:, None]  # [B, k, N, Q]
    classes = labels.classes.gather(2, flat).reshape(entries)
    scores = scores.permute(0, 2, 3, 1).flatten(2)  # [B, N, M]
    classes = classes.permute(0, 2, 3, 1).flatten(2)  # [B, N, M]
    classes, pooled, listed = _sum_by_class(classes, scores)

    # softmax over C classes, all of which score 0 but for the listed ones
    top = pooled.amax(-1, keepdim=True).clamp_min(0)  # [B, N, 1]
    powers = torch.where(listed, (pooled - top).exp(), 0)
    rest = (-top).exp()  # of each class that is not listed
    total = powers.sum(-1, keepdim=True) + (num_classes - listed.sum(-1, keepdim=True)) * rest
    background = rest / total  # [B, N, 1]
    excess = torch.where(listed, powers / total - background, 0)

    seen = labels.valid.to(truth.dtype)  # [B, N]
    full_mass = scale + num_classes * uniform
    return TokenTargets(
        truth=truth,
        teacher=_teacher_targets(labels, num_classes) * scale + uniform,
        classes=classes,
        excess=scale * excess * seen[..., None],
        background=(scale * background.squeeze(-1) + uniform) * seen,
        mass=full_mass * seen,
        full_mass=full_mass,
    )


def _teacher_targets(labels: AlignedMaps, num_classes: int) -> Tensor:
    """Return softmax of the scores pooled over the whole crop, [B, C]."""
    pooled = labels.scores.new_zeros(len(labels.scores), num_classes)
    weighted = labels.scores * labels.class_weights[:, None]  # [B, k, S]
    return pooled.scatter_add_(1, labels.classes.flatten(1), weighted.flatten(1)).softmax(-1)


def _sum_by_class(classes: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum ``values`` of equal ``classes`` along the last axis.

    Returns classes and sums, of the same shape, and which slots are in use; the others hold class 0 and sum 0.
    """
    classes, order = classes.sort(dim=-1)
    is_new = torch.ones_like(classes, dtype=torch.bool)
    is_new[..., 1:] = classes[..., 1:] != classes[..., :-1]
    slot = is_new.cumsum(-1) - 1
    sums = torch.zeros_like(values).scatter_add_(-1, slot, values.gather(-1, order))
    names = torch.zeros_like(classes).scatter_(-1, slot, classes)
    count = slot[..., -1:] + 1
    return names, sums, torch.arange(classes.shape[-1], device=classes.device) < count
