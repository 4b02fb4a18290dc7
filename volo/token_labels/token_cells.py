"""Which cells of its label map the tokens of an augmented image take, exactly.

One :class:`~volo.data.pixels.transforms.Plan` per sample says what flip, RandAugment and crop do to the pixels; here
the label map follows the same plan, as a chain of affine maps from the network's input back to the image. Every
token's centre goes through the chain, and the label map is interpolated there between the four cells around it. Points
that leave the image, or any canvas on the way, belong to no cell: such tokens are marked and take no part in the loss.

The result is a :class:`TokenCells`: for each token a few cells of the map and their weights, and for the class token
a weight of every cell. N = L_h * L_w tokens, h x w cells, Q cells per token. Points are (x, y) in [0, 1] of a canvas,
with pixel i covering [i, i + 1).
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from volo.data.pixels.crop import ResizedCrop, Shift
from volo.data.pixels.rand_augment import Op
from volo.data.pixels.transforms import Plan
from volo.token_labels.store import TokenLabelMap

_MAX_POINTS_PER_AXIS = 4


class TokenCells(NamedTuple):
    """What each token takes from the cells of a label map.

    Args:
        scores: float32 [k, h * w], the label map's scores.
        classes: int64 [k, h * w].
        cells: int64 [N, Q], cells of each token.
        weights: float32 [N, Q], their weights; they sum to 1 for a token that lies in the image.
        class_weights: float32 [h * w], weights of the cells in the class token's target.
        valid: bool [N], tokens that see the image.
    """

    scores: np.ndarray
    classes: np.ndarray
    cells: np.ndarray
    weights: np.ndarray
    class_weights: np.ndarray
    valid: np.ndarray


def token_cells(
    labels: TokenLabelMap,
    plan: Plan,
    image_hw: tuple[int, int],
    out_hw: tuple[int, int],
    grid: tuple[int, int],
    covers: str = "whole_image",
) -> TokenCells:
    """Transform ``labels``, the map of an image of ``image_hw`` pixels, by ``plan`` for the tokens of ``grid``.

    Args:
        labels: Label map of the image.
        plan: The augmentation of the pixels.
        image_hw: Size of the image as it was decoded.
        out_hw: Size of the network's input.
        grid: (L_h, L_w), the network's final grid.
        covers: What the map shows: "whole_image", or "center_crop" for the square in the middle of the image, as in
            the published labels. The rest of the image has no label.
    """
    maps = source_maps(plan, image_hw, out_hw)
    return _aligned_cells(labels, maps + [_centre_square(image_hw)] * (covers == "center_crop"), grid)


def source_maps(plan: Plan, image_hw: tuple[int, int], out_hw: tuple[int, int]) -> list[np.ndarray]:
    """Return the affine maps [2, 3] that lead a point of the network's input back to the image, in that order.

    Each map takes a point of one canvas to the canvas before it; the last canvas is the image.
    """
    crop = _crop_map(plan, image_hw, out_hw)
    flips = [_FLIP_X] * plan.hflip + [_FLIP_Y] * plan.vflip
    canvas = image_hw if plan.order == "published" else out_hw
    ops = [m for op in reversed(plan.ops) if (m := op_map(op, canvas)) is not None]
    return [crop, *ops, *flips] if plan.order == "published" else [*ops, *flips, crop]


_FLIP_X = np.array([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
_FLIP_Y = np.array([[1.0, 0.0, 0.0], [0.0, -1.0, 1.0]])


def _crop_map(plan: Plan, image_hw: tuple[int, int], out_hw: tuple[int, int]) -> np.ndarray:
    crop = plan.crop
    if isinstance(crop, ResizedCrop):
        height, width = image_hw
        return np.array([[crop.width / width, 0.0, crop.left / width], [0.0, crop.height / height, crop.top / height]])
    assert isinstance(crop, Shift), crop
    height, width = out_hw
    return np.array([[1.0, 0.0, crop.left / width], [0.0, 1.0, crop.top / height]])


def _centre_square(image_hw: tuple[int, int]) -> np.ndarray:
    """Return where a point of the image lies in the largest square in its middle."""
    height, width = image_hw
    side = min(height, width)
    across, down = width / side, height / side
    return np.array([[across, 0.0, (1 - across) / 2], [0.0, down, (1 - down) / 2]])


def op_map(op: Op, canvas: tuple[int, int]) -> np.ndarray | None:
    """Return where a RandAugment operation takes the content of a point from; None if it only changes colours.

    Pillow's affine transforms look up the input at (a x + b y + c, d x + e y + f) for an output point (x, y) in
    pixels; in units of the canvas the mixed terms carry its aspect ratio.
    """
    if op.resample is None:
        return None
    height, width = canvas
    value = op.args[0]
    if op.name == "ShearX":
        a, b, c, d, e, f = 1.0, value * height / width, 0.0, 0.0, 1.0, 0.0
    elif op.name == "ShearY":
        a, b, c, d, e, f = 1.0, 0.0, 0.0, value * width / height, 1.0, 0.0
    elif op.name == "TranslateXRel":
        a, b, c, d, e, f = 1.0, 0.0, value, 0.0, 1.0, 0.0
    elif op.name == "TranslateYRel":
        a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, value
    else:
        assert op.name == "Rotate", op.name
        cos, sin = math.cos(math.radians(value)), math.sin(math.radians(value))
        a, b, d, e = cos, -sin * height / width, sin * width / height, cos
        c, f = 0.5 - 0.5 * (a + b), 0.5 - 0.5 * (d + e)  # the centre stays where it is
    return np.array([[a, b, c], [d, e, f]])


def follow(maps: list[np.ndarray], points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lead ``points`` [..., 2] through ``maps``; return where they end and whether every canvas contained them."""
    x, y = points[..., 0], points[..., 1]
    inside = np.ones(x.shape, dtype=bool)
    for (a, b, c), (d, e, f) in (matrix.tolist() for matrix in maps):
        x, y = a * x + b * y + c, d * x + e * y + f
        inside &= (np.minimum(x, y) >= 0) & (np.maximum(x, y) <= 1)
    return np.stack([x, y], -1), inside


def _aligned_cells(labels: TokenLabelMap, maps: list[np.ndarray], grid: tuple[int, int]) -> TokenCells:
    height, width = labels.scores.shape[1:]
    # A token that spans several cells of the map is looked up at several points, as roi_align would do.
    per_axis = [
        min(max(math.ceil(n / side - 0.5), 1), _MAX_POINTS_PER_AXIS)
        for n, side in zip((height, width), grid, strict=True)
    ]
    points = _token_points(grid, tuple(per_axis))  # [N, P, 2]
    source, inside = follow(maps, points)
    cells, weights = _between_cells(source, height, width)  # [N, P, 4]
    weights *= inside[..., None]

    seen = inside.sum(1)  # [N]
    num_tokens, num_points = inside.shape
    weights = weights.reshape(num_tokens, -1) / np.maximum(seen, 1)[:, None]
    cells = cells.reshape(num_tokens, -1)
    valid = seen * 2 >= num_points
    class_weights = np.bincount(cells.ravel(), (weights * valid[:, None]).ravel(), minlength=height * width)
    class_weights /= max(valid.sum(), 1)
    return TokenCells(
        labels.scores.reshape(len(labels.scores), -1).astype(np.float32),
        labels.classes.reshape(len(labels.classes), -1).astype(np.int64),
        cells,
        weights.astype(np.float32),
        class_weights.astype(np.float32),
        valid,
    )


@lru_cache
def _token_points(grid: tuple[int, int], per_axis: tuple[int, int]) -> np.ndarray:
    """Return points [N, P, 2], (x, y), spread evenly over each token; P = product of ``per_axis`` (rows, columns)."""
    rows, columns = ((np.arange(side * p) + 0.5) / (side * p) for side, p in zip(grid, per_axis, strict=True))
    rows, columns = rows.reshape(grid[0], per_axis[0]), columns.reshape(grid[1], per_axis[1])
    y = np.broadcast_to(rows[:, None, :, None], (grid[0], grid[1], *per_axis))
    x = np.broadcast_to(columns[None, :, None, :], (grid[0], grid[1], *per_axis))
    return np.stack([x, y], -1).reshape(grid[0] * grid[1], -1, 2)


def _between_cells(points: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the four cells around each point and their bilinear weights, [..., 4] each.

    The centre of cell (i, j) lies at ((j + 0.5) / width, (i + 0.5) / height); beyond the outermost centres the
    outermost cells apply.
    """
    x = np.minimum(np.maximum(points[..., 0] * width - 0.5, 0), width - 1)
    y = np.minimum(np.maximum(points[..., 1] * height - 0.5, 0), height - 1)
    left, top = np.minimum(x.astype(np.int64), max(width - 2, 0)), np.minimum(y.astype(np.int64), max(height - 2, 0))
    dx, dy = x - left, y - top
    cells = np.empty((*x.shape, 4), np.int64)
    cells[..., 0] = top * width + left
    # If the map is one cell wide or high, left and right, or top and bottom, are the same.
    cells[..., 1:] = cells[..., :1] + _beside(height, width)
    weights = np.empty((*x.shape, 4))
    weights[..., 1] = (1 - dy) * dx
    weights[..., 3] = dy * dx
    weights[..., 0] = 1 - dy - weights[..., 1]
    weights[..., 2] = dy - weights[..., 3]
    return cells, weights


@lru_cache
def _beside(height: int, width: int) -> np.ndarray:
    """Return how far the cells to the right, below, and below to the right are from a cell."""
    right, below = min(1, width - 1), width * min(1, height - 1)
    return np.array([right, below, below + right])
