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

from volo.config import AugmentConfig
from volo.data.pixels import jpeg_region
from volo.data.pixels import render as pixels
from volo.data.pixels.crop import ResizedCrop, Shift, draw_erase_box, draw_resized_crop, draw_shift
from volo.data.pixels.rand_augment import Op, parse_rand_augment
from volo.data.pixels.render import Pixels

_RESAMPLES = {
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
    "bilinear": (Image.Resampling.BILINEAR,),
    "bicubic": (Image.Resampling.BICUBIC,),
}


class Backend:
    """Who computes pixels: C++ ("native") or Pillow, of which it has the bytes.

    Args:
        choice: ``augment.backend``: "native", "pillow", or "auto" for the native one where it can be built.

    Raises:
        ValueError: The native one cannot be built, but is asked for.
    """

    def __init__(self, choice: str):
        reason = pixels.unavailable_reason() if choice != "pillow" else "as asked for"
        if reason and choice == "native":
            raise ValueError(f"augment.backend is 'native'. {reason}; give auto or pillow")
        self.native = reason is None
        self._reason = reason or jpeg_region.unavailable_reason()

    def __str__(self) -> str:
        if not self.native:
            return f"Pillow ({self._reason})"
        # The bytes are the same, but there is something to gain.
        return f"native (JPEGs by whole rows, a little slower: {self._reason})" if self._reason else "native"


@dataclass(frozen=True)
class Plan:
    """What happens to one training image.

    Args:
        order: "timm": crop, flip, operations. "published": flip, operations on the whole image, crop.
        crop: What becomes the output; its box refers to the image as it is when its turn comes.
        hflip: Mirror left and right.
        vflip: Mirror top and bottom.
        ops: RandAugment operations, in order.
        erase: Box (top, left, bottom, right) of the output that noise replaces; all zeros for none.
    """

    order: Literal["timm", "published"]
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
        ValueError: ``augment.rand_augment`` is not understood, or there is no such backend here.
    """

    def __init__(self, config: AugmentConfig, image_hw: tuple[int, int]):
        self.config = config
        self.image_hw = image_hw
        self.rand_augment = parse_rand_augment(config.rand_augment)
        self.resamples = _RESAMPLES[config.interpolation]
        self.backend = Backend(config.backend)
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

    def apply(self, image: Image.Image | Pixels, plan: Plan) -> np.ndarray:
        """Return the uint8 array [3, H, W] that ``plan`` makes of an RGB image (erasing is left to the device)."""
        if self.backend.native:
            return _pixels(image).augmented(
                self.image_hw,
                plan.crop,
                ops_first=plan.order == "published",
                hflip=plan.hflip,
                vflip=plan.vflip,
                ops=plan.ops,
                fill=self.fill,
            )
        if plan.order == "timm":
            image = plan.crop.apply(image, self.image_hw)
        if plan.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if plan.vflip:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        for op in plan.ops:
            image = op.apply(image, self.fill)
        if plan.order == "published":
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
        backend: Who computes, see :class:`Backend`; the result is the same.
    """

    def __init__(self, image_hw: tuple[int, int], crop_pct: float, interpolation: str, backend: str = "auto"):
        self.image_hw = tuple(image_hw)
        self.cover_hw = tuple(math.floor(side / crop_pct) for side in image_hw)
        self.resample = _RESAMPLES[interpolation][0]
        self.backend = Backend(backend)

    def __call__(self, image: Image.Image | Pixels) -> np.ndarray:
        """Return what the network sees of an RGB image, uint8 [3, H, W]."""
        height, width = self._resized_hw(image.height, image.width)
        top, left = _centred(height, self.image_hw[0]), _centred(width, self.image_hw[1])
        if self.backend.native:
            return _pixels(image).resized((height, width), (top, left), self.image_hw, self.resample)
        image = image.resize((width, height), self.resample)
        # Pillow pads with black if a crop box leaves the image.
        return to_array(image.crop((left, top, left + self.image_hw[1], top + self.image_hw[0])))

    def _resized_hw(self, height: int, width: int) -> tuple[int, int]:
        cover_height, cover_width = self.cover_hw
        if cover_height == cover_width:
            # The longer side is truncated, as torchvision does it for a square input ...
            longer = int(cover_height * max(height, width) / min(height, width))
            return (longer, cover_width) if height > width else (cover_height, longer)
        # ... and rounded, as timm does it for any other.
        scale = min(height / cover_height, width / cover_width)
        return round(height / scale), round(width / scale)


def _centred(side: int, out: int) -> int:
    """Return where a centre crop begins, as torchvision rounds it; below 0 where it pads."""
    return round((side - out) / 2) if side >= out else -((out - side) // 2)


def _pixels(image: Image.Image | Pixels) -> Pixels:
    return image if isinstance(image, Pixels) else Pixels.of(image)


def to_array(image: Image.Image) -> np.ndarray:
    """Return an RGB image as a uint8 array [3, H, W]."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
