"""Applies a plan to pixels natively, with render.cpp, which is compiled on first use.

The output has the same bytes as Pillow's (tests/data/pixels/test_render.py) in a fraction of the time. H, W are the
height and width of the image, h, w those of the output.
"""

import ctypes
import functools
import math
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from volo.data.pixels.crop import Box
from volo.data.pixels.plan import Plan
from volo.data.pixels.rand_augment import Op
from volo.runtime import native

_SOURCE = Path(__file__).with_suffix(".cpp")
# Products and sums are rounded separately, as in Pillow.
_FLAGS = ("-O3", "-ffp-contract=off")

_JOB = struct.Struct("=21q")
_OP = struct.Struct("=2q6d")
# Kinds as render.cpp numbers them.
_KINDS = {
    "AutoContrast": 0,
    "Equalize": 1,
    "Invert": 2,
    "Posterize": 3,
    "PosterizeIncreasing": 3,
    "Solarize": 4,
    "SolarizeIncreasing": 4,
    "SolarizeAdd": 5,
    "Brightness": 6,
    "BrightnessIncreasing": 6,
    "Contrast": 7,
    "ContrastIncreasing": 7,
    "Color": 8,
    "ColorIncreasing": 8,
    "Sharpness": 9,
    "SharpnessIncreasing": 9,
}
_AFFINE = 10
_BICUBIC = Image.Resampling.BICUBIC


def unavailable_reason() -> str | None:
    """Return None if this can run, else why it cannot. The first call in a process may build the library."""
    return _library.unavailable_reason()


def box_needed(plan: Plan, image_hw: tuple[int, int], out_hw: tuple[int, int]) -> Box:
    """Return the box of the image that :func:`render` will read.

    Args:
        plan: The plan.
        image_hw: (H, W).
        out_hw: (h, w).
    """
    needed = (ctypes.c_int64 * 4)()
    _library.get().box_needed(*_pack(plan, image_hw, out_hw), needed)
    left, top, right, bottom = needed
    return left, top, right, bottom


def render(pixels: np.ndarray, plan: Plan, out_hw: tuple[int, int], fill: tuple[int, int, int]) -> np.ndarray:
    """Return an image with ``plan`` applied.

    Args:
        pixels: uint8 [H, W, 4] in memory of :func:`volo.data.pixels.decode.reused`, which is overwritten. Only the box
            that is needed has to be decoded. The fourth channel is ignored.
        plan: The plan; erasing is left out.
        out_hw: (h, w).
        fill: Colour of areas that a geometric operation uncovers.

    Returns:
        uint8 [3, h, w].
    """
    height, width, channels = pixels.shape
    assert channels == 4 and pixels.flags.c_contiguous
    out = np.empty((3, *out_hw), np.uint8)
    _library.get().render(pixels.ctypes.data, *_pack(plan, (height, width), out_hw, fill), out.ctypes.data)
    return out


def _pack(
    plan: Plan, image_hw: tuple[int, int], out_hw: tuple[int, int], fill: tuple[int, int, int] = (0, 0, 0)
) -> tuple[bytes, bytes]:
    """Return the job and the operations as render.cpp reads them."""
    ops_first = plan.order == "published"
    canvas = image_hw if ops_first else out_hw
    window = plan.crop.window(image_hw, out_hw)
    job = _JOB.pack(
        *(image_hw[1], image_hw[0], ops_first, plan.hflip, plan.vflip, len(plan.ops)),
        *window.box,
        *(window.resized_hw[1], window.resized_hw[0], window.left, window.top, out_hw[1], out_hw[0]),
        *(window.resample == _BICUBIC, _tall_first()),
        *fill,
    )
    return job, b"".join([_pack_op(op, *canvas) for op in plan.ops])


def _pack_op(op: Op, height: int, width: int) -> bytes:
    if op.resample is None:
        return _OP.pack(_KINDS[op.name], 0, *(op.args or (0.0,)), 0.0, 0.0, 0.0, 0.0, 0.0)
    return _OP.pack(_AFFINE, op.resample == _BICUBIC, *_affine(op, height, width))


def _affine(op: Op, height: int, width: int) -> tuple[float, float, float, float, float, float]:
    """Return the affine matrix that timm passes to Pillow, or that Pillow computes from an angle."""
    value = op.args[0]
    if op.name == "ShearX":
        return 1.0, value, 0.0, 0.0, 1.0, 0.0
    if op.name == "ShearY":
        return 1.0, 0.0, 0.0, value, 1.0, 0.0
    if op.name == "TranslateXRel":
        return 1.0, 0.0, value * width, 0.0, 1.0, 0.0
    if op.name == "TranslateYRel":
        return 1.0, 0.0, 0.0, 0.0, 1.0, value * height
    assert op.name == "Rotate", op.name
    angle = -math.radians(value % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + 0.0 + x, -sin, cos, -sin * -x + cos * -y + 0.0 + y


@functools.cache
def _tall_first() -> bool:
    """Return whether Pillow resizes tall images vertically first, as it does from version 13 on."""
    image = Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8).reshape(8, 3) ** 2)
    return image.resize((4, 4), _BICUBIC) == image.resize((3, 4), _BICUBIC).resize((4, 4), _BICUBIC)


def _load() -> ctypes.CDLL:
    library = native.library(_SOURCE, _FLAGS, "pixels")
    library.render.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
    library.render.restype = None
    library.box_needed.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
    library.box_needed.restype = None
    return library


_library = native.NativeLibrary("The native augmentation", _load)
