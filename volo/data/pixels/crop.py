"""Crops: the random resized crop, the random shift, the centre crop, and the box of random erasing.

A crop is drawn once and applied later without drawing anything. ``image_hw`` and ``out_hw`` are the (height, width) of
the image and of the output, in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

_TRIES = 10
Box = tuple[int, int, int, int]  # left, top, right, bottom, as Pillow has it


class CropWindow(NamedTuple):
    """A crop as a renderer needs it: a box of the image is resized, and the output is a window of the result.

    The output is black where the window extends beyond the resized box.

    Args:
        box: The box of the image, in pixels.
        resized_hw: (height, width) that it is resized to.
        top: Row of the resized box that becomes the first row of the output; may be negative.
        left: Column of the resized box that becomes the first column of the output; may be negative.
        resample: Resampling of the resize.
    """

    box: Box
    resized_hw: tuple[int, int]
    top: int
    left: int
    resample: Image.Resampling


@dataclass(frozen=True)
class ResizedCrop:
    """A box of the image, in pixels from its top left corner, resized to the output."""

    top: int
    left: int
    height: int
    width: int
    resample: Image.Resampling

    def window(self, image_hw: tuple[int, int], out_hw: tuple[int, int]) -> CropWindow:
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        return CropWindow(box, out_hw, 0, 0, self.resample)


@dataclass(frozen=True)
class Shift:
    """The whole image resized to the output size, then moved; uncovered areas are black.

    Args:
        top: Row of the resized image that becomes the first row of the output; a negative one moves the image down.
        left: Column of the resized image that becomes the first column; a negative one moves the image right.
    """

    top: int
    left: int

    def window(self, image_hw: tuple[int, int], out_hw: tuple[int, int]) -> CropWindow:
        return CropWindow(_whole(image_hw), out_hw, self.top, self.left, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class CentreCrop:
    """The centre of the whole image, resized to ``resized_hw``; black around it if that is smaller than the output."""

    resized_hw: tuple[int, int]
    resample: Image.Resampling

    def window(self, image_hw: tuple[int, int], out_hw: tuple[int, int]) -> CropWindow:
        top, left = (_centred(side, out) for side, out in zip(self.resized_hw, out_hw, strict=True))
        return CropWindow(_whole(image_hw), self.resized_hw, top, left, self.resample)


def _whole(image_hw: tuple[int, int]) -> Box:
    return 0, 0, image_hw[1], image_hw[0]


def _centred(side: int, out: int) -> int:
    """Return the first row or column of a centre crop, rounded as in torchvision; negative if it pads."""
    return round((side - out) / 2) if side >= out else -((out - side) // 2)


def draw_resized_crop(
    rng: np.random.Generator,
    image_hw: tuple[int, int],
    scale: Sequence[float],
    ratio: Sequence[float],
    resamples: tuple[Image.Resampling, ...],
) -> ResizedCrop:
    """Draw a box of random area and aspect ratio, with the algorithm of torchvision's and timm's crop.

    After ten boxes that do not fit, the largest centred box of an allowed aspect ratio is taken.

    Args:
        rng: Generator to draw from.
        image_hw: Size of the image.
        scale: Smallest and largest area of the box, as a share of the area of the image.
        ratio: Smallest and largest width / height; drawn log-uniformly.
        resamples: Resamplings to choose from.
    """
    height, width = image_hw
    resample = resamples[rng.integers(len(resamples))]
    logs = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        area = height * width * _uniform(rng, *scale)
        aspect = math.exp(_uniform(rng, *logs))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return ResizedCrop(top, left, box_height, box_width, resample)

    box_width = min(width, max(1, round(height * ratio[1])))
    box_height = min(height, max(1, round(width / ratio[0])))
    return ResizedCrop((height - box_height) // 2, (width - box_width) // 2, box_height, box_width, resample)


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Do the same as rng.uniform in a third of the time."""
    return low + (high - low) * rng.random()


def draw_shift(rng: np.random.Generator, pixels: int) -> Shift:
    """Draw a shift by up to ``pixels`` in each direction, uniform over whole pixels."""
    top, left = rng.integers(-pixels, pixels + 1, size=2)
    return Shift(int(top), int(left))


def draw_erase_box(
    rng: np.random.Generator,
    image_hw: tuple[int, int],
    prob: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> tuple[int, int, int, int]:
    """Draw the box (top, left, bottom, right) of random erasing (arXiv 1708.04896); all zeros for none.

    Algorithm and ranges are timm's: a box that is as high or as wide as the image is rejected, and after ten such boxes
    nothing is erased.

    Args:
        rng: Generator to draw from.
        image_hw: Size of the image to erase from.
        prob: Probability of a box.
        area: Smallest and largest area, as a share of the area of the image.
        aspect: Smallest and largest height / width; drawn log-uniformly.
    """
    none = (0, 0, 0, 0)
    if rng.random() >= prob:
        return none
    height, width = image_hw
    for _ in range(_TRIES):
        target = height * width * _uniform(rng, *area)
        shape = math.exp(_uniform(rng, math.log(aspect[0]), math.log(aspect[1])))
        box_height = round(math.sqrt(target * shape))
        box_width = round(math.sqrt(target / shape))
        if box_height < height and box_width < width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return (top, left, top + box_height, left + box_width) if box_height * box_width else none
    return none
