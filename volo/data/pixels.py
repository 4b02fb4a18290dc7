"""What a plan does to the pixels of an image, natively: packs it for pixels.cpp, which is compiled on first use.

The bytes are Pillow's (tests/data/test_pixels.py), in a fraction of the time. H, W are the height and width of the
image, h, w those of the output.
"""

import ctypes
import functools
import math
import struct
import threading
from pathlib import Path

import numpy as np
from PIL import Image

from volo import compiled
from volo.data.crop import ResizedCrop, Shift
from volo.data.rand_augment import Op

_SOURCE = Path(__file__).with_suffix(".cpp")
# A product and a sum keep their own roundings, as in Pillow.
_FLAGS = ("-O3", "-ffp-contract=off")
_SPARE = 64  # bytes behind the last pixel that pixels.cpp may read

_JOB = struct.Struct("=21q")
_OP = struct.Struct("=2q6d")
# Kinds as pixels.cpp numbers them.
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
_memory = threading.local()


def why_not() -> str | None:
    """Return None where this runs, else why it does not. The first call in a process may build it."""
    library = _library()
    return library if isinstance(library, str) else None


class Pixels:
    """One image as pixels.cpp takes it; making anything of it uses it up.

    Args:
        array: uint8 [H, W, 4], of which the fourth channel means nothing, with spare bytes behind it.
    """

    __slots__ = ("array", "height", "width")

    def __init__(self, array: np.ndarray):
        self.array = array
        self.height, self.width, _ = array.shape

    @classmethod
    def reused(cls, height: int, width: int) -> "Pixels":
        """Return pixels without content, in memory that the next call in this thread will hand out again."""
        size = height * width * 4 + _SPARE
        memory = getattr(_memory, "array", None)
        if memory is None or len(memory) < size:
            memory = _memory.array = np.empty(size + size // 4, np.uint8)
        return cls(memory[: height * width * 4].reshape(height, width, 4))

    @classmethod
    def of(cls, image: Image.Image) -> "Pixels":
        """Return a copy of an RGB image, in the memory of :meth:`reused`."""
        pixels = cls.reused(image.height, image.width)
        pixels.array[..., :3] = np.asarray(image)
        return pixels

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
        box: tuple[int, int, int, int],
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
        out = np.empty((3, *out_hw), np.uint8)
        _library().render(self.array.ctypes.data, job, ops, out.ctypes.data)
        return out


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
    """Tell whether this Pillow resizes what shrinks more in height than in width downwards first, as it does from 13."""
    image = Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8).reshape(8, 3) ** 2)
    return image.resize((4, 4), _BICUBIC) == image.resize((3, 4), _BICUBIC).resize((4, 4), _BICUBIC)


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Return the library, built if need be, or the sentence that says why there is none."""
    try:
        library = compiled.library(_SOURCE, _FLAGS, "pixels")
    except compiled.NoLibrary as error:
        return f"The native augmentation cannot be built: {error}"
    library.render.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
    library.render.restype = None
    return library
