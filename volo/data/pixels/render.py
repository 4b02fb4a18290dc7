"""What a plan does to the pixels of an image, natively: packs it for render.cpp, which is compiled on first use.

The bytes are Pillow's (tests/data/pixels/test_render.py), in a fraction of the time. H, W are the height and width of
the image, h, w those of the output.
"""

import ctypes
import functools
import math
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from volo.data.pixels.crop import ResizedCrop, Shift
from volo.data.pixels.rand_augment import Op
from volo.runtime import native

_SOURCE = Path(__file__).with_suffix(".cpp")
# A product and a sum keep their own roundings, as in Pillow.
_FLAGS = ("-O3", "-ffp-contract=off")
_SPARE = 64  # bytes behind the last pixel that render.cpp may read

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
_MOST_KEPT = 64 << 20  # bytes for an image that a thread keeps; every worker has its own
_memory = threading.local()
Box = tuple[int, int, int, int]


def unavailable_reason() -> str | None:
    """Return None if this can run, else why it cannot. The first call in a process may build it."""
    return _library.unavailable_reason()


class Pixels:
    """One image that is decoded when something is made of it, which may be once, and as much of it as that needs.

    Args:
        height: H.
        width: W.
        decode: Takes a box (left, top, right, bottom) and returns the image, uint8 [H, W, 4] from :func:`reused`, of
            which at least the box is there. The fourth channel means nothing.
    """

    __slots__ = ("height", "width", "_decode")

    def __init__(self, height: int, width: int, decode: Callable[[Box], np.ndarray]):
        self.height = height
        self.width = width
        self._decode = decode

    @classmethod
    def of(cls, image: Image.Image) -> "Pixels":
        """Return the pixels of an RGB image."""
        return cls(image.height, image.width, lambda box: from_image(image))

    def augmented(
        self,
        out_hw: tuple[int, int],
        crop: ResizedCrop | Shift,
        *,
        ops_first: bool = False,
        hflip: bool = False,
        vflip: bool = False,
        ops: tuple[Op, ...] = (),
        fill: tuple[int, int, int] = (0, 0, 0),
    ) -> np.ndarray:
        """Return what a plan makes of the image, uint8 [3, h, w].

        Args:
            out_hw: (h, w).
            crop: What becomes the output.
            ops_first: Flips and operations come before the crop rather than after it.
            hflip: Mirror left and right.
            vflip: Mirror top and bottom.
            ops: RandAugment operations, in order.
            fill: Colour of what a geometric operation uncovers.
        """
        canvas = (self.height, self.width) if ops_first else out_hw
        packed = b"".join([_pack(op, *canvas) for op in ops])
        steps = (ops_first, hflip, vflip, len(ops), packed, fill)
        if isinstance(crop, ResizedCrop):
            box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
            return self._render(box, out_hw, (0, 0), out_hw, crop.resample, *steps)
        return self._render((0, 0, self.width, self.height), out_hw, (crop.top, crop.left), out_hw, _BICUBIC, *steps)

    def resized(
        self, resized_hw: tuple[int, int], place: tuple[int, int], out_hw: tuple[int, int], resample: Image.Resampling
    ) -> np.ndarray:
        """Return the part of the resized image that begins at ``place`` (row, column), uint8 [3, h, w].

        What lies beside the resized image is black.
        """
        return self._render((0, 0, self.width, self.height), resized_hw, place, out_hw, resample)

    def _render(
        self,
        box: Box,
        resized_hw: tuple[int, int],
        place: tuple[int, int],
        out_hw: tuple[int, int],
        resample: Image.Resampling,
        ops_first: bool = False,
        hflip: bool = False,
        vflip: bool = False,
        num_ops: int = 0,
        ops: bytes = b"",
        fill: tuple[int, int, int] = (0, 0, 0),
    ) -> np.ndarray:
        job = _JOB.pack(
            *(self.width, self.height, ops_first, hflip, vflip, num_ops),
            *box,
            *(resized_hw[1], resized_hw[0], place[1], place[0], out_hw[1], out_hw[0]),
            *(resample == _BICUBIC, _tall_first()),
            *fill,
        )
        library = _library.get()
        needed = (ctypes.c_int64 * 4)()
        library.box_needed(job, ops, needed)
        array = self._decode(tuple(needed))
        assert array.shape == (self.height, self.width, 4) and array.flags.c_contiguous
        out = np.empty((3, *out_hw), np.uint8)
        library.render(array.ctypes.data, job, ops, out.ctypes.data)
        return out


def reused(height: int, width: int) -> np.ndarray:
    """Return uint8 [H, W, 4] of whatever, with spare bytes behind it, in memory that the thread's next call reuses.

    New memory for every image would cost a tenth of what decoding it costs. Of huge images none is kept.
    """
    size = height * width * 4
    if size > _MOST_KEPT:
        return np.empty(size + _SPARE, np.uint8)[:size].reshape(height, width, 4)
    memory = getattr(_memory, "array", None)
    if memory is None or len(memory) < size + _SPARE:
        memory = _memory.array = np.empty(size + size // 4 + _SPARE, np.uint8)
    return memory[:size].reshape(height, width, 4)


def from_image(image: Image.Image) -> np.ndarray:
    """Return a copy of an RGB image in :func:`reused` memory."""
    pixels = reused(image.height, image.width)
    pixels[..., :3] = np.asarray(image)
    return pixels


def _pack(op: Op, height: int, width: int) -> bytes:
    if op.resample is None:
        return _OP.pack(_KINDS[op.name], 0, *(op.args or (0.0,)), 0.0, 0.0, 0.0, 0.0, 0.0)
    return _OP.pack(_AFFINE, op.resample == _BICUBIC, *_affine(op, height, width))


def _affine(op: Op, height: int, width: int) -> tuple[float, float, float, float, float, float]:
    """Return the six numbers that timm hands to Pillow, or that Pillow makes of an angle, for a canvas."""
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
    """Tell whether this Pillow resizes what loses most of its height downwards first, as it does from 13 on."""
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
