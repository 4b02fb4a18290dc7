"""Crops and erase boxes against torchvision and timm: the same distribution, and the same pixels for the same box."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from volo.data.pixels.crop import ResizedCrop, Shift, draw_erase_box, draw_resized_crop, draw_shift
from volo.data.pixels.decode import from_image
from volo.data.pixels.pillow_render import render
from volo.data.pixels.plan import Plan

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
MODES = {BICUBIC: InterpolationMode.BICUBIC, BILINEAR: InterpolationMode.BILINEAR}
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def draw_many(count: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    crops = [draw_resized_crop(rng, (height, width), SCALE, RATIO, (BICUBIC,)) for _ in range(count)]
    return np.array([(c.top, c.left, c.height, c.width) for c in crops])


def cropped(image: Image.Image, crop: ResizedCrop | Shift, out_hw: tuple[int, int]) -> np.ndarray:
    return render(from_image(image), Plan("timm", crop), out_hw, (0, 0, 0)).transpose(1, 2, 0)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (60, 61), (100, 400), (33, 7)])
def test_boxes_have_torchvisions_distribution(height, width):
    torch.manual_seed(0)
    image, count = torch.empty(3, height, width), 3000
    theirs = np.array([RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(count)])
    ours = draw_many(count, height, width)
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] > 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    for column in range(4):  # means and spreads within 4 standard errors
        a, b = ours[:, column], theirs[:, column]
        error = math.sqrt((a.var() + b.var()) / count) + 1e-9
        assert abs(a.mean() - b.mean()) < 4 * error
        assert abs(a.std() - b.std()) < 0.08 * b.std() + 0.1
    area = ours[:, 2] * ours[:, 3] / (height * width)
    assert area.min() < 0.1


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1), (1, 40), (2, 2), (7, 9)])
def test_the_fallback_is_torchvisions_centre_crop(height, width):
    """No box of this scale fits, so both fall back; the aspect ratio is clamped to the range."""
    image = torch.empty(3, height, width)
    theirs = RandomResizedCrop.get_params(image, (5.0, 5.0), RATIO)
    ours = draw_resized_crop(np.random.default_rng(0), (height, width), (5.0, 5.0), RATIO, (BICUBIC,))
    assert (ours.top, ours.left, ours.height, ours.width) == theirs


@pytest.mark.parametrize("resample", [BICUBIC, BILINEAR])
def test_a_crop_has_torchvisions_pixels(make_picture, resample):
    image = make_picture(0, 61, 47)
    rng = np.random.default_rng(1)
    for _ in range(20):
        crop = draw_resized_crop(rng, (47, 61), SCALE, RATIO, (resample,))
        expected = F.resized_crop(image, crop.top, crop.left, crop.height, crop.width, [32, 48], MODES[resample])
        np.testing.assert_array_equal(cropped(image, crop, (32, 48)), np.asarray(expected))


def test_both_resamplings_are_drawn_equally():
    rng = np.random.default_rng(0)
    drawn = [draw_resized_crop(rng, (50, 50), SCALE, RATIO, (BILINEAR, BICUBIC)).resample for _ in range(2000)]
    assert abs(drawn.count(BICUBIC) - 1000) < 4 * math.sqrt(500)


def test_shift_is_pad_and_crop(make_picture):
    image, pad = make_picture(0, 32, 24), 4
    padded = np.pad(np.asarray(image), ((pad, pad), (pad, pad), (0, 0)))
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(600):
        shift = draw_shift(rng, pad)
        expected = padded[pad + shift.top :, pad + shift.left :][:24, :32]
        np.testing.assert_array_equal(cropped(image, shift, (24, 32)), expected)
        seen.add((shift.top, shift.left))
    assert len(seen) == 81 and max(seen) == (4, 4) and min(seen) == (-4, -4)


def test_shift_resizes_first(make_picture):
    image = make_picture(0, 50, 40)
    out = cropped(image, Shift(2, -3), (24, 32))
    resized = np.asarray(image.resize((32, 24), BICUBIC))
    np.testing.assert_array_equal(out[:22, 3:], resized[2:, :29])
    assert not out[22:].any() and not out[:, :3].any()
    assert draw_shift(np.random.default_rng(0), 0) == Shift(0, 0)


def timm_box(erasing: RandomErasing, height: int, width: int) -> tuple[int, int, int, int]:
    erased = np.argwhere(erasing(torch.ones(3, height, width))[0].numpy() == 0)
    if not len(erased):
        return 0, 0, 0, 0
    return (*erased.min(0), *(erased.max(0) + 1))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 90)])
def test_erase_boxes_have_timms_distribution(height, width):
    random.seed(0)
    rng, count = np.random.default_rng(0), 3000
    erasing = RandomErasing(probability=0.25, mode="const", device="cpu")
    theirs = np.array([timm_box(erasing, height, width) for _ in range(count)])
    ours = np.array([draw_erase_box(rng, (height, width), 0.25) for _ in range(count)])
    for boxes in (ours, theirs):
        assert abs((boxes[:, 2] > 0).mean() - 0.25) < 0.04
    ours, theirs = ours[ours[:, 2] > 0], theirs[theirs[:, 2] > 0]
    statistics = {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "area": lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) / (height * width),
        "log aspect": lambda b: np.log((b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1])),
    }
    for name, of in statistics.items():
        a, b = of(ours), of(theirs)
        error = math.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 4 * error, name
        assert abs(a.std() / b.std() - 1) < 0.15, name
    area = statistics["area"](ours)
    assert area.min() > 0.015 and area.max() < 0.35
    assert (ours[:, 2] <= height).all() and (ours[:, 3] <= width).all()


def test_erase_box_probabilities_and_tiny_images():
    rng = np.random.default_rng(0)
    assert {draw_erase_box(rng, (32, 32), 0.0) for _ in range(200)} == {(0, 0, 0, 0)}
    assert all(draw_erase_box(rng, (32, 32), 1.0)[2] > 0 for _ in range(200))
    for _ in range(500):
        top, left, bottom, right = draw_erase_box(rng, (3, 2), 1.0)
        assert 0 <= top <= bottom <= 3 and 0 <= left <= right <= 2
        assert (bottom > top) == (right > left)
