"""From a decoded image to the uint8 array [3, H, W] the network's input is made of.

For training a plan is drawn first and applied afterwards. The plan is the whole truth about what happens to one
sample, so that anything that belongs to its pixels can be led the same way. H, W are the height and width of the
network's input. Normalisation and the noise of random erasing follow on the device.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from volo.config import AugmentConfig
from volo.data.crop import ResizedCrop, Shift, draw_erase_box, draw_resized_crop, draw_shift
from volo.data.rand_augment import Op, parse_rand_augment

_RESAMPLES = {
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
    "bilinear": (Image.Resampling.BILINEAR,),
    "bicubic": (Image.Resampling.BICUBIC,),
}


@dataclass(frozen=True)
class Plan:
    """What happens to one training image.

    Args:
        order: "timm": crop, flip, operations. "reference": flip, operations on the whole image, crop.
        crop: What becomes the output; its box refers to the image as it is when its turn comes.
        hflip: Mirror left and right.
        vflip: Mirror top and bottom.
        ops: RandAugment operations, in order.
        erase: Box (top, left, bottom, right) of the output that noise replaces; all zeros for none.
    """

    order: Literal["timm", "reference"]
    crop: ResizedCrop | Shift
    hflip: bool = False
    vflip: bool = False
    ops: tuple[Op, ...] = ()
    erase: tuple[int, int, int, int] = (0, 0, 0, 0)


class TrainTransform:
    """Draws and applies the augmentation of training images.

    Args:
        config: What is drawn, with which probabilities.
        image_hw: Size of the network's input.

    Raises:
        ValueError: ``augment.rand_augment`` is not understood.
    """

    def __init__(self, config: AugmentConfig, image_hw: tuple[int, int]):
        self.config = config
        self.image_hw = image_hw
        self.rand_augment = parse_rand_augment(config.rand_augment)
        self.resamples = _RESAMPLES[config.interpolation]
        # What geometric operations uncover gets the mean colour, rounded as timm does it: (124, 116, 104).
        self.fill = tuple(min(255, round(255 * value)) for value in config.mean)

    def draw(self, rng: np.random.Generator, width: int, height: int) -> Plan:
        """Draw what happens to an image of ``width`` x ``height`` pixels."""
        config = self.config
        if config.crop == "shift":
            crop = draw_shift(rng, config.shift_pixels)
        else:
            crop = draw_resized_crop(rng, (height, width), config.scale, config.ratio, self.resamples)
        return Plan(
            order=config.order,
            crop=crop,
            hflip=bool(rng.random() < config.hflip),
            vflip=bool(rng.random() < config.vflip),
            ops=self.rand_augment.draw(rng, self.resamples) if self.rand_augment else (),
            erase=draw_erase_box(rng, self.image_hw, config.erase_prob),
        )

    def apply(self, image: Image.Image, plan: Plan) -> np.ndarray:
        """Return the uint8 array [3, H, W] that ``plan`` makes of an RGB image (erasing is left to the device)."""
        if plan.order == "timm":
            image = plan.crop.apply(image, self.image_hw)
        if plan.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if plan.vflip:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        for op in plan.ops:
            image = op.apply(image, self.fill)
        if plan.order == "reference":
            image = plan.crop.apply(image, self.image_hw)
        return to_array(image)


class EvalTransform:
    """Resize and centre crop of evaluation, pixel for pixel as timm evaluates.

    The image is resized, its aspect ratio kept, until it just covers floor(input size / crop_pct); of that the
    centre is taken. With ``crop_pct`` above 1 the resized image is smaller than the input and black is padded
    around it. A non-square input follows timm too: both sides are covered, the tighter one exactly.

    Args:
        image_hw: Size of the network's input.
        crop_pct: Input size over resized size.
        interpolation: Resampling of the resize, "bicubic" or "bilinear".
    """

    def __init__(self, image_hw: tuple[int, int], crop_pct: float, interpolation: str):
        self.image_hw = tuple(image_hw)
        self.cover_hw = tuple(math.floor(side / crop_pct) for side in image_hw)
        self.interpolation = InterpolationMode(interpolation)

    def __call__(self, image: Image.Image) -> np.ndarray:
        image = F.resize(image, self._resized_hw(image.height, image.width), self.interpolation)
        return to_array(F.center_crop(image, self.image_hw))

    def _resized_hw(self, height: int, width: int) -> list[int]:
        cover_height, cover_width = self.cover_hw
        if cover_height == cover_width:
            # The longer side is truncated, as torchvision does it for a square input ...
            longer = int(cover_height * max(height, width) / min(height, width))
            return [longer, cover_width] if height > width else [cover_height, longer]
        # ... and rounded, as timm does it for any other.
        scale = min(height / cover_height, width / cover_width)
        return [round(height / scale), round(width / scale)]


def to_array(image: Image.Image) -> np.ndarray:
    """Return an RGB image as a uint8 array [3, H, W]."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
