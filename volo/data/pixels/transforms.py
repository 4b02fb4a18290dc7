"""Draws the plan of an image and applies it, which gives the network's input as uint8 [3, H, W].

A plan is complete: a label map can be transformed by it just as the pixels are. H, W are the height and width of the
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
    """Applies plans, with one output size and one backend."""

    def __init__(self, image_hw: tuple[int, int], backend: str, fill: tuple[int, int, int]):
        self.image_hw = image_hw
        self.fill = fill
        self.backend = Backend(backend)

    def box_needed(self, plan: Plan, image_hw: tuple[int, int]) -> Box | None:
        """Return the box of an image of size ``image_hw`` that :meth:`apply` will read; None for all of it."""
        return self.backend.box_needed(plan, image_hw, self.image_hw)

    def apply(self, pixels: np.ndarray, plan: Plan) -> np.ndarray:
        """Return the image with ``plan`` applied, uint8 [3, H, W]; erasing is left to the device.

        Args:
            pixels: The image as its ``decode`` or :func:`volo.data.pixels.decode.from_image` returned it. It may be
                overwritten.
            plan: The plan.
        """
        return self.backend.render(pixels, plan, self.image_hw, self.fill)


class TrainTransform(_Transform):
    """Draws and applies the augmentation of training images.

    Args:
        config: Operations and their probabilities.
        image_hw: Size of the network's input.

    Raises:
        ValueError: ``augment.rand_augment`` is not valid, or the backend is not available.
    """

    def __init__(self, config: AugmentConfig, image_hw: tuple[int, int]):
        # Areas that geometric operations uncover get the mean colour, rounded as in timm: (124, 116, 104).
        red, green, blue = (min(255, round(255 * value)) for value in config.mean)
        super().__init__(image_hw, config.backend, (red, green, blue))
        self.config = config
        self.rand_augment = parse_rand_augment(config.rand_augment)
        self.resamples = _RESAMPLES[config.interpolation]

    def draw(self, rng: np.random.Generator, width: int, height: int) -> Plan:
        """Draw the plan of an image of ``width`` x ``height`` pixels."""
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
    """Resize and centre crop for evaluation, with the same pixels as timm.

    The image is resized, with its aspect ratio, to just cover floor(input size / crop_pct), and its centre is cropped.
    With ``crop_pct`` above 1 the resized image is smaller than the input and padded with black. A non-square input is
    covered in both sides, and exactly in the tighter one, also as in timm.

    Args:
        image_hw: Size of the network's input.
        crop_pct: Input size / resized size.
        interpolation: Resampling of the resize, "bicubic" or "bilinear".
        backend: See :class:`Backend`; the result is the same with either.
    """

    def __init__(self, image_hw: tuple[int, int], crop_pct: float, interpolation: str, backend: str = "auto"):
        super().__init__(image_hw, backend, (0, 0, 0))
        self.cover_hw = tuple(math.floor(side / crop_pct) for side in image_hw)
        self.resample = _RESAMPLES[interpolation][0]

    def plan(self, width: int, height: int) -> Plan:
        """Return the plan of an image of ``width`` x ``height`` pixels."""
        return Plan("timm", CentreCrop(self._resized_hw(height, width), self.resample))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return the network's input for an RGB image, uint8 [3, H, W]."""
        return self.apply(from_image(image), self.plan(image.width, image.height))

    def _resized_hw(self, height: int, width: int) -> tuple[int, int]:
        cover_height, cover_width = self.cover_hw
        if cover_height == cover_width:
            # The longer side is truncated, as torchvision does for a square input ...
            longer = int(cover_height * max(height, width) / min(height, width))
            return (longer, cover_width) if height > width else (cover_height, longer)
        # ... and rounded, as timm does for any other.
        scale = min(height / cover_height, width / cover_width)
        return round(height / scale), round(width / scale)
