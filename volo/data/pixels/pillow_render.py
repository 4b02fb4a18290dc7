"""Applies a plan to pixels with Pillow and timm: the fallback for render.py, and the reference in its tests.

H, W are the height and width of the image, h, w those of the output.
"""

import numpy as np
from PIL import Image

from volo.data.pixels.plan import Plan


def box_needed(plan: Plan, image_hw: tuple[int, int], out_hw: tuple[int, int]) -> None:
    """Return None, which stands for the whole image: Pillow cannot work on less."""


def render(pixels: np.ndarray, plan: Plan, out_hw: tuple[int, int], fill: tuple[int, int, int]) -> np.ndarray:
    """Return an image with ``plan`` applied.

    Args:
        pixels: The whole image, uint8 [H, W, 3]; a fourth channel is ignored.
        plan: The plan; erasing is left out.
        out_hw: (h, w).
        fill: Colour of areas that a geometric operation uncovers.

    Returns:
        uint8 [3, h, w].
    """
    image = Image.fromarray(pixels[..., :3])
    if plan.order == "timm":
        image = _crop(image, plan, out_hw)
    if plan.hflip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if plan.vflip:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    for op in plan.ops:
        image = op.apply(image, fill)
    if plan.order == "published":
        image = _crop(image, plan, out_hw)
    return to_array(image)


def to_array(image: Image.Image) -> np.ndarray:
    """Return an RGB image as a uint8 array [3, h, w]."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _crop(image: Image.Image, plan: Plan, out_hw: tuple[int, int]) -> Image.Image:
    window = plan.crop.window((image.height, image.width), out_hw)
    height, width = window.resized_hw
    image = image.crop(window.box).resize((width, height), window.resample)
    # Pillow fills the part of this box outside the image with black.
    return image.crop((window.left, window.top, window.left + out_hw[1], window.top + out_hw[0]))
