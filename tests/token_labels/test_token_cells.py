"""Label maps through the geometry of their images: aligned within half a token, and the published way."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from volo.config import AugmentConfig
from volo.data.pixels.crop import ResizedCrop
from volo.data.pixels.decode import from_image
from volo.data.pixels.plan import Plan
from volo.data.pixels.transforms import TrainTransform
from volo.token_labels.store import TokenLabelMap
from volo.token_labels.token_cells import token_cells

GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def transform(order: str, out_hw: tuple[int, int], crop: str = "random_resized", vflip: float = 0.0) -> TrainTransform:
    """The published augmentation with only the operations that move pixels."""
    made = TrainTransform(
        AugmentConfig(order=order, crop=crop, vflip=vflip, shift_pixels=9, interpolation="bilinear"), out_hw
    )
    made.rand_augment = replace(made.rand_augment, names=GEOMETRIC)
    return made


def position_image(height: int, width: int) -> Image.Image:
    """Red is the position across, green that down; blue is full, and is not in what gets filled in."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[..., 0] = np.round(255 * (np.arange(width) + 0.5) / width)
    pixels[..., 1] = np.round(255 * (np.arange(height) + 0.5) / height)[:, None]
    return Image.fromarray(pixels)


def position_map(height: int, width: int) -> TokenLabelMap:
    """Scores are the position of each cell: class 0 has that across, class 1 that down."""
    across = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    down = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    classes = np.stack([np.zeros((height, width)), np.ones((height, width))])
    return TokenLabelMap(np.stack([across, down]).astype(np.float16), classes.astype(np.int16))


def centre_square_map(image_hw: tuple[int, int]) -> TokenLabelMap:
    """As ``position_map``, of the square in the middle of the image."""
    height, width = image_hw
    side = min(image_hw)
    scores = position_map(18, 18).scores.astype(np.float64)
    across = (scores[0] * side + (width - side) / 2) / width
    down = (scores[1] * side + (height - side) / 2) / height
    return TokenLabelMap(np.stack([across, down]).astype(np.float16), position_map(18, 18).classes)


def disagreement(
    plan: Plan,
    made: TrainTransform,
    image_hw: tuple[int, int],
    grid: tuple[int, int],
    covers: str = "whole_image",
):
    """Distance, in tokens of this crop, between label position and mean colour position of each clean valid token."""
    labels = position_map(18, 18) if covers == "whole_image" else centre_square_map(image_hw)
    found = token_cells(labels, plan, image_hw, made.image_hw, grid, covers)
    at_label = np.einsum("ksq,sq->sk", found.scores[:, found.cells].reshape(2, *found.cells.shape), found.weights)

    out = made.apply(from_image(position_image(*image_hw)), plan).astype(np.float64)  # [3, H, W]
    blocks = out.reshape(3, grid[0], out.shape[1] // grid[0], grid[1], out.shape[2] // grid[1])
    mean = blocks.mean((2, 4)).reshape(3, -1).T / 255  # [N, 3]
    clean = blocks.min((2, 4))[2].ravel() > 250  # nothing filled in under the token
    if isinstance(plan.crop, ResizedCrop):
        size = np.array([plan.crop.width / image_hw[1] / grid[1], plan.crop.height / image_hw[0] / grid[0]])
    else:
        size = np.array([1 / grid[1], 1 / grid[0]])
    distance = np.linalg.norm((at_label - mean[:, :2]) / size, axis=1)
    return distance[clean & found.valid], found.valid, clean


@pytest.mark.parametrize("order", ["published", "timm"])
@pytest.mark.parametrize("image_hw", [(150, 200), (240, 97), (128, 128)])
def test_aligned_labels_follow_the_pixels_within_half_a_token(order, image_hw):
    grid, made, rng = (7, 7), transform(order, (112, 112), vflip=0.3), np.random.default_rng(1)
    means = []
    for _ in range(70):
        plan = made.draw(rng, image_hw[1], image_hw[0])
        distance, _, _ = disagreement(plan, made, image_hw, grid)
        if len(distance):
            means.append(distance.mean())
    assert len(means) > 60
    # The outermost half cell of a map has no neighbour to interpolate with; everywhere else it is near exact.
    assert np.mean(means) < 0.25
    assert np.quantile(means, 0.98) < 0.5


@pytest.mark.parametrize("image_hw", [(150, 200), (240, 97), (128, 128)])
def test_aligned_labels_of_a_centre_crop_lie_where_it_was(image_hw):
    """The published labels show the square in the middle; tokens beside it have no label."""
    grid, made, rng = (7, 7), transform("published", (112, 112)), np.random.default_rng(5)
    means, refused = [], 0
    for _ in range(70):
        plan = made.draw(rng, image_hw[1], image_hw[0])
        distance, valid, clean = disagreement(plan, made, image_hw, grid, covers="center_crop")
        refused += (clean & ~valid).sum()
        if len(distance):
            means.append(distance.mean())
    assert len(means) > 50
    assert np.mean(means) < 0.25
    assert np.quantile(means, 0.98) < 0.5
    # A token half in the square is valid, so on a square image none is refused where its pixels are clean.
    assert (refused > 100) == (image_hw[0] != image_hw[1])


def test_aligned_labels_follow_shifted_pixels():
    made, rng = transform("timm", (64, 64), crop="shift"), np.random.default_rng(2)
    means = []
    for _ in range(40):
        plan = made.draw(rng, 64, 64)
        distance, _, _ = disagreement(plan, made, (64, 64), (8, 8))
        if len(distance):  # two long translations may leave nothing of the image
            means.append(distance.mean())
    assert len(means) > 25
    assert max(means) < 0.5


def test_tokens_outside_the_image_are_invalid():
    made, rng, seen = transform("published", (112, 112)), np.random.default_rng(3), []
    for _ in range(60):
        plan = made.draw(rng, 200, 150)
        _, valid, clean = disagreement(plan, made, (150, 200), (7, 7))
        # A token that is all image is valid, and one that is invalid shows fill.
        assert not (clean & ~valid).any()
        seen.append((~valid).sum())
    assert sum(seen) > 0


def test_weights_are_shares():
    made, rng = transform("timm", (48, 80)), np.random.default_rng(6)
    for shape in ((18, 18), (5, 9), (1, 1), (40, 33)):
        labels = TokenLabelMap(np.zeros((2, *shape), np.float16), np.zeros((2, *shape), np.int16))
        found = token_cells(labels, made.draw(rng, 61, 47), (47, 61), (48, 80), (3, 5))
        np.testing.assert_allclose(found.weights.sum(1)[found.valid], 1, atol=1e-6)
        np.testing.assert_allclose(found.class_weights.sum(), 1, atol=1e-6)
        assert (found.cells >= 0).all() and (found.cells < shape[0] * shape[1]).all()
