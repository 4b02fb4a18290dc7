"""From a decoded image to the uint8 array [3, H, W] the network's input is made of.

For training a plan is drawn first and applied afterwards. The plan is the whole truth about what happens to one
sample, so that anything that belongs to its pixels can be led the same way. H, W are the height and width of the
network's input. Normalisation and the noise of random erasing follow on the device.
"""

import math

import numpy as np
from PIL import Image

from volo.config import AugmentConfig
from volo.data.pixels.backend import Backend
from volo.data.pixels.crop import Box, CentreCrop, draw_erase_box, draw_resized_crop, draw_shift
from volo.data.pixels.decode import from_image
from volo.data.pixels.plan import Plan
from volo.data.pixels.rand_augment import parse_rand_augment

_RESAMPLES = {
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
    "bilinear": (Image.Resampling.BILINEAR,),
    "bicubic": (Image.Resampling.BICUBIC,),
}


class _Transform:
    """Applies plans for one output size with one backend."""

    def __init__(self, image_hw: tuple[int, int], backend: str, fill: tuple[int, int, int]):
        self.image_hw = image_hw
        self.fill = fill
        self.backend = Backend(backend)

    def box_needed(self, plan: Plan, image_hw: tuple[int, int]) -> Box | None:
        """Return the part of an image of ``image_hw`` that :meth:`apply` will read; None for all of it."""
        return self.backend.box_needed(plan, image_hw, self.image_hw)

    def apply(self, pixels: np.ndarray, plan: Plan) -> np.ndarray:
        """Return what ``plan`` makes of an image, uint8 [3, H, W]; erasing is left to the device.

        Args:
            pixels: The image as its ``decode`` or :func:`volo.data.pixels.decode.from_image` returned it. It may be
                overwritten.
            plan: What happens to it.
        """
        return self.backend.render(pixels, plan, self.image_hw, self.fill)


class TrainTransform(_Transform):
    """Draws and applies the augmentation of training images.

    Args:
        config: What is drawn, with which probabilities.
        image_hw: Size of the network's input.

    Raises:
        ValueError: ``augment.rand_augment`` is not understood, or there is no such backend here.
    """

    def __init__(self, config: AugmentConfig, image_hw: tuple[int, int]):
        # Areas that geometric operations uncover get the mean colour, rounded as timm does it: (124, 116, 104).
        red, green, blue = (min(255, round(255 * value)) for value in config.mean)
        super().__init__(image_hw, config.backend, (red, green, blue))
        self.config = config
        self.rand_augment = parse_rand_augment(config.rand_augment)
        self.resamples = _RESAMPLES[config.interpolation]

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


class EvalTransform(_Transform):
    """Resize and centre crop of evaluation, pixel for pixel as timm evaluates.

    The image is resized, its aspect ratio kept, until it just covers floor(input size / crop_pct); of that the
    centre is taken. With ``crop_pct`` above 1 the resized image is smaller than the input and black is padded
    around it. A non-square input follows timm too: both sides are covered, the tighter one exactly.

    Args:
        image_hw: Size of the network's input.
        crop_pct: Input size over resized size.
        interpolation: Resampling of the resize, "bicubic" or "bilinear".
        backend: Who computes, see :class:`Backend`; the result is the same.
    """

    def __init__(self, image_hw: tuple[int, int], crop_pct: float, interpolation: str, backend: str = "auto"):
        super().__init__(image_hw, backend, (0, 0, 0))
        self.cover_hw = tuple(math.floor(side / crop_pct) for side in image_hw)
        self.resample = _RESAMPLES[interpolation][0]

    def plan(self, width: int, height: int) -> Plan:
        """Return what happens to an image of ``width`` x ``height`` pixels."""
        return Plan("timm", CentreCrop(self._resized_hw(height, width), self.resample))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return what the network sees of an RGB image, uint8 [3, H, W]."""
        return self.apply(from_image(image), self.plan(image.width, image.height))

    def _resized_hw(self, height: int, width: int) -> tuple[int, int]:
        cover_height, cover_width = self.cover_hw
        if cover_height == cover_width:
            # The longer side is truncated, as torchvision does it for a square input ...
            longer = int(cover_height * max(height, width) / min(height, width))
            return (longer, cover_width) if height > width else (cover_height, longer)
        # ... and rounded, as timm does it for any other.
        scale = min(height / cover_height, width / cover_width)
        return round(height / scale), round(width / scale)
