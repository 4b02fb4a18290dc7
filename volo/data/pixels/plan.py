"""The plan of one image's augmentation, which its pixels and its label map both follow."""

from dataclasses import dataclass
from typing import Literal

from volo.data.pixels.crop import CentreCrop, ResizedCrop, Shift
from volo.data.pixels.rand_augment import Op


@dataclass(frozen=True)
class Plan:
    """The steps of one image's augmentation, with every draw made.

    Args:
        order: "timm": crop, flips, operations. "published": flips, operations on the whole image, crop.
        crop: The part of the image that becomes the output, in pixels of the image at that step.
        hflip: Mirror left and right.
        vflip: Mirror top and bottom.
        ops: RandAugment operations, in order.
        erase: Box (top, left, bottom, right) of the output to fill with noise; all zeros for none.
    """

    order: Literal["timm", "published"]
    crop: ResizedCrop | Shift | CentreCrop
    hflip: bool = False
    vflip: bool = False
    ops: tuple[Op, ...] = ()
    erase: tuple[int, int, int, int] = (0, 0, 0, 0)
